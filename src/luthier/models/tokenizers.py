"""The tokenizers of vendors whose own code, or transformers' reading of it, does not give the vendor's ids.

Each comes out as a fast tokenizer. Where that cannot be exact (`SpmModel.exact`) it carries the SentencePiece model
itself, by which `data.encode` makes the ids; the fast one still decodes, and is what other tools open.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from luthier.errors import ModelError
from luthier.models.spm import SpmModel, fast_tokenizer, read_spm

SAVED = ("PreTrainedTokenizerFast", "TokenizersBackend")  # a tokenizer.json that is meant as it stands
SETTINGS = ("special_tokens_map.json", "added_tokens.json", "chat_template.jinja")
NOT_OURS = ("auto_map", "tokenizer_class", "name_or_path")  # would send other tools to the vendor's code

CHATGLM3_SPECIAL = (
    "[MASK]",
    "[gMASK]",
    "[sMASK]",
    "sop",
    "eop",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|observation|>",
)
YUAN2_SPECIAL = (
    "<sep>",
    "<pad>",
    "<mask>",
    "<predict>",
    "<FIM_SUFFIX>",
    "<FIM_PREFIX>",
    "<FIM_MIDDLE>",
    "<commit_before>",
    "<commit_msg>",
    "<commit_after>",
    "<jupyter_start>",
    "<jupyter_text>",
    "<jupyter_code>",
    "<jupyter_output>",
    "<empty_output>",
)


def vendor_tokenizer(path: Path) -> PreTrainedTokenizerFast | None:
    """The tokenizer of a ChatGLM3, Yuan 2, Llama or OPT folder, or one that was saved from such; None for any other.

    Errors: ModelError where a file of the vendor's is missing or cannot be read.
    """
    config, settings = _read(path / "config.json"), _read(path / "tokenizer_config.json")
    family = config.get("model_type")
    name = settings.get("tokenizer_class") or config.get("tokenizer_class") or ""
    if name in SAVED and (path / "tokenizer.json").is_file():
        return _as_it_stands(path) if (path / "tokenizer.model").is_file() else None
    if name == "ChatGLMTokenizer" or family == "chatglm":
        return _chatglm3(path, settings)
    if name == "YuanTokenizer" or family == "yuan":
        return _yuan2(path, settings)
    if name.removesuffix("Fast") == "LlamaTokenizer" or (family == "llama" and not name):
        return _llama(path, settings)
    if family == "opt" and not settings and (path / "vocab.json").is_file():
        return _opt(path)
    return None


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """tokenizer.json and its settings, with the SentencePiece model where the ids are made by it."""
    tokenizer.save_pretrained(folder)
    if model := getattr(tokenizer, "sentencepiece_model", None):
        (folder / "tokenizer.model").write_bytes(model)


def _chatglm3(path: Path, settings: dict[str, Any]) -> PreTrainedTokenizerFast:
    """No special token is ever parsed from text, and every text begins with `[gMASK] sop` (tokenization_chatglm.py)."""
    made = fast_tokenizer(_model_of(path, "ChatGLM3"))
    made.add_special_tokens(list(CHATGLM3_SPECIAL))
    _begin_with(made, "[gMASK]", "sop")
    own = {"unk_token": "<unk>", "pad_token": "<unk>", "eos_token": "</s>", "bos_token": None}
    return _dressed(made, path, settings, **own, split_special_tokens=True, padding_side="left")


def _yuan2(path: Path, settings: dict[str, Any]) -> PreTrainedTokenizerFast:
    """Llama's, with nothing put before or behind a text; a third of its special tokens is new to the vocabulary."""
    model = _model_of(path, "Yuan 2")
    made = fast_tokenizer(model)
    made.add_special_tokens(["<eod>", *YUAN2_SPECIAL])
    own = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "<eod>", "pad_token": "<pad>"}
    return _with_model(_dressed(made, path, settings, **own), path, model)


def _llama(path: Path, settings: dict[str, Any]) -> PreTrainedTokenizerFast | None:
    """The folder's own tokenizer.json as it stands, else the same from its tokenizer.model.

    transformers 5 builds a LlamaTokenizer anew and drops a blank at a text's start: " a" becomes "a".
    """
    if (path / "tokenizer.json").is_file():
        return _as_it_stands(path)
    if not (path / "tokenizer.model").is_file():
        return None
    model = read_spm(path / "tokenizer.model")
    made = fast_tokenizer(model)
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    found = _dressed(made, path, {**names, **settings})
    found.add_bos_token = settings.get("add_bos_token", True)
    found.add_eos_token = settings.get("add_eos_token", False)
    return _with_model(found, path, model)


def _opt(path: Path) -> PreTrainedTokenizerFast:
    """GPT-2's BPE with `</s>` before every text, as a tokenizer_config.json of the vendor's says where there is one."""
    if not (path / "merges.txt").is_file():
        raise ModelError(f"{path}: OPT's tokenizer needs merges.txt, which is not there")
    try:
        bpe = models.BPE.from_file(str(path / "vocab.json"), str(path / "merges.txt"))
    except Exception as error:  # tokenizers (Rust) raises plain Exception
        raise ModelError(f"{path}: vocab.json and merges.txt cannot be read ({error})") from None
    made = Tokenizer(bpe)
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<pad>", "</s>"])
    _begin_with(made, "</s>")
    names = {"bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>", "pad_token": "<pad>"}
    return _dressed(made, path, {}, **names)


# -- the parts -------------------------------------------------------------------------------------------------------


def _model_of(path: Path, whose: str) -> SpmModel:
    file = path / "tokenizer.model"
    if not file.is_file():
        raise ModelError(f"{path}: {whose}'s tokenizer needs tokenizer.model, which is not there")
    return read_spm(file)


def _as_it_stands(path: Path) -> PreTrainedTokenizerFast | None:
    """The folder's tokenizer.json; None where it is not SentencePiece's way with blanks, for AutoTokenizer to judge."""
    normalizer = _read(path / "tokenizer.json").get("normalizer") or {}
    known = any(step["type"] == "Prepend" for step in normalizer.get("normalizers", []))
    return _with_model(_open(path), path) if known else None


def _begin_with(made: Tokenizer, *names: str) -> None:
    known = [(name, made.token_to_id(name)) for name in names]
    made.post_processor = processors.TemplateProcessing(
        single=[*names, "$A"], pair=[*names, "$A", "$B:1"], special_tokens=known
    )


def _dressed(made: Tokenizer, path: Path, settings: dict[str, Any], **own: Any) -> PreTrainedTokenizerFast:
    """The tokenizer with the folder's settings (chat template, lengths, added tokens), and over them the vendor's own.

    By way of a folder: transformers reads a dozen older forms of these settings, and only from files.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        made.save(str(folder / "tokenizer.json"))
        kept = {key: value for key, value in settings.items() if key not in NOT_OURS}
        (folder / "tokenizer_config.json").write_text(json.dumps(kept | own), encoding="utf-8")
        for file in (path / name for name in SETTINGS):
            if file.is_file():
                shutil.copyfile(file, folder / file.name)
        tokenizer = _open(folder, **own)
    tokenizer.name_or_path = str(path)
    return tokenizer


def _open(folder: Path, **own: Any) -> PreTrainedTokenizerFast:
    try:
        return PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True, **own)
    except Exception as error:  # tokenizers (Rust) raises plain Exception
        raise ModelError(f"{folder}: its tokenizer cannot be loaded ({error})") from None


def _with_model(tokenizer: PreTrainedTokenizerFast, path: Path, model: SpmModel | None = None) -> Any:
    """The tokenizer, carrying the folder's SentencePiece model where only that makes the exact ids.

    Not where plain words were added to the vocabulary: SentencePiece would not know them.
    """
    file = path / "tokenizer.model"
    if not file.is_file():
        return tokenizer
    model = model or read_spm(file)
    known, names = tokenizer.get_vocab(), [text for text, _, _ in model.pieces]
    added = {str(token) for token in tokenizer.added_tokens_decoder.values() if not token.special}
    same = all(known.get(text) == i for i, text in enumerate(names))
    if not model.exact and same and added <= set(names):
        tokenizer.sentencepiece_model = file.read_bytes()
    return tokenizer


def _read(file: Path) -> dict[str, Any]:
    """A JSON object; empty where there is no file. Errors: ModelError when it is no JSON."""
    try:
        value = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except ValueError as error:
        raise ModelError(f"{file}: not JSON ({error})") from None
    return value if isinstance(value, dict) else {}

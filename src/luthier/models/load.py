"""A model folder → the model, its tokenizer, and the few facts that everyone asks of them.

The only door to transformers' `from_pretrained`: no vendor code runs unasked, no tensor is silently left out.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from luthier.errors import ModelError
from luthier.models import families, quantize
from luthier.models.device import idle_gpus, pick_device
from luthier.models.tokenizers import vendor_tokenizer
from luthier.models.weights import DTYPES, name_of, open_weights
from luthier.quiet import quiet
from luthier.sections import ModelSection, Quantization

__all__ = [
    "TOKENIZER_FILES",
    "Say",
    "check_architecture",
    "choose_dtype",
    "end_ids",
    "footprint",
    "from_folder",
    "generation_settings",
    "idle_gpus",
    "load_model",
    "load_tokenizer",
    "pad_id",
    "pick_device",
    "quiet",
    "read_config",
    "window_of",
]

Say = Callable[[str], None]
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model")
"""A folder with a tokenizer has one of these."""


def load_tokenizer(path: Path) -> PreTrainedTokenizerFast:
    """The folder's fast tokenizer. Its pad token stays as it is and is never used: `pad_id` says what fills a batch.

    Errors: ModelError when there is none, or none that gives offsets (vendor code is never run for a tokenizer).
    """
    _check_folder(path)
    if (known := vendor_tokenizer(path)) is not None:
        return known
    if not any((path / name).is_file() for name in TOKENIZER_FILES):
        raise ModelError(f"{path}: it holds no tokenizer ({', '.join(TOKENIZER_FILES)})")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # tokenizers (Rust) raises plain Exception
        raise ModelError(f"{path}: its tokenizer cannot be loaded ({_first_line(error)})") from None
    if not tokenizer.is_fast:
        raise ModelError(f"{path}: its tokenizer gives no offsets; a fast one is needed (tokenizer.json)")
    return tokenizer


def load_model(path: Path, section: ModelSection, device: torch.device, *, say: Say) -> PreTrainedModel:
    """Load a model folder for inference onto one device, in the number format that the section asks for.

    Says the format and why, and what was repaired in its generation_config. Errors: ModelError when something is
    missing, contradicts the weights, is quantised already, or is vendor code that the section does not trust.
    """
    if asked := quantize.quantization(section.quantize):
        quantize.check_installed(f"quantize: {asked.kind}")
    config = read_config(path)
    native = check_architecture(path, config, section.trust_vendor_code)
    dtype, reason = choose_dtype(section.dtype, open_weights(path).dtype, device)
    say(f"{section.name}: weights in {name_of(dtype)}: {reason}")
    if asked:
        say(f"{section.name}: {quantize.described(asked, device)}")
    model, unused = from_folder(path, dtype, device, vendor_code=not native, quantized=asked)
    if unused:
        say(f"{section.name}: {len(unused)} stored tensors are no part of the model, the first is {unused[0]}")
    for repair in generation_settings(path)[1]:
        say(f"{section.name}: {repair}")
    return model


def from_folder(
    path: Path,
    dtype: torch.dtype,
    device: torch.device,
    *,
    vendor_code: bool = False,
    quantized: Quantization | None = None,
) -> tuple[PreTrainedModel, list[str]]:
    """The model in exactly this format, in eval mode, and the tensors of its files that it does not use.

    Errors: ModelError when transformers cannot load it, or a tensor is missing (it would start at random).
    """
    families.register()
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            path.absolute(),
            dtype=dtype,
            device_map={"": device},  # straight to the device, never "auto": that may offload
            generation_config=generation_settings(path)[0],
            local_files_only=True,
            trust_remote_code=vendor_code,
            output_loading_info=True,
            **({"quantization_config": quantize.loading(quantized, dtype)} if quantized else {}),
        )
    except (OSError, ValueError, RuntimeError, ImportError, KeyError, StrictDataclassError) as error:
        raise ModelError(f"{path}: it cannot be loaded ({_first_line(error)})") from error
    if missing := sorted(report["missing_keys"]):
        raise ModelError(f"{path}: its files lack {len(missing)} tensors of the model, the first is {missing[0]}")
    families.settle(model, read_config(path))
    if quantized:
        quantize.settle(model, quantize.arithmetic(quantized, device))
    return model, sorted(report["unexpected_keys"])


def choose_dtype(
    asked: Literal["auto", "fp32", "bf16", "fp16"], stored: torch.dtype | str, device: torch.device
) -> tuple[torch.dtype, str]:
    """The number format for the weights, and the reason in a few words. Errors: ModelError where there is none."""
    wanted = stored if asked == "auto" else DTYPES[asked]
    origin = "as the checkpoint stores them" if asked == "auto" else "as the recipe says"
    has_bf16 = device.type == "cpu" or torch.cuda.get_device_capability(device) >= (8, 0)
    if wanted == torch.bfloat16 and not has_bf16:
        if asked == "bf16":
            raise ModelError(f"model.dtype: bf16: {torch.cuda.get_device_name(device)} cannot compute in it; take fp32")
        return torch.float32, f"the checkpoint is bf16, which {torch.cuda.get_device_name(device)} cannot compute in"
    if wanted == torch.float16 and (asked == "auto" or device.type == "cpu"):
        where = "a CPU computes in bf16" if device.type == "cpu" else "fp16 overflows in training"
        chosen = torch.bfloat16 if has_bf16 else torch.float32
        return chosen, f"fp16 {origin.removesuffix(' them')}, but {where}"
    if wanted == torch.float64:
        return torch.float32, "the checkpoint is fp64, more than any of this needs"
    if not isinstance(wanted, torch.dtype):
        raise ModelError(f"the checkpoint stores {wanted}, a quantised format; take the model's unquantised weights")
    return wanted, origin


def generation_settings(path: Path) -> tuple[GenerationConfig, list[str]]:
    """The folder's generation settings without their contradictions, and a line about each repair.

    transformers refuses to save contradictory settings, at the very end of a run: Llama 2's `do_sample: false` with a
    temperature is the well-known case. Errors: ModelError when the file is no JSON.
    """
    file = path / "generation_config.json"
    known = GenerationConfig().to_dict().keys() - {"transformers_version"}
    source = file if file.is_file() else path / "config.json"
    values = {key: value for key, value in _read_json(source).items() if key in known and value is not None}
    greedy, one_beam = not values.get("do_sample"), values.get("num_beams", 1) == 1
    neutral: dict[str, Any] = {}
    if greedy:
        neutral |= {"temperature": 1.0, "top_k": 50, "top_p": 1.0, "min_p": None, "top_h": None, "typical_p": 1.0}
        neutral |= {"epsilon_cutoff": 0.0, "eta_cutoff": 0.0}
    if one_beam:
        neutral |= {"early_stopping": False, "length_penalty": 1.0}
    if one_beam and greedy:
        neutral |= {"num_return_sequences": 1}
    dropped = [f"{key} {values.pop(key)}" for key in neutral if key in values and values[key] != neutral[key]]
    if values.get("pad_token_id", 0) < 0:
        dropped.append(f"pad_token_id {values.pop('pad_token_id')}")
    repairs = [f"{source.name} contradicts itself; dropped: {', '.join(dropped)}"] if dropped else []
    try:
        settings = GenerationConfig(**values)
        settings.validate(strict=True)
    except (ValueError, TypeError) as error:
        settings = GenerationConfig(**{key: value for key, value in values.items() if key.endswith("_token_id")})
        repairs = [f"{source.name} cannot be used ({_first_line(error)}); only its token ids are kept"]
    return settings, repairs


def end_ids(tokenizer: PreTrainedTokenizerFast, generation_config: GenerationConfig) -> list[int]:
    """Every token id that ends an answer: the tokenizer's end token and those of the generation settings."""
    listed = generation_config.eos_token_id
    several = listed if isinstance(listed, list) else [listed]
    return list(dict.fromkeys(id for id in [tokenizer.eos_token_id, *several] if id is not None))


def pad_id(tokenizer: PreTrainedTokenizerFast) -> int:
    """What fills a batch: the end token, else 0. It is masked, so which one it is decides nothing.

    Not the pad token: where someone added one without growing the model, its id lies beyond the embedding.
    """
    return tokenizer.eos_token_id or 0


def window_of(model: Any) -> int | None:
    """Most positions that the model knows, prompt and answer together; None for any number."""
    window: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return window


def footprint(model: torch.nn.Module) -> str:
    """Size in one line, shared weights counted once: "2.5 MiB of weights (fp32), 655,000 parameters"."""
    parameters = list(model.parameters())
    size = quantize.bytes_of(parameters)
    count = sum(map(quantize.numbers, parameters))
    formats = ", ".join(dict.fromkeys(map(quantize.format_of, parameters)))
    power, unit = next(
        (p, u) for p, u in ((30, "GiB"), (20, "MiB"), (10, "KiB"), (0, "bytes")) if size >= 2**p or not p
    )
    told = f"{count / 1e6:,.1f} M" if count >= 1e6 else f"{count:,}"
    return f"{size / 2**power:,.1f} {unit} of weights ({formats}), {told} parameters"


def read_config(path: Path) -> dict[str, Any]:
    """A model folder's config.json. Errors: ModelError when it is absent or the model is quantised."""
    _check_folder(path)
    if not (path / "config.json").is_file():
        if (path / "adapter_config.json").is_file():
            raise ModelError(f"{path}: this is an adapter, not a model; its base is named in its adapter_config.json")
        raise ModelError(f"{path}: not a model folder (it has no config.json)")
    if (path / "adapter_config.json").is_file():
        raise ModelError(f"{path}: it is a model and an adapter at once; move adapter_config.json out of it")
    config = _read_json(path / "config.json")
    if quantised := config.get("quantization_config"):
        kind = quantised.get("quant_method", "some way")
        raise ModelError(f"{path}: its weights are quantised ({kind}); take the model's unquantised weights")
    return config


def check_architecture(path: Path, config: dict[str, Any], trusted: bool) -> bool:
    """Whether transformers knows the model itself; else it must bring vendor code that the user trusts."""
    kind = config.get("model_type")
    if families.family_of(config) is not None:
        families.check(path, config)
        return True
    if kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return True
    if "AutoModelForCausalLM" not in config.get("auto_map", {}):
        raise ModelError(f"{path}: transformers {transformers.__version__} knows no language model of type {kind!r}")
    if not trusted:
        raise ModelError(
            f"{path}: a model of type {kind!r} runs Python code that came with it; read that code, "
            "and if you trust it set model.trust_vendor_code: true"
        )
    return False


def _check_folder(path: Path) -> None:
    if not path.is_dir():
        raise ModelError(f"{path}: there is no such folder")


def _read_json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{file}: not JSON ({error})") from None
    if not isinstance(value, dict):
        raise ModelError(f"{file}: not a JSON object")
    return value


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).partition("\n")[0].rstrip(". :")

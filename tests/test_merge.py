"""Merging: the arithmetic, every file that a stranger's loader needs, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    OPTConfig,
    OPTForCausalLM,
)

import luthier.merge
from luthier.errors import ModelError, RunError
from luthier.merge import MergeReport, merge
from luthier.models.adapters import adapter_hash, attach, load_adapter, save_adapter
from luthier.models.load import load_model
from luthier.quiet import quiet
from luthier.sections import MethodSection, ModelSection
from tiny import CHATML, moved, tiny_llama, tiny_qwen2, tiny_tokenizer

CPU = torch.device("cpu")
IDS = torch.tensor([[5, 9, 200, 31, 77, 140, 8, 6]])


@pytest.fixture(autouse=True)
def _quiet() -> None:
    quiet()


def load(path: Path) -> Any:
    return load_model(path, ModelSection(name="tiny"), CPU, say=lambda line: None)


def tuned(path: Path, adapter: Path, **method: Any) -> Any:
    model = moved(attach(load(path), MethodSection(**method), 1, say=lambda line: None))
    save_adapter(model, adapter, tiny_tokenizer())
    return model


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(IDS).logits[0].float()


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """A base and an adapter for it."""
    base = tiny_llama(tmp_path / "base")
    tuned(base, tmp_path / "adapter")
    return base, tmp_path / "adapter"


# -- the numbers --------------------------------------------------------------------------------------------------

METHODS: list[dict[str, Any]] = [
    {},
    {"target": ["q_proj"], "bias": "all", "alpha": 32, "r": 2},
    {"target": ["v_proj", "lm_head"], "bias": "lora_only"},
    {"target": ["embed_tokens", "v_proj"]},
    {"modules_to_save": ["embed_tokens"]},
    {"modules_to_save": ["embed_tokens", "lm_head", "model.norm"]},
]


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_the_merged_folder_is_the_tuned_model_for_plain_transformers(tmp_path: Path, method: Any, tie: bool) -> None:
    base = tiny_qwen2(tmp_path / "base", tie_word_embeddings=tie)
    model = tuned(base, tmp_path / "adapter", **method)
    report = merge(base, tmp_path / "adapter", tmp_path / "merged", say=lambda line: None)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert (logits(merged) - logits(model)).abs().max() < 2e-5
    assert (logits(merged) - logits(load(base))).abs().max() > 0.1
    named = [*method.get("modules_to_save", []), *method.get("target", [])]
    assert report.untied is (tie and ("embed_tokens" in named or "lm_head" in named))
    assert merged.config.tie_word_embeddings is (tie and not report.untied)
    stored = load_file(tmp_path / "merged" / "model.safetensors")
    assert ("lm_head.weight" in stored) is not merged.config.tie_word_embeddings


@pytest.mark.parametrize("stored", ["both", "head only", "different"])
@pytest.mark.parametrize("method", [{}, {"target": ["lm_head"]}, {"modules_to_save": ["embed_tokens"]}])
def test_however_tied_tensors_are_stored(tmp_path: Path, stored: str, method: Any) -> None:
    base = tiny_qwen2(tmp_path / "base", tie_word_embeddings=True)
    tensors = load_file(base / "model.safetensors")
    shared = tensors["model.embed_tokens.weight"]
    tensors["lm_head.weight"] = shared + 0.1 if stored == "different" else shared.clone()
    if stored == "head only":
        del tensors["model.embed_tokens.weight"]
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    model = tuned(base, tmp_path / "adapter", **method)
    report = merge(base, tmp_path / "adapter", tmp_path / "merged", say=lambda line: None)
    assert report.untied is (stored == "different" or bool(method))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert merged.config.tie_word_embeddings is not report.untied
    assert (logits(merged) - logits(model)).abs().max() < 2e-5


def plain_peft(tmp_path: Path, **options: Any) -> tuple[Path, Path, torch.Tensor]:
    """An adapter that PEFT alone wrote: (base, adapter, its logits)."""
    base, adapter = tiny_llama(tmp_path / "base"), tmp_path / "adapter"
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "up_proj"], **options)
    model = moved(get_peft_model(AutoModelForCausalLM.from_pretrained(base), config))
    model.save_pretrained(adapter)
    return base, adapter, logits(model)


def test_scales_and_patterns_of_any_peft_adapter(tmp_path: Path) -> None:
    base, adapter, expected = plain_peft(
        tmp_path,
        r=4,
        lora_alpha=8,
        use_rslora=True,
        rank_pattern={"layers.1.mlp.up_proj": 2},
        alpha_pattern={"q_proj": 32, r".*\.0\.mlp\.up_proj": 3},
        layers_to_transform=[0, 1],
    )
    merge(base, adapter, tmp_path / "merged", say=lambda line: None)
    assert (logits(load(tmp_path / "merged")) - expected).abs().max() < 2e-5


@pytest.mark.parametrize(
    "method",
    [
        {"kind": "dora"},
        {"kind": "dora", "bias": "all", "modules_to_save": ["lm_head", "model.norm"]},
        {"kind": "dora", "target": ["q_proj", "lm_head"]},
        {"kind": "pissa", "r": 2},
        {"kind": "ia3"},
        {"kind": "vera"},
        {"kind": "oft"},
        {"kind": "loha"},
        {"kind": "lokr"},
        {"kind": "adalora"},
        {"kind": "ln_tuning"},
    ],
    ids=lambda method: " ".join(method),
)
def test_every_kind_that_can_be_merged(tmp_path: Path, method: Any) -> None:
    """At strength 1, and half of the way."""
    base = tiny_qwen2(tmp_path / "base", tie_word_embeddings=True)
    model = tuned(base, tmp_path / "adapter", **method)
    report = merge(base, tmp_path / "adapter", tmp_path / "merged", say=lambda line: None)
    assert report.untied is ("lm_head" in [*method.get("target", []), *method.get("modules_to_save", [])])
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert (logits(merged) - logits(model)).abs().max() < 5e-4
    assert (logits(merged) - logits(load(base))).abs().max() > 1e-2
    merge(base, tmp_path / "adapter", tmp_path / "half", say=lambda line: None, strength=0.5)
    first, half, last = (load_file(tmp_path / folder / "model.safetensors") for folder in ("base", "half", "merged"))
    for name, whole in last.items():
        before = first.get(name, first["model.embed_tokens.weight"])  # a tied head
        torch.testing.assert_close(half[name], (before + whole) / 2, rtol=1e-5, atol=1e-6)


def test_layers_that_are_stored_transposed(tmp_path: Path) -> None:
    """GPT-2's Conv1D; its c_proj is square in attention, where a wrong turn would fit."""
    base = tmp_path / "base"
    GPT2LMHeadModel(GPT2Config(vocab_size=384, n_embd=32, n_layer=2, n_head=4)).save_pretrained(base)
    tiny_tokenizer().save_pretrained(base)
    expected = logits(tuned(base, tmp_path / "adapter"))
    merge(base, tmp_path / "adapter", tmp_path / "out", say=lambda line: None)
    found = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_layers_that_are_stored_transposed_and_were_trained_quantised(tmp_path: Path, kind: Any) -> None:
    """transformers turns them when it quantises them; the base that is merged into is as it was."""
    pytest.importorskip("bitsandbytes")
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    GPT2LMHeadModel(GPT2Config(vocab_size=384, n_embd=64, n_layer=2, n_head=4)).save_pretrained(base)
    tiny_tokenizer().save_pretrained(base)
    model = load_model(base, ModelSection(name="tiny", quantize=kind), CPU, say=lambda line: None)
    save_adapter(moved(attach(model, MethodSection(target=["attn.c_proj"]), 1, say=lambda line: None)), adapter)
    merge(base, adapter, tmp_path / "out", say=lambda line: None)
    expected = logits(load_adapter(load(base), adapter))
    found = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_base_whose_names_lack_the_models_prefix(tmp_path: Path, kind: Any) -> None:
    """OPT-6.7B is stored as decoder.…, without the head, in pickled shards; transformers adds model. while it loads."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    config = OPTConfig(vocab_size=384, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4,
                       word_embed_proj_dim=32, max_position_embeddings=64)  # fmt: skip
    OPTForCausalLM(config).save_pretrained(base)
    tiny_tokenizer().save_pretrained(base)
    tensors = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    tensors = {name.removeprefix("model."): tensor for name, tensor in tensors.items() if name != "lm_head.weight"}
    torch.save(tensors, base / "pytorch_model.bin")
    expected = logits(tuned(base, adapter, kind=kind))
    merge(base, adapter, tmp_path / "out", say=lambda line: None)
    found = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_the_sum_is_rounded_once(tmp_path: Path) -> None:
    base = tiny_llama(tmp_path / "base", dtype=torch.bfloat16)
    tuned(base, tmp_path / "adapter", r=4, alpha=8)
    said: list[str] = []
    report = merge(base, tmp_path / "adapter", tmp_path / "merged", say=said.append)
    assert said == [f"{tmp_path / 'merged'}: 14 of 21 tensors changed, in bf16"]
    assert report == MergeReport(tmp_path / "merged", "lora", "bf16", 21, 14, False)
    before = load_file(base / "model.safetensors")
    after = load_file(tmp_path / "merged" / "model.safetensors")
    adapter = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in after.values()} == {torch.bfloat16}
    for name, weight in before.items():
        key = "base_model.model." + name.removesuffix(".weight")
        expected = weight
        if f"{key}.lora_A.weight" in adapter:
            delta = adapter[f"{key}.lora_B.weight"] @ adapter[f"{key}.lora_A.weight"]
            expected = (weight.float() + 2.0 * delta).to(torch.bfloat16)
        assert torch.equal(after[name], expected), name


@pytest.mark.parametrize(
    ("asked", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_a_format_may_be_asked_for(pair: tuple[Path, Path], tmp_path: Path, asked: Any, dtype: torch.dtype) -> None:
    assert merge(*pair, tmp_path / "merged", asked, say=lambda line: None).dtype == asked
    stored = load_file(tmp_path / "merged" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {dtype}
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged").dtype == dtype


def test_numbers_beyond_fp16_are_refused(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = pair
    tensors = load_file(base / "model.safetensors")
    tensors["model.norm.weight"][3] = 1e5
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ModelError, match=r"^model.norm.weight holds 1e\+05, beyond fp16's 65504; take merge.dtype=bf16$"
    ):
        merge(base, adapter, tmp_path / "merged", "fp16", say=print)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"], "nothing half-written stays"


# -- the files ----------------------------------------------------------------------------------------------------


def test_shards_in_and_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny_llama(tmp_path / "base")
    model = load(base)
    (base / "model.safetensors").unlink()
    model.save_pretrained(base, max_shard_size="150KB")
    assert (base / "model.safetensors.index.json").is_file()
    expected = logits(tuned(base, tmp_path / "adapter"))
    monkeypatch.setattr(luthier.merge, "SHARD_BYTES", 200_000)
    merge(base, tmp_path / "adapter", tmp_path / "merged", say=lambda line: None)
    shards = sorted((tmp_path / "merged").glob("model-*.safetensors"))
    assert [shard.name for shard in shards] == [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
    assert all(sum(tensor.nbytes for tensor in load_file(shard).values()) <= 200_000 for shard in shards)
    index = json.loads((tmp_path / "merged" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 110_912 * 4
    assert len(index["weight_map"]) == 21
    assert (logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()) - expected).abs().max() < 2e-5


def test_a_base_of_pickled_tensors(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = pair
    expected = logits(load_adapter(load(base), adapter))
    torch.save(load_file(base / "model.safetensors"), base / "pytorch_model.bin")
    (base / "model.safetensors").unlink()
    merge(base, adapter, tmp_path / "merged", say=lambda line: None)
    assert (tmp_path / "merged" / "model.safetensors").is_file()
    assert (logits(load(tmp_path / "merged")) - expected).abs().max() < 2e-5


def test_everything_that_a_stranger_needs_is_there(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = pair
    (base / "LICENSE.txt").write_text("theirs")
    (base / "generation_config.json").write_text(
        json.dumps({"do_sample": False, "temperature": 0.9, "top_p": 0.6, "eos_token_id": 1})
    )
    template = CHATML.replace("assistant", "Antonio")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    tokenizer.save_pretrained(adapter)
    said: list[str] = []
    merge(base, adapter, tmp_path / "merged", say=said.append, ends=[3, 1])
    assert said[:2] == [
        "base: generation_config.json contradicts itself; dropped: temperature 0.9, top_p 0.6",
        "generation_config.json: end tokens 1 become [1, 3]",
    ]
    merged = tmp_path / "merged"
    assert (merged / "LICENSE.txt").read_text() == "theirs"
    assert AutoTokenizer.from_pretrained(merged).chat_template == template, "the adapter's tokenizer wins"
    settings = GenerationConfig.from_pretrained(merged)
    assert (settings.eos_token_id, settings.temperature, settings.do_sample) == ([1, 3], None, False)
    model = AutoModelForCausalLM.from_pretrained(merged)
    model.generation_config.max_length = 77
    model.save_pretrained(tmp_path / "again")
    assert json.loads((merged / "config.json").read_text())["dtype"] == "float32"
    assert json.loads((merged / "luthier_merge.json").read_text()) == {
        "kind": "lora",
        "base": str(base),
        "adapter": str(adapter),
        "adapter_sha256": adapter_hash(adapter),
        "earlier": [],
        "dtype": "fp32",
        "verified": None,
        "figures": None,
    }


def test_an_older_config_keeps_its_older_name_for_the_format(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = pair
    config = json.loads((base / "config.json").read_text())
    config["torch_dtype"] = config.pop("dtype")
    (base / "config.json").write_text(json.dumps(config))
    merge(base, adapter, tmp_path / "merged", "bf16", say=lambda line: None)
    written = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert (written["torch_dtype"], "dtype" in written) == ("bfloat16", False)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged").dtype == torch.bfloat16


def test_without_a_tokenizer_of_its_own_the_bases_is_taken(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = pair
    for file in adapter.glob("*token*"):
        file.unlink()
    merge(base, adapter, tmp_path / "merged", say=lambda line: None)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / "merged" / name).read_bytes() == (base / name).read_bytes()


def test_a_whole_model_is_copied_in_the_bases_format(tmp_path: Path) -> None:
    base = tiny_llama(tmp_path / "base", dtype=torch.bfloat16, tie_word_embeddings=True)
    tuned(base, tmp_path / "model", kind="full")
    said: list[str] = []
    report = merge(base, tmp_path / "model", tmp_path / "merged", say=said.append)
    assert said[0] == (
        f"{tmp_path / 'model'} is a whole model (full fine-tuning): copied in bf16, there is nothing to add to it"
    )
    assert (report.kind, report.dtype, report.changed, report.untied) == ("full", "bf16", 0, False)
    trained = load_file(tmp_path / "model" / "model.safetensors")
    for name, tensor in load_file(tmp_path / "merged" / "model.safetensors").items():
        assert torch.equal(tensor, trained[name].to(torch.bfloat16))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged").dtype == torch.bfloat16
    other = tiny_qwen2(tmp_path / "other", tie_word_embeddings=True)
    with pytest.raises(
        ModelError, match=r"other: it holds model.layers.0.self_attn.k_proj.bias, which .*base does not"
    ):
        merge(base, other, tmp_path / "wrong", say=print)


# -- refusals -----------------------------------------------------------------------------------------------------


def refused(base: Path, adapter: Path, out: Path, message: str) -> None:
    with pytest.raises(ModelError) as caught:
        merge(base, adapter, out, say=print)
    assert str(caught.value).startswith(message.format(base=base, adapter=adapter, out=out)), str(caught.value)


def test_a_taken_or_dangerous_place_is_refused(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = pair
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("years of work")
    refused(base, adapter, tmp_path / "full", "{out}: it exists and is not empty; remove it, or name another folder")
    refused(base, adapter, tmp_path / "full" / "thesis.txt", "{out}: it exists and is not empty")
    refused(base, adapter, base / "merged", "{out}: it lies in {base}, which is only read; name a folder outside")
    refused(
        base, adapter, adapter / "a" / "b", "{out}: it lies in {adapter}, which is only read; name a folder outside"
    )
    (tmp_path / "link").symlink_to(base)
    refused(base, adapter, tmp_path / "link" / "x", "{out}: it lies in {base}")
    assert (tmp_path / "full" / "thesis.txt").read_text() == "years of work"
    (tmp_path / "empty").mkdir()
    merge(base, adapter, tmp_path / "empty", say=lambda line: None)


def test_an_adapter_never_counts_twice(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = pair
    merged = merge(base, adapter, tmp_path / "merged", say=lambda line: None).folder
    message = "{base}: {adapter} is merged into it already and would count twice; use the folder as it is"
    refused(merged, adapter, tmp_path / "twice", message)
    with pytest.raises(ModelError, match="would count twice"):
        load_adapter(load(merged), adapter)
    tuned(merged, tmp_path / "second", r=2)
    both = merge(merged, tmp_path / "second", tmp_path / "both", say=lambda line: None).folder
    refused(both, adapter, tmp_path / "third", message)
    refused(both, tmp_path / "second", tmp_path / "third", message)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"lora_bias": True}, "lora_bias"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights=pissa"),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
    ],
)
def test_adapters_that_are_more_than_a_sum_are_refused(tmp_path: Path, options: Any, named: str) -> None:
    base, adapter, _ = plain_peft(tmp_path, **options)
    refused(base, adapter, tmp_path / "merged", "{adapter}: an adapter with " + named + " cannot be merged")


def test_an_adapter_that_does_not_fit_is_refused(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = pair
    deep = tmp_path / "deep"
    tuned(tiny_llama(tmp_path / "deeper", num_hidden_layers=3), deep)
    refused(
        base,
        deep,
        tmp_path / "x",
        "{adapter}: it changes model.layers.2.mlp.down_proj.weight, which {base} does not have",
    )
    wide = tiny_llama(tmp_path / "wide", intermediate_size=80)
    refused(
        wide, adapter, tmp_path / "x", "{adapter}: model.layers.0.mlp.down_proj.weight is [64, 96] there and [64, 80]"
    )
    tensors = load_file(adapter / "adapter_model.safetensors")
    empty = {key: torch.zeros_like(tensor) if "lora_B" in key else tensor for key, tensor in tensors.items()}
    save_file(empty, adapter / "adapter_model.safetensors")
    refused(base, adapter, tmp_path / "x", "{adapter}: the adapter has no effect: every B in it is zero")
    name = "base_model.model.model.layers.0.mlp.down_proj.lora_magnitude_vector"
    save_file(tensors | {name: torch.ones(64)}, adapter / "adapter_model.safetensors")
    refused(base, adapter, tmp_path / "x", "{adapter}: its tensor " + name + " is none that a merge knows")
    refused(base, tmp_path / "nowhere", tmp_path / "x", "{adapter}: ")
    refused(tmp_path / "nowhere", adapter, tmp_path / "x", "{base}: there is no such folder")


def test_a_base_in_another_format_needs_one_named(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = pair
    tensors = load_file(base / "model.safetensors")
    wide = {name: tensor.double() for name, tensor in tensors.items()}
    save_file(wide, base / "model.safetensors", metadata={"format": "pt"})
    refused(base, adapter, tmp_path / "x", "{base} is stored in float64; merge.dtype must name one of fp32, bf16, fp16")
    assert merge(base, adapter, tmp_path / "x", "fp32", say=lambda line: None).dtype == "fp32"


def test_the_callers_files_are_in_the_folder_before_it_has_its_name(pair: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "merged"

    def note(folder: Path) -> None:
        assert not out.exists()
        assert (folder / "luthier_merge.json").is_file()
        (folder / "luthier.json").write_text("{}")

    merge(*pair, out, say=lambda line: None, note=note)
    assert (out / "luthier.json").read_text() == "{}"

    def full(folder: Path) -> None:
        raise OSError("no room")

    with pytest.raises(OSError, match="no room"):
        merge(*pair, tmp_path / "other", say=lambda line: None, note=full)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base", "merged"]


def test_a_full_disk_is_seen_before_writing(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(RunError, match=r"merged: the model needs 433\.2 KiB, 1\.0 KiB are free in .*"):
        merge(*pair, tmp_path / "merged", say=print)


def test_a_full_memory_is_seen_before_the_model_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only where it is loaded: LoRA's sum is made tensor by tensor, whatever is free."""
    base = tiny_llama(tmp_path / "base", dtype=torch.bfloat16)
    for kind in ("lora", "ia3"):
        tuned(base, tmp_path / kind, kind=kind)
    numbers = sum(tensor.numel() for tensor in load_file(base / "model.safetensors").values())
    memory = {"available": 8 * numbers - 1}
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(**memory))
    with pytest.raises(RunError) as error:
        merge(base, tmp_path / "ia3", tmp_path / "merged", say=lambda line: None)
    both = f"{8 * numbers / 1024:,.1f} KiB"  # in fp32, and once more in the file that is being written
    assert str(error.value) == (
        f"{tmp_path / 'ia3'}: what is no LoRA is merged with the whole model in memory: that takes {both}, and {both} "
        "are free; end what holds the rest, take a larger machine, or ship the adapter's folder"
    )
    assert not (tmp_path / "merged").exists()
    merge(base, tmp_path / "lora", tmp_path / "merged", say=lambda line: None)
    memory["available"] += 1
    merge(base, tmp_path / "ia3", tmp_path / "other", say=lambda line: None)


def test_plain_peft_merges_to_the_same(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = pair
    merge(base, adapter, tmp_path / "merged", say=lambda line: None)
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).merge_and_unload()
    ours = load_file(tmp_path / "merged" / "model.safetensors")
    for name, tensor in theirs.state_dict().items():
        assert (ours[name] - tensor).abs().max() < 1e-6, name

"""Adapters: what trains, what is saved, and that a wrong or empty adapter never goes unnoticed."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    OPTConfig,
    OPTForCausalLM,
)
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4GroupedLinear
from transformers.pytorch_utils import Conv1D

from luthier.errors import ModelError
from luthier.models.adapters import (
    adapter_hash,
    adapter_off,
    attach,
    fill_adapter,
    load_adapter,
    read_adapter,
    save_adapter,
)
from luthier.models.load import load_model
from luthier.models.targets import is_linear
from luthier.quiet import quiet
from luthier.sections import MethodSection, ModelSection, TrainSection
from rows import fit, random_rows
from tiny import moved, tiny_llama, tiny_qwen2, tiny_tokenizer

CPU = torch.device("cpu")
IDS = torch.tensor([[5, 9, 200, 31, 77, 140, 8, 6]])
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(autouse=True)
def _quiet() -> None:
    quiet()


def load(path: Path) -> Any:
    return load_model(path, ModelSection(name="tiny"), CPU, say=lambda line: None)


def tuned(path: Path, seed: int = 1, **method: Any) -> Any:
    """A model whose every trainable number was moved at random, as training would."""
    return moved(attach(load(path), MethodSection(**method), seed, say=lambda line: None))


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(IDS).logits[0].float()


def trainable(model: Any) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


# -- attaching ----------------------------------------------------------------------------------------------------


def test_lora_trains_every_linear_layer_but_the_head(tmp_path: Path) -> None:
    said: list[str] = []
    model = attach(load(tiny_llama(tmp_path)), MethodSection(r=4, alpha=16, dropout=0.1), 1, say=said.append)
    assert said == [f"LoRA r 4, alpha 16 on {' '.join(LINEAR)}: 7,424 of 118,336 parameters train (6.27 %)"]
    modules = {name.split(".lora_")[0].rpartition(".")[2] for name in trainable(model)}
    assert modules == set(LINEAR)
    assert all(".lora_" in name for name in trainable(model))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 2 * 4 * (
        4 * 64 + 2 * (64 + 32) + 3 * (64 + 96)
    )
    layer = model.base_model.model.model.layers[0].mlp.down_proj
    assert (layer.scaling["default"], layer.lora_dropout["default"].p) == (4.0, 0.1)
    assert torch.equal(logits(model.eval()), logits(load(tmp_path))), "B is zero: nothing changes yet"


def test_the_seed_decides_the_start_and_nothing_else(tmp_path: Path) -> None:
    path = tiny_llama(tmp_path)

    def start(seed: int) -> torch.Tensor:
        torch.rand(3)
        model = attach(load(path), MethodSection(), seed, say=print)
        return next(p for name, p in model.named_parameters() if "lora_A" in name).detach()

    state = torch.random.get_rng_state()
    model = attach(load(path), MethodSection(), 1, say=print)
    assert torch.equal(torch.random.get_rng_state(), state), "drawing the adapter takes nothing from the run's stream"
    assert trainable(model)
    assert torch.equal(start(1), start(1))
    assert not torch.equal(start(1), start(2))


def test_targets_by_name(tmp_path: Path) -> None:
    path = tiny_llama(tmp_path)
    model = attach(load(path), MethodSection(target=["q_proj", "layers.1.mlp.up_proj"]), 1, say=print)
    assert {name.split(".lora_")[0].removeprefix("base_model.model.model.") for name in trainable(model)} == {
        "layers.0.self_attn.q_proj",
        "layers.1.self_attn.q_proj",
        "layers.1.mlp.up_proj",
    }


def test_a_target_that_matches_nothing_names_what_is_close_and_what_there_is(tmp_path: Path) -> None:
    model = OPTForCausalLM(
        OPTConfig(vocab_size=384, hidden_size=32, ffn_dim=48, num_hidden_layers=1, num_attention_heads=2)
    )
    with pytest.raises(ModelError) as caught:
        attach(model, MethodSection(target=["q_proj", "fc_in"]), 1, say=print)
    assert str(caught.value) == (
        "target: fc_in matches no layer of this opt model; close: fc1, fc2; "
        "its linear layers are k_proj, v_proj, q_proj, out_proj, fc1, fc2"
    )
    llama = load(tiny_llama(tmp_path))
    with pytest.raises(ModelError, match=r"^target: proj matches no layer of this llama model; close: .*its linear"):
        attach(llama, MethodSection(target=["proj"]), 1, say=print)
    with pytest.raises(ModelError, match=r"^modules_to_save: embedding matches no layer .*close: embed_tokens; its"):
        attach(llama, MethodSection(modules_to_save=["embedding"]), 1, say=print)
    with pytest.raises(ModelError, match=r"^target and modules_to_save both name up_proj; train it one way or "):
        attach(llama, MethodSection(target=["q_proj", "up_proj"], modules_to_save=["up_proj"]), 1, say=print)
    with pytest.raises(
        ModelError,
        match=r"^modules_to_save: norm would take model.layers.0.input_layernorm as well; write",
    ):
        attach(llama, MethodSection(modules_to_save=["norm"]), 1, say=print)
    assert "base_model.model.model.norm.modules_to_save.default.weight" in trainable(
        attach(llama, MethodSection(modules_to_save=["model.norm"]), 1, say=print)
    )


@pytest.mark.parametrize("kind", ["mamba", "mamba2"])
def test_what_peft_cannot_adapt_is_one_line_with_our_own_key(kind: str) -> None:
    sizes = {"num_heads": 8, "head_dim": 8, "n_groups": 1} if kind == "mamba2" else {}
    config = AutoConfig.for_model(kind, vocab_size=61, hidden_size=32, num_hidden_layers=1, state_size=4, **sizes)
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ModelError) as caught:
        attach(model, MethodSection(), 1, say=print)
    left = ["in_proj"] if kind == "mamba2" else ["in_proj", "x_proj"]
    assert str(caught.value) == (
        f"PEFT cannot adapt this {kind} model: Module 'out_proj' is incompatible with Mamba-based models "
        f"(model_type='{kind}'); set method.target: [{', '.join(left)}]"
    )
    adapted = attach(AutoModelForCausalLM.from_config(config), MethodSection(target=left), 1, say=print)
    adapted(input_ids=IDS % 61, labels=IDS % 61).loss.backward()
    assert all(value.grad is not None for value in adapted.parameters() if value.requires_grad)


def test_a_model_without_linear_layers_says_what_to_do() -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=61, n_embd=32, n_layer=0, n_head=4))
    with pytest.raises(ModelError, match=r"^target: this gpt2 model has no linear layers beside its head; name layers"):
        attach(model, MethodSection(), 1, say=print)


SMALL = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
EXPERTS = {**SMALL, "intermediate_size": 48, "num_key_value_heads": 2, "num_local_experts": 4}
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


@pytest.mark.parametrize(
    ("kind", "config", "targets"),
    [
        ("falcon", SMALL, ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]),
        ("mixtral", EXPERTS, ATTENTION),
        ("phimoe", EXPERTS, ATTENTION),
        ("gpt_oss", {**EXPERTS, "head_dim": 8, "num_experts_per_tok": 2}, ATTENTION),
        (
            "llama4_text",
            {**EXPERTS, "head_dim": 8, "intermediate_size_mlp": 48},
            [*ATTENTION, "gate_proj", "up_proj", "down_proj"],
        ),
        ("gpt2", {"vocab_size": 61, "n_embd": 32, "n_layer": 2, "n_head": 4}, ["c_attn", "c_proj", "c_fc"]),
    ],
    ids=lambda given: given if isinstance(given, str) else "",
)
def test_every_linear_layer_by_what_it_computes_not_by_its_class(kind: str, config: Any, targets: list[str]) -> None:
    """Falcon's have a class and a forward of their own; routers (Phi-MoE, Llama 4) are linear by their class alone."""
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **config))
    adapted = attach(model, MethodSection(dropout=0.1), 1, say=print)
    found = {name.split(".lora_")[0].rpartition(".")[2] for name in trainable(adapted)}
    assert found == set(targets)
    adapted.eval()(input_ids=IDS % 61, labels=IDS % 61).loss.backward()
    assert all(value.grad is not None for value in adapted.parameters() if value.requires_grad)


def test_a_layer_that_is_grouped_is_no_linear_layer() -> None:
    assert not is_linear(DeepseekV4GroupedLinear(8, 12, 4))
    assert is_linear(torch.nn.Linear(8, 12)) and is_linear(Conv1D(8, 12)) and not is_linear(torch.nn.Embedding(8, 8))


def test_gpt2_trains_as_the_reference_says_and_plain_peft_loads_it(tmp_path: Path) -> None:
    """Its layers are transformers' Conv1D, whose weights are stored transposed."""
    config = GPT2Config(vocab_size=384, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=1)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # PEFT's, where it has to correct fan_in_fan_out
        model = attach(load(tmp_path / "base"), MethodSection(dropout=0.1), 1, say=print)
    before = logits(model.eval())
    section = TrainSection(batch=6, steps=4, lr=1e-2, warmup=0)
    fit(tmp_path / "run", model, random_rows(12), section, write=lambda folder: save_adapter(model, folder))
    assert json.loads((tmp_path / "run" / "proof.json").read_text())["path"] == "engine"
    expected = logits(model.eval())
    assert (expected - before).abs().max() > 0.01
    folder = tmp_path / "run" / "adapter"
    assert json.loads((folder / "adapter_config.json").read_text())["fan_in_fan_out"] is True
    assert torch.equal(logits(load_adapter(load(tmp_path / "base"), folder)), expected)
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), folder).eval()
    assert torch.equal(logits(plain), expected)


def test_dropout_that_cannot_be_keyed_is_refused_when_the_adapter_is_made(tmp_path: Path) -> None:
    model = load(tiny_llama(tmp_path))
    mlp = model.model.layers[0].mlp
    mlp.register_forward_pre_hook(lambda module, args: (args[0][:, :3],))
    mlp.register_forward_hook(lambda module, args, out: torch.zeros(2, 8, 64))
    with pytest.raises(ModelError, match=r"^dropout on model\.layers\.0\.mlp\..*; set method\.dropout: 0$"):
        attach(model, MethodSection(dropout=0.1), 1, say=print)


def test_full_trains_everything_in_fp32(tmp_path: Path) -> None:
    said: list[str] = []
    model = attach(load(tiny_llama(tmp_path, dtype=torch.bfloat16)), MethodSection(kind="full"), 1, say=said.append)
    assert said == [
        "weights turned from bf16 to fp32: those that train would lose small updates",
        "full: 110,912 of 110,912 parameters train (100.00 %)",
    ]
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert all(p.requires_grad for p in model.parameters())


def test_what_trains_is_fp32_on_a_bf16_base(tmp_path: Path) -> None:
    path = tiny_qwen2(tmp_path, dtype=torch.bfloat16)
    lora = attach(load(path), MethodSection(), 1, say=print)
    assert {p.dtype for p in lora.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in lora.parameters() if not p.requires_grad} == {torch.bfloat16}
    for method in (MethodSection(bias="all"), MethodSection(modules_to_save=["lm_head"])):
        said: list[str] = []
        model = attach(load(path), method, 1, say=said.append)
        assert said[0] == "weights turned from bf16 to fp32: those that train would lose small updates"
        assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_biases_train_as_asked(tmp_path: Path) -> None:
    path = tiny_qwen2(tmp_path)

    def biases(bias: Any) -> set[str]:
        model = attach(load(path), MethodSection(target=["q_proj"], bias=bias), 1, say=print)
        return {name.split("self_attn.")[1].split(".")[0] for name in trainable(model) if name.endswith("bias")}

    assert biases("none") == set()
    assert biases("lora_only") == {"q_proj"}
    assert biases("all") == {"q_proj", "k_proj", "v_proj"}


def test_a_tied_head_that_trains_is_said(tmp_path: Path) -> None:
    path = tiny_qwen2(tmp_path, tie_word_embeddings=True)
    said: list[str] = []
    attach(load(path), MethodSection(modules_to_save=["lm_head"]), 1, say=said.append)
    assert said[0] == "lm_head: tied to its twin in the base, trained apart from it here; a merge unties them"
    said.clear()
    attach(load(path), MethodSection(), 1, say=said.append)
    assert len(said) == 1


# -- saving and loading -------------------------------------------------------------------------------------------

METHODS: list[dict[str, Any]] = [
    {"dropout": 0.5},
    {"target": ["q_proj"], "bias": "all", "alpha": 32, "r": 2},
    {"target": ["q_proj", "lm_head"], "bias": "lora_only"},
    {"target": ["embed_tokens", "v_proj"]},
    {"modules_to_save": ["embed_tokens", "lm_head"]},
]


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_saved_and_loaded_it_is_the_same_model_also_for_plain_peft(tmp_path: Path, method: Any, tie: bool) -> None:
    path = tiny_qwen2(tmp_path / "base", tie_word_embeddings=tie)
    model = tuned(path, **method)
    save_adapter(model, tmp_path / "adapter", tiny_tokenizer())
    expected = logits(model)
    again = load_adapter(load(path), tmp_path / "adapter")
    assert torch.equal(logits(again), expected)
    assert not trainable(again)
    assert (expected - logits(load(path))).abs().max() > 0.1
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(path), tmp_path / "adapter").eval()
    assert torch.equal(logits(plain), expected)


def test_an_adapter_folder_says_where_its_base_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_llama(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    model = attach(load(Path("base")), MethodSection(alpha=16.0), 1, say=print, revision="v1.5")
    save_adapter(model, tmp_path / "adapter", tiny_tokenizer())
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "base")
    assert (config["revision"], config["inference_mode"], config["peft_type"]) == ("v1.5", True, "LORA")
    assert (config["r"], config["lora_alpha"], config["target_modules"]) == (8, 16, sorted(LINEAR))
    files = {file.name for file in (tmp_path / "adapter").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "chat_template.jinja"} <= files
    assert "README.md" not in files


def test_full_is_saved_as_a_plain_model(tmp_path: Path) -> None:
    model = tuned(tiny_llama(tmp_path / "base", dtype=torch.bfloat16), kind="full")
    save_adapter(model, tmp_path / "model", tiny_tokenizer())
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    assert again.dtype == torch.float32
    assert torch.equal(logits(again), logits(model))


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, Path]:
    """A base and an adapter for it."""
    base = tiny_llama(tmp_path / "base")
    save_adapter(tuned(base), tmp_path / "adapter")
    return base, tmp_path / "adapter"


def rewrite(adapter: Path, change: Any) -> None:
    tensors = load_file(adapter / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, adapter / "adapter_model.safetensors")


def refused(base: Path, adapter: Path, message: str) -> None:
    with pytest.raises(ModelError) as caught:
        load_adapter(load(base), adapter)
    assert str(caught.value).startswith(message.format(adapter=adapter, base=base)), str(caught.value)


def test_missing_unknown_and_misshapen_tensors_are_errors(saved: tuple[Path, Path]) -> None:
    base, adapter = saved
    key = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"
    rewrite(adapter, lambda tensors: tensors.update({key: torch.ones(96, 4)}))
    refused(base, adapter, "{adapter}: the adapter has another shape in " + key + " (1 of 28 tensors)")
    rewrite(adapter, lambda tensors: tensors.pop(key))
    refused(base, adapter, "{adapter}: the adapter lacks " + key + " (1 of 28 tensors)")
    rewrite(adapter, lambda tensors: tensors.update({key: torch.ones(96, 8), "other.weight": torch.ones(2)}))
    refused(base, adapter, "{adapter}: the adapter holds what the model has no place for: other.weight (1 of 28")


def test_an_adapter_of_another_model_is_refused(saved: tuple[Path, Path], tmp_path: Path) -> None:
    _, adapter = saved
    refused(tiny_llama(tmp_path / "wide", hidden_size=32), adapter, "{adapter}: the adapter has another shape in")
    refused(tiny_llama(tmp_path / "deep", num_hidden_layers=3), adapter, "{adapter}: the adapter lacks")
    config = adapter / "adapter_config.json"
    config.write_text(config.read_text().replace("_proj", "_elsewhere"))
    refused(saved[0], adapter, "{adapter}: it does not fit {base} (")


def test_an_adapter_without_effect_is_refused(saved: tuple[Path, Path]) -> None:
    base, adapter = saved
    rewrite(adapter, lambda tensors: [tensor.zero_() for key, tensor in tensors.items() if "lora_B" in key])
    refused(base, adapter, "{adapter}: the adapter has no effect: every B in it is zero")
    with pytest.raises(ModelError, match="no effect"):
        read_adapter(adapter)


def test_a_trained_copy_alone_is_an_effect(tmp_path: Path) -> None:
    base = tiny_llama(tmp_path / "base")
    model = attach(load(base), MethodSection(modules_to_save=["lm_head"]), 1, say=print)
    save_adapter(model, tmp_path / "adapter")
    load_adapter(load(base), tmp_path / "adapter")


def test_folders_that_are_no_adapter(saved: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = saved
    refused(base, tmp_path / "nowhere", "{adapter}: not an adapter folder (it has no adapter_config.json)")
    config = adapter / "adapter_config.json"
    config.write_text(config.read_text().replace('"LORA"', '"C3A"'))
    refused(base, adapter, "{adapter}: an adapter of type C3A; known are LORA, IA3, PROMPT_TUNING, PREFIX_TUNING, ")
    config.write_text(config.read_text().replace('"C3A"', '"LORA"'))
    (adapter / "adapter_model.safetensors").write_bytes(b"12345")
    refused(base, adapter, "{adapter}: its adapter_model.safetensors cannot be read (")


def test_an_adapter_that_the_base_already_contains_is_refused(saved: tuple[Path, Path]) -> None:
    base, adapter = saved
    note = {"adapter_sha256": "of another", "earlier": []}
    (base / "luthier_merge.json").write_text(json.dumps(note))
    load_adapter(load(base), adapter)
    for held in ({"adapter_sha256": adapter_hash(adapter)}, {"earlier": [adapter_hash(adapter)]}):
        (base / "luthier_merge.json").write_text(json.dumps(note | held))
        refused(base, adapter, "{base}: {adapter} is merged into it already and would count twice; use the")


def test_filling_goes_on_with_training(saved: tuple[Path, Path]) -> None:
    base, adapter = saved
    model = attach(load(base), MethodSection(), 99, say=print)
    names = trainable(model)
    fill_adapter(model, adapter)
    assert trainable(model) == names
    held = get_peft_model_state_dict(model, save_embedding_layers=False)
    assert all(torch.equal(held[key], tensor) for key, tensor in read_adapter(adapter).items())


def test_the_hash_is_of_the_tensors(saved: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = saved
    shutil.copytree(adapter, tmp_path / "copy")
    assert adapter_hash(tmp_path / "copy") == adapter_hash(adapter)
    rewrite(adapter, lambda tensors: next(iter(tensors.values())).add_(1))
    assert adapter_hash(tmp_path / "copy") != adapter_hash(adapter)
    assert len(adapter_hash(base)) == 64, "a whole model has one too"


# -- on and off ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_off_is_the_base_and_on_again_is_the_tuned_model(tmp_path: Path, method: Any) -> None:
    path = tiny_qwen2(tmp_path / "base", tie_word_embeddings=True)
    base = logits(load(path))
    training = tuned(path, **method)
    save_adapter(training, tmp_path / "adapter")
    for model in (training, load_adapter(load(path), tmp_path / "adapter")):
        before, names = logits(model), trainable(model)
        with adapter_off(model):
            assert torch.equal(logits(model), base)
        assert torch.equal(logits(model), before)
        assert trainable(model) == names
        assert not torch.equal(before, base)

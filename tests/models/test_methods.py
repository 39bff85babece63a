"""Every kind of method that adapts the model's own layers: the table, plain PEFT's eye on it, and what each changes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from transformers import AutoModelForCausalLM

from luthier.errors import ModelError
from luthier.methods import METHODS, takers, trains_base, whole
from luthier.models.adapters import attach, save_adapter
from luthier.models.load import load_model
from luthier.quiet import quiet
from luthier.rehearsal import bare_model
from luthier.sections import MethodSection, ModelSection
from rows import tiny
from tiny import moved, tiny_tokenizer

CPU = torch.device("cpu")
IDS = torch.tensor([[5, 9, 20, 31, 7, 14, 8, 6]])
FAMILIES = ["gemma", "gemma2", "glm", "llama", "mistral", "opt", "phi3", "qwen2", "qwen3", "yuan"]
LATER = ("prompt", "prefix", "p_tuning", "llama_adapter", "bottleneck")  # tried in files of their own
KINDS = [kind for kind in METHODS if kind not in LATER]
STARTS = ("pissa", "olora")


@pytest.fixture(autouse=True)
def _quiet() -> None:
    quiet()


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Folders of tiny models, by family and format."""
    made: dict[tuple[str, torch.dtype], Path] = {}

    def base(family: str, dtype: torch.dtype = torch.float32) -> Path:
        if (family, dtype) not in made:
            made[family, dtype] = folder = tmp_path_factory.mktemp(family)
            tiny(family).to(dtype).save_pretrained(folder)
            tiny_tokenizer().save_pretrained(folder)
        return made[family, dtype]

    return base


def load(path: Path, quantize: Any = "none") -> Any:
    return load_model(path, ModelSection(name="tiny", quantize=quantize), CPU, say=lambda line: None)


def attached(model: Any, say: Any = lambda line: None, **method: Any) -> Any:
    return attach(model, MethodSection(**method), 1, say=say)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(IDS).logits[0].float()


def trainable(model: Any) -> dict[str, torch.Tensor]:
    return {name: value for name, value in model.named_parameters() if value.requires_grad}


# -- the table --------------------------------------------------------------------------------------------------------


def test_the_table_and_the_recipe_have_the_same_kinds_and_fields() -> None:
    assert list(METHODS) == list(get_args(MethodSection.model_fields["kind"].annotation))
    fields = set(MethodSection.model_fields) - {"kind"}
    assert set().union(*(method.fields for method in METHODS.values())) == fields
    assert all(takers(field) for field in fields)
    for kind, method in METHODS.items():
        assert method.kind == kind and method.why and 0 < method.rate < 1
        assert method.merges == (kind not in LATER) and method.merges == (not method.reason)
    assert [kind for kind in METHODS if whole(kind)] == ["freeze", "full"]
    assert takers("virtual_tokens") == ["prompt", "prefix", "p_tuning", "llama_adapter"]
    assert trains_base(MethodSection(kind="ln_tuning")) and trains_base(MethodSection(bias="all"))
    assert not trains_base(MethodSection(kind="dora"))


# -- on the disk, and without numbers; tests/matrix has every kind train, come back, go on and be merged ---------------


@pytest.mark.parametrize(
    "kind",
    ["dora", "pissa", *(pytest.param(kind, marks=pytest.mark.full) for kind in ("rslora", "ia3", "oft", "ln_tuning"))],
)
def test_plain_peft_loads_what_was_saved(tmp_path: Path, bases: Callable[..., Path], kind: str) -> None:
    model = moved(attached(load(bases("qwen2")), kind=kind))
    save_adapter(model, tmp_path / "adapter")
    plain = AutoModelForCausalLM.from_pretrained(bases("qwen2"))
    theirs = PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()
    torch.testing.assert_close(logits(theirs), logits(model), rtol=0, atol=2e-5)
    torch.testing.assert_close(logits(theirs.merge_and_unload()), logits(model), rtol=0, atol=5e-4)


@pytest.mark.parametrize("held", [None, "int8", "nf4"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_model_without_numbers_can_be_asked_first(bases: Callable[..., Path], kind: str, held: Any) -> None:
    if held and (whole(kind) or (held == "nf4" and kind in ("loha", "lokr"))):
        return
    from luthier.models.quantize import quantization

    bare = bare_model(bases("llama"), torch.float32, quantized=quantization(held))
    assert trainable(attached(bare, kind=kind))


# -- PiSSA and OLoRA ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", STARTS)
def test_it_starts_from_parts_of_the_weight_and_leaves_the_base_alone(
    tmp_path: Path, bases: Callable[..., Path], kind: str
) -> None:
    said: list[str] = []
    plain = load(bases("llama"))
    model = attached(load(bases("llama")), said.append, kind=kind, r=4, alpha=8)
    assert said[-1] == f"{kind}: saved as LoRA r 8, its difference from the start, for the base as it is"
    for name, layer in model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        weight = plain.get_submodule(name.removeprefix("base_model.model.")).weight
        assert torch.equal(layer.get_base_layer().weight, weight)
        part = layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        u, sizes, v = torch.linalg.svd(weight)
        if kind == "pissa":
            torch.testing.assert_close(part, u[:, :4] * sizes[:4] @ v[:4], rtol=0, atol=1e-2 * sizes[0].item())
        else:
            q, upper = torch.linalg.qr(weight)
            torch.testing.assert_close(part, 2 * q[:, :4] @ upper[:4], rtol=0, atol=1e-5)
    moved(model)
    save_adapter(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["init_lora_weights"]) == (8, 16, True)


def test_more_parts_than_a_weight_has_are_refused(bases: Callable[..., Path]) -> None:
    with pytest.raises(ModelError) as caught:
        attached(load(bases("llama")), kind="pissa", r=17)
    assert str(caught.value) == (
        "method.r: 17 is more than a weight of model.layers.0.self_attn.k_proj has parts (16); lower it"
    )
    with pytest.raises(ModelError, match=r"^target: model\.embed_tokens: pissa starts from a linear layer's weight"):
        attached(load(bases("llama")), kind="pissa", target=["embed_tokens"])


# -- what each changes ------------------------------------------------------------------------------------------------

FED = {
    "gemma": ["q_proj", "v_proj", "down_proj"],
    "gemma2": ["q_proj", "v_proj", "down_proj"],
    "glm": ["k_proj", "v_proj", "down_proj"],
    "llama": ["k_proj", "v_proj", "down_proj"],
    "mistral": ["k_proj", "v_proj", "down_proj"],
    "opt": ["k_proj", "q_proj", "fc2"],
    "phi3": ["qkv_proj", "down_proj"],
    "qwen2": ["q_proj", "v_proj", "down_proj"],
    "qwen3": ["q_proj", "v_proj", "down_proj"],
    "yuan": ["k_proj", "v_proj", "down_proj"],
}


@pytest.mark.parametrize("family", FAMILIES)
def test_ia3_finds_its_layers_in_every_family(family: str) -> None:
    """PEFT's table knows seven of them; GLM, Phi-3 and Yuan2 are found by names and shapes."""
    model = attached(tiny(family), kind="ia3")
    found = {name.split(".ia3_l")[0].rpartition(".")[2]: value for name, value in trainable(model).items()}
    assert sorted(found) == sorted(FED[family])
    assert {name for name, value in found.items() if value.shape[0] == 1} == {FED[family][-1]}, "the input's factors"


def test_ia3_where_the_recipe_names_layers() -> None:
    model = attached(tiny("glm"), kind="ia3", target=["q_proj", "down_proj"])
    found = {name.split(".ia3_l")[0].rpartition(".")[2]: value.shape[0] for name, value in trainable(model).items()}
    assert found == {"q_proj": 32, "down_proj": 1}


@pytest.mark.parametrize("family", ["llama", "opt", "yuan"])
def test_freeze_trains_the_last_layers_alone(family: str) -> None:
    said: list[str] = []
    model = attached(tiny(family), said.append, kind="freeze", layers=1)
    assert {name.split("layers.")[1].split(".")[0] for name in trainable(model)} == {"1"}
    assert all(value.requires_grad for name, value in model.named_parameters() if "layers.1." in name)
    assert said[0].startswith("freeze: the last 1 of 2 layers train whole: ")
    with pytest.raises(ModelError, match=r"^method\.layers: 3 are more than the model has \(2\); lower it$"):
        attached(tiny(family), kind="freeze", layers=3)


@pytest.mark.parametrize("family", ["qwen3", "opt", "gemma2"])
def test_ln_tuning_trains_every_norm(family: str) -> None:
    model = tiny(family)
    norms = [name for name, module in model.named_modules() if "norm" in name.rpartition(".")[2]]
    adapted = attached(model, kind="ln_tuning")
    assert {name.split(".ln_tuning_layers")[0].removeprefix("base_model.model.") for name in trainable(adapted)} == set(
        norms
    )


def test_dora_over_bf16_has_magnitudes_in_fp32(bases: Callable[..., Path]) -> None:
    path = bases("llama", torch.bfloat16)
    model = attached(load(path), kind="dora")
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    wanted = layer.get_base_layer().weight.float().norm(dim=1)
    torch.testing.assert_close(layer.lora_magnitude_vector["default"].weight.detach(), wanted, rtol=1e-6, atol=0)


def test_what_has_no_tuned_default_says_so(bases: Callable[..., Path]) -> None:
    for kind, method in METHODS.items():
        if kind in LATER:
            assert method.tuned
            continue
        said: list[str] = []
        attached(tiny("llama"), said.append, kind=kind)
        assert any("no tuned default" in line for line in said) == (not method.tuned), said

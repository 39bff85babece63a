"""Layers in 8 and 4 bits: what they weigh, what they compute, and that nothing in a training process changes them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import numpy as np
import pytest
import torch
from torch import nn

from luthier.engine.loss import Head, summed_cross_entropy
from luthier.engine.proof import prove
from luthier.errors import ModelError
from luthier.models import quantize
from luthier.models.adapters import attach
from luthier.models.load import footprint, from_folder, load_model
from luthier.sections import MethodSection, ModelSection, Quantization, TrainSection
from rows import fit, lora, random_rows, tiny, trained
from tiny import tiny_qwen2

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT asks so

CPU = torch.device("cpu")
KINDS = {
    "int8": Quantization(kind="int8"),
    "nf4": Quantization(),
    "double": Quantization(double_quant=True),
}
each_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Qwen2 of the engine's tests: its widths of 32 and 48 are no multiples of a block of 64."""
    path = tmp_path_factory.mktemp("qwen2")
    tiny("qwen2").save_pretrained(path)
    return path


def quantised(folder: Path, kind: str, dtype: torch.dtype = torch.float32) -> Any:
    return from_folder(folder, dtype, CPU, quantized=KINDS[kind])[0]


def layers(model: nn.Module) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if quantize.is_quantised(module)}


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: quantize.dequantised(module, torch.float32) for name, module in layers(model).items()}


# -- what is loaded ----------------------------------------------------------------------------------------------------


@each_kind
def test_the_footprint_is_the_arithmetic_of_the_parameters(tmp_path: Path, kind: str) -> None:
    """Linear layers but the head; all else in bf16. int8: a byte and fp32 a row; NF4: half a byte and fp32 for each 64,
    or for each 64 a byte, for each 256 of those fp32, and an offset; the 16 codes of 4 bits, the 256 of 8."""
    path = tiny_qwen2(tmp_path, dtype=torch.bfloat16, intermediate_size=1024)
    plain, model = from_folder(path, torch.bfloat16, CPU)[0], quantised(path, kind, torch.bfloat16)
    shapes = {name: module.weight.shape for name, module in plain.named_modules() if isinstance(module, nn.Linear)}
    assert layers(model).keys() == shapes.keys() - {"lm_head"}
    held = 0
    for name in layers(model):
        rows, columns = shapes[name]
        blocks = math.ceil(rows * columns / 64)
        held += {
            "int8": rows * columns + 4 * rows,
            "nf4": rows * columns // 2 + 4 * blocks + 4 * 16,
            "double": rows * columns // 2 + blocks + 4 * math.ceil(blocks / 256) + 4 + 4 * 16 + 4 * 256,
        }[kind]
    count = sum(parameter.numel() for parameter in plain.parameters())
    other = 2 * (count - sum(shapes[name].numel() for name in layers(model)))
    assert quantize.bytes_of(list(model.parameters())) == held + other
    form = "int8" if kind == "int8" else "nf4"
    assert footprint(model) == (f"{(held + other) / 2**10:.1f} KiB of weights (bf16, {form}), {count:,} parameters")
    said: list[str] = []
    adapters = 4 * sum(sum(shapes[name]) for name in layers(model))
    attach(model, MethodSection(r=4), 0, say=said.append)
    assert f": {adapters:,} of {count + adapters:,} parameters train" in said[0]


@pytest.mark.parametrize("tied", [False, True])
def test_head_embeddings_and_norms_keep_their_format(tmp_path: Path, tied: bool) -> None:
    model = quantised(tiny_qwen2(tmp_path, tie_word_embeddings=tied), "int8")
    assert type(model.get_output_embeddings()) is nn.Linear
    assert {name for name, value in model.named_parameters() if value.dtype != torch.float32} == {
        f"{name}.weight" for name in layers(model)
    }


def test_the_compute_dtype_is_said_and_fp16_is_bf16_on_a_cpu(folder: Path) -> None:
    said: list[str] = []
    section = ModelSection(name="m", quantize=Quantization(double_quant=True, compute_dtype="fp16"))
    model = load_model(folder, section, CPU, say=said.append)
    assert said[1] == (
        "m: linear layers in nf4, double quantisation, computed in bf16 (fp16 as the recipe says, but a CPU computes "
        "in bf16); the head is not quantised"
    )
    layer, x = model.model.layers[0].mlp.up_proj, torch.randn(3, 32)
    expected = x.bfloat16() @ quantize.dequantised(layer, torch.bfloat16).T
    assert torch.equal(layer(x), expected.float())
    load_model(folder, ModelSection(name="m", quantize="int8"), CPU, say=said.append)
    assert said[3] == "m: linear layers in int8, computed as the rest of the model; the head is not quantised"


def test_without_bitsandbytes_one_line_says_what_to_install(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModelError) as error:
        load_model(folder, ModelSection(name="m", quantize="nf4"), CPU, say=print)
    assert str(error.value) == ("quantize: nf4 needs bitsandbytes, which is not installed: pip install luthier[quant]")


# -- what is computed --------------------------------------------------------------------------------------------------


@each_kind
@pytest.mark.parametrize("training", [True, False])
def test_a_layer_is_its_dequantised_weight_forward_and_backward(folder: Path, kind: str, training: bool) -> None:
    layer: Any = quantised(folder, kind).model.layers[0].self_attn.q_proj.train(training)
    weight = quantize.dequantised(layer, torch.float32)
    twin = nn.Linear(32, 32).requires_grad_(False)
    twin.weight.data, twin.bias.data = weight, layer.bias.data
    x = torch.randn(2, 5, 32, requires_grad=True)
    y = torch.randn(2, 5, 32)
    results = []
    for module in (layer, twin):
        out = module(x)
        results.append((out, torch.autograd.grad((out * y).sum(), x)[0]))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_nf4_is_what_bitsandbytes_computes_in_training(tmp_path: Path) -> None:
    path = tiny_qwen2(tmp_path, dtype=torch.bfloat16, intermediate_size=128)
    for kind in ("nf4", "double"):
        layer: Any = quantised(path, kind, torch.bfloat16).model.layers[0].self_attn.q_proj
        x = torch.randn(3, 64, dtype=torch.bfloat16, requires_grad=True)
        theirs = bnb.matmul_4bit(x, layer.weight, layer.weight.quant_state, bias=layer.bias)
        assert torch.equal(layer(x), theirs)


@each_kind
def test_a_weight_is_near_the_one_that_it_stands_for(folder: Path, kind: str) -> None:
    """int8: half a step, and what bitsandbytes loses where it takes the weight for fp16. NF4: half the widest gap of
    its codes; the widths of 32 and 48, where blocks go on in the next row, bitsandbytes' own CPU kernel gets wrong."""
    plain = from_folder(folder, torch.float32, CPU)[0]
    for name, weight in weights(quantised(folder, kind)).items():
        original = plain.get_submodule(name).weight.data
        if kind == "int8":
            bound = (0.5 + 127 * 2**-11) / 127 * original.abs().amax(1, keepdim=True)
        else:
            largest = original.reshape(-1, 64).abs().amax(1, keepdim=True)
            bound = (0.155 * largest + (0.02 if kind == "double" else 0)).expand(-1, 64).reshape(original.shape)
        assert ((weight - original).abs() <= bound).all(), name


@each_kind
def test_under_autocast_a_layer_computes_as_others_do(folder: Path, kind: str) -> None:
    layer: Any = quantised(folder, kind).model.layers[0].mlp.up_proj
    x = torch.randn(3, 32, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
    assert torch.equal(out, x.bfloat16() @ quantize.dequantised(layer, torch.bfloat16).T)
    assert torch.autograd.grad(out.sum(), x)[0].dtype == torch.float32


@each_kind
def test_packed_is_padded_is_alone(folder: Path, kind: str) -> None:
    """LLM.int8 would fail here: its outlier columns are chosen over all rows of a pass."""
    model = lora(quantised(folder, kind))
    found = prove(model, random_rows(6), np.arange(4), pad_id=0, device=CPU, autocast=None, seed=None, gradients=True)
    assert found.route == "engine", found.lines
    assert found.record["tried"]["engine"]["difference"] < 1e-5


@pytest.mark.parametrize("kind", ["int8", "double"])
def test_neither_cuts_nor_evaluations_change_a_run(tmp_path: Path, folder: Path, kind: str) -> None:
    """Rows pass by pass, all in one, and all in one with an evaluation before and after every step."""
    ends = []
    before = weights(quantised(folder, kind))
    for name, tokens, held_out in (("rows", 1, None), ("one", 9999, None), ("evaluated", 9999, random_rows(2, seed=9))):
        model = lora(quantised(folder, kind))
        section = TrainSection(batch=4, steps=3, lr=1e-2, eval_every=1, tokens_per_pass=tokens)
        losses = fit(tmp_path / name, model, random_rows(8), section, eval_rows=held_out, proof=False).losses
        ends.append((losses, trained(model)))
        after = weights(model.get_base_model())
        assert all(torch.equal(after[f"{layer}.base_layer"], value) for layer, value in before.items())
    by_rows, in_one, evaluated = ends
    assert by_rows[0] == pytest.approx(in_one[0], rel=1e-5) and in_one[0][-1] < in_one[0][0]
    assert evaluated[0] == in_one[0]
    assert all(torch.equal(value, in_one[1][name]) for name, value in evaluated[1].items())


def test_not_even_bitsandbytes_own_forward_repacks_the_weights(folder: Path) -> None:
    model = quantised(folder, "double").eval()
    before = weights(model)
    with torch.no_grad():
        for module in layers(model).values():
            type(module).forward(module, torch.randn(1, module.in_features))
    assert all(torch.equal(before[name], value) for name, value in weights(model).items())


@each_kind
def test_a_quantised_head_takes_the_plain_way_through_the_loss(folder: Path, kind: str) -> None:
    head: Any = quantised(folder, kind).model.layers[0].mlp.up_proj
    twin = nn.Linear(32, 48, bias=False).requires_grad_(False)
    twin.weight.data = quantize.dequantised(head, torch.float32)
    hidden, targets = torch.randn(7, 32, requires_grad=True), torch.arange(7)
    found = [summed_cross_entropy(hidden, targets, Head(module)) for module in (head, twin)]
    gradients = [torch.autograd.grad(loss, hidden)[0] for loss in found]
    assert found[0].item() == pytest.approx(found[1].item(), rel=1e-6)
    assert (gradients[0] - gradients[1]).abs().max() < 1e-6


# -- what may train ----------------------------------------------------------------------------------------------------


def test_a_quantised_layer_is_not_trained_whole(folder: Path) -> None:
    with pytest.raises(ModelError) as error:
        attach(quantised(folder, "nf4"), MethodSection(modules_to_save=["o_proj"]), 0, say=print)
    assert str(error.value) == (
        "modules_to_save: o_proj: model.layers.0.self_attn.o_proj is quantised and cannot be trained whole; give it an "
        "adapter (method.target), or set model.quantize: none"
    )


@each_kind
def test_the_head_trains_whole_in_fp32_beside_quantised_layers(tmp_path: Path, folder: Path, kind: str) -> None:
    said: list[str] = []
    model = quantised(folder, kind, torch.bfloat16)
    adapted = attach(model, MethodSection(modules_to_save=["lm_head"]), 0, say=said.append)
    assert said[0] == "weights turned from bf16 to fp32: those that train would lose small updates"
    assert {quantize.format_of(value) for value in adapted.parameters()} == {"fp32", kind if kind == "int8" else "nf4"}
    section = TrainSection(batch=4, steps=4, lr=1e-2, precision="bf16")
    losses = fit(tmp_path, adapted, random_rows(12), section).losses
    assert losses[-1] < losses[0]


def test_a_model_that_is_let_go_holds_nothing(folder: Path) -> None:
    for kind in KINDS:
        model = attach(quantised(folder, kind), MethodSection(), 0, say=print)
        quantize.let_go(model)
        assert {value.device.type for value in model.parameters()} == {"meta"} and not layers(model)


def test_words_and_keys_say_the_same() -> None:
    assert quantize.quantization("none") is quantize.quantization(None) is None
    assert quantize.quantization("nf4") == Quantization(kind="nf4", double_quant=False)
    assert quantize.quantization(KINDS["double"]) is KINDS["double"]

"""Products of 16-bit weights in fp32: what does them so, how near they are, and what they leave behind."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from luthier.data.pack import pack
from luthier.engine import products
from luthier.engine.dropout import keyed
from luthier.engine.forward import SummedLoss, adopt, on_device
from luthier.engine.products import FEWEST, IN_FP32, fp32_products
from luthier.engine.rungs import rungs
from luthier.sections import EngineSection
from luthier.training.start import recompute_activations
from rows import lora, random_rows, tiny

ROWS = random_rows(6, seed=5, longest=24)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def a_processor_that_does(monkeypatch):
    monkeypatch.setattr(products, "faster", lambda: True)
    monkeypatch.setattr(products, "FEWEST", 8)


@pytest.mark.parametrize(
    ("processor", "answer"),
    [
        ({"architecture": "x86_64", "cpu_name": "Intel Xeon", "avx512_bf16": True, "amx_bf16": False}, True),
        ({"architecture": "x86_64", "cpu_name": "Intel Xeon", "avx512_bf16": True, "amx_bf16": True}, False),
        ({"architecture": "x86_64", "cpu_name": "AMD EPYC", "avx512_bf16": True}, False),
        ({"architecture": "x86_64", "cpu_name": "AMD Ryzen", "avx512_bf16": False, "avx2": True}, True),
        ({"architecture": "aarch64", "cpu_name": "Neoverse", "bf16": True}, False),
    ],
    ids=["Intel", "Intel with AMX", "AMD with bf16", "AMD without", "ARM"],
)
def test_which_processors_multiply_fp32_faster(monkeypatch, processor, answer):
    monkeypatch.undo()
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: processor)
    assert products.faster.__wrapped__() is answer


def layer(rows=70, columns=33, dtype=torch.bfloat16, bias=True):
    generator = torch.Generator().manual_seed(rows)
    made = nn.Linear(columns, rows, bias=bias).requires_grad_(False)
    for weight in made.parameters():
        weight.copy_(torch.randn(weight.shape, generator=generator))
    return made.to(dtype)


@pytest.mark.parametrize("part", [1 << 22, 33 * 16], ids=["at once", "by parts"])
@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_rounds_once(monkeypatch, part, bias):
    monkeypatch.setattr(products, "PART", part)
    of = layer(bias=bias)
    x = torch.randn(2, 9, 33, generator=torch.Generator().manual_seed(1)).bfloat16().requires_grad_()
    g = torch.randn(2, 9, 70, generator=torch.Generator().manual_seed(2)).bfloat16()
    with fp32_products(of) as any_do:
        y = of(x)
        y.backward(g)
    true = x.detach().double() @ of.weight.double().t() + (of.bias.double() if bias else 0)
    assert any_do and y.dtype == x.grad.dtype == torch.bfloat16
    for found, exact in ((y, true), (x.grad, g.double() @ of.weight.double())):
        assert torch.isclose(found.double(), exact, rtol=1.01 * 2**-8, atol=1e-5).all()


def gradients(model, asked, seed=None):
    part = on_device(pack(ROWS, range(6)), CPU, seed)
    model.zero_grad()
    with keyed(model, 3), rungs(model, EngineSection(fp32_products=asked)) as said:
        loss = SummedLoss(model.train(), "engine")(part)
        loss.backward()
    return loss.item(), torch.cat([w.grad.flatten() for w in model.parameters() if w.requires_grad]), said


def of_16_bits(family="llama", dropout=0.0, without=None):
    model = lora(tiny(family), init_lora_weights=False, lora_dropout=dropout, exclude_modules=without)
    for name, value in model.named_parameters():
        if ".lora_" not in name:
            value.data = value.data.bfloat16()
    adopt(model)
    return model


@pytest.mark.parametrize("dropout", [0.0, 0.2], ids=["no dropout", "dropout"])
@pytest.mark.parametrize("without", [None, r".*\.1\..*"], ids=["all adapted", "half adapted"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "opt", "phi3"])
def test_a_model_is_as_near_to_its_twin_of_32_bits(family, without, dropout):
    model, seed = of_16_bits(family, dropout, without), 7 if dropout else None
    loss, plain, _ = gradients(model, False, seed)
    other, wide, said = gradients(model, True, seed)
    assert "16-bit layers multiplied in fp32" in said[0]
    truth, exact, said = gradients(model.float(), True, seed)
    assert said and "16-bit" not in said[0]
    assert abs(other - truth) < 5e-3 * truth
    assert (wide - exact).norm() < 1.3 * (plain - exact).norm() < 0.1 * exact.norm()
    assert not torch.equal(wide, plain)


def test_activation_checkpointing_computes_the_same_again():
    model = of_16_bits(dropout=0.2)
    loss, expected, _ = gradients(model, True, 7)
    recompute_activations(model)
    again, found, _ = gradients(model, True, 7)
    assert again == loss and torch.equal(found, expected)


def test_nothing_of_32_bits_is_kept_for_the_backward(monkeypatch):
    model, kept = of_16_bits(), {}
    weights = {value.untyped_storage().data_ptr() for value in model.parameters()}

    def pack_hook(tensor):
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    part, sizes = on_device(pack(ROWS, range(6)), CPU), []
    for asked in (False, True):
        kept.clear()
        with (
            rungs(model.train(), EngineSection(fp32_products=asked)),
            torch.autograd.graph.saved_tensors_hooks(pack_hook, lambda tensor: tensor),
        ):
            loss = SummedLoss(model, "engine")(part)
        low = sum(t.nbytes for t in kept.values() if t.shape[-1] == 4)  # what is r wide may be
        sizes.append(sum(t.nbytes for t in kept.values()) - low)
        del loss
    assert sizes[1] <= sizes[0]


def test_few_tokens_trained_weights_and_other_formats_stay_as_they_are(monkeypatch):
    monkeypatch.setattr(products, "FEWEST", FEWEST)
    of, wide = layer(), layer(dtype=torch.float32)
    trained = layer().requires_grad_(True)
    few, many = (torch.randn(n, 33).bfloat16().requires_grad_() for n in (FEWEST - 1, FEWEST))
    with fp32_products(nn.ModuleList([of, wide, trained])):
        assert of in IN_FP32 and wide not in IN_FP32 and trained not in IN_FP32
        assert type(of(few).grad_fn).__name__ != "_ProductBackward" == type(of(many).grad_fn).__name__
        assert not any("forward" in vars(each) for each in (wide, trained))
    assert of not in IN_FP32 and "forward" not in vars(of)


def test_switched_off_nothing_is_widened():
    model = of_16_bits()
    with rungs(model, EngineSection(fp32_products=False)) as said:
        assert not IN_FP32 and "16-bit" not in said[0]
    with rungs(model, EngineSection()) as said:
        assert IN_FP32 and "16-bit" in said[0]

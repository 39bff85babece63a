"""Fused LoRA layers against PEFT's own, number by number."""

from __future__ import annotations

import warnings
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from luthier.data.pack import pack
from luthier.engine.again import Again, again
from luthier.engine.dropout import keyed
from luthier.engine.forward import SummedLoss, adopt, on_device
from luthier.engine.lora import FOUND, fused_lora
from luthier.engine.rungs import rungs
from luthier.sections import EngineSection
from luthier.training.start import recompute_activations
from rows import lora, random_rows, tiny

ROWS = random_rows(6, seed=5, longest=24)
CPU = torch.device("cpu")
FAMILIES = ("llama", "qwen2", "gemma", "gemma2", "opt", "glm", "phi3", "mistral", "yuan")


def gradients(model, fused, *, seed=None, autocast=None):
    """Loss and gradients of the rows in one pass, fused or by PEFT's own layers."""
    part = on_device(pack(ROWS, range(6)), CPU, seed)
    model.zero_grad()
    with (
        keyed(model, 3),
        fused_lora(model) if fused else nullcontext(),
        torch.autocast("cpu", autocast, autocast is not None),
    ):
        loss = SummedLoss(model.train(), "engine")(part)
        loss.backward()
    return loss.item(), {name: value.grad.clone() for name, value in model.named_parameters() if value.requires_grad}


def furthest(found, expected):
    """The largest difference of a gradient by its norm; what is nothing by nature (a key's bias) by the largest's."""
    floor = 1e-2 * max(value.norm() for value in expected.values())
    return max(((found[name] - value).norm() / max(value.norm(), floor)).item() for name, value in expected.items())


@pytest.mark.parametrize("seed", [None, 7], ids=["no dropout", "dropout"])
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_those_of_pefts_own_layers(family, seed):
    model = lora(tiny(family), init_lora_weights=False, lora_dropout=0.0 if seed is None else 0.2)
    adopt(model)
    loss, expected = gradients(model, False, seed=seed)
    other, found = gradients(model, True, seed=seed)
    assert other == pytest.approx(loss, rel=1e-6)
    assert furthest(found, expected) < 5e-6
    if seed is not None:
        assert furthest(gradients(model, True, seed=8)[1], expected) > 1e-2  # dropout does something


@pytest.mark.parametrize(
    ("family", "inputs"),
    [
        ("llama", {("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)}),
        ("yuan", {("q_proj", "k_proj"), ("v_proj",), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)}),
        ("phi3", {("qkv_proj",), ("o_proj",), ("gate_up_proj",), ("down_proj",)}),
    ],
)
def test_layers_that_read_the_same_input_are_found_by_a_look(family, inputs):
    """Yuan's value reads the states themselves, its query and key the filtered ones."""
    model = lora(tiny(family))
    with fused_lora(model) as said:
        assert said == [f"{2 * sum(map(len, inputs))} LoRA layers fused into {2 * len(inputs)}"]
    assert {tuple(sorted(n.rpartition(".")[2] for n in names)) for names in FOUND[model]} == {
        tuple(sorted(names)) for names in inputs
    }


@pytest.mark.parametrize("seed", [None, 7], ids=["no dropout", "dropout"])
def test_with_activation_checkpointing_the_same(seed):
    model = lora(tiny("qwen2"), init_lora_weights=False, lora_dropout=0.0 if seed is None else 0.2)
    adopt(model)
    loss, expected = gradients(model, True, seed=seed)
    recompute_activations(model)
    other, found = gradients(model, True, seed=seed)
    assert other == loss and furthest(found, expected) < 1e-6


@pytest.mark.parametrize("autocast", [False, True], ids=["bf16 weights", "autocast"])
def test_in_bf16_it_is_as_near_to_the_truth_as_pefts_own(autocast):
    model = lora(tiny("llama"), init_lora_weights=False)
    for name, value in model.named_parameters():
        if ".lora_B" in name:  # what is learnt is less than what was there
            value.data.mul_(0.3)
    adopt(model)
    _, truth = gradients(model, False)
    if not autocast:
        for name, value in model.named_parameters():
            if ".lora_" not in name:
                value.data = value.data.bfloat16()
    dtype = torch.bfloat16 if autocast else None
    _, theirs = gradients(model, False, autocast=dtype)
    _, ours = gradients(model, True, autocast=dtype)
    assert all(value.dtype == torch.float32 for value in ours.values())
    assert furthest(ours, truth) < 1.5 * furthest(theirs, truth) < 0.2


def test_a_small_update_arrives_whole_in_bf16():
    """A first step moves B by about its rate: most of what that does to a product is below half a step of it in bf16.
    PEFT's order of sums rounds before the update is added, and loses half of it or more."""
    model = lora(tiny("qwen2"), init_lora_weights=False).eval()
    for name, value in model.named_parameters():
        value.data = value.data if ".lora_" in name else value.data.bfloat16()
    generator = torch.Generator().manual_seed(1)
    arrived = {}
    for name in ("q_proj", "o_proj"):  # with a bias, and without
        layer = model.get_submodule(f"base_model.model.model.layers.0.self_attn.{name}")
        base, scale = layer.get_base_layer(), layer.scaling["default"]
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        b.data = 1e-4 * torch.randn(b.shape, generator=generator).sign()
        x = torch.randn(2000, base.in_features, generator=generator).bfloat16()
        with torch.no_grad():
            update = scale * (x.double() @ a.double().t()) @ b.double().t()
            assert update.abs().mean() < 2**-10 * base(x).abs().mean()
            for fused in (False, True):
                with fused_lora(model) if fused else nullcontext():
                    moved = layer(x).double() - base(x).double()
                arrived[name, fused] = ((moved * update).sum() / update.square().sum()).item()
    assert 0.9 < arrived["q_proj", True] < 1.1 and 0.9 < arrived["o_proj", True] < 1.1, arrived
    assert arrived["q_proj", False] < 0.8 and arrived["o_proj", False] < 0.8, arrived


def test_it_keeps_the_input_once_and_not_in_the_adapters_format():
    model = lora(tiny("llama"), init_lora_weights=False).bfloat16()
    for name, value in model.named_parameters():
        if ".lora_" in name:
            value.data = value.data.float()
    adopt(model)
    part, kept = on_device(pack(ROWS, range(6)), CPU), []
    weights = {value.untyped_storage().data_ptr() for value in model.parameters()}
    for fused in (nullcontext(), fused_lora(model)):
        storages = {}

        def pack_hook(tensor, storages=storages):
            if tensor.untyped_storage().data_ptr() not in weights:
                storages[tensor.untyped_storage().data_ptr()] = (tensor.untyped_storage().nbytes(), tensor)
            return tensor

        with fused, torch.autograd.graph.saved_tensors_hooks(pack_hook, lambda tensor: tensor):
            loss = SummedLoss(model.train(), "engine")(part)
        kept.append(sum(size for size, _ in storages.values()))
        del loss
    assert kept[1] < 0.8 * kept[0]


def test_the_adapters_numbers_are_taken_anew_for_every_pass():
    """Also where they moved without autograd knowing, as under 8-bit optimizers."""
    model = lora(tiny("llama"), init_lora_weights=False)
    adopt(model)
    part = on_device(pack(ROWS, range(6)), CPU)
    with torch.no_grad(), fused_lora(model):
        before = SummedLoss(model, "engine")(part).item()
        for name, value in model.named_parameters():
            if "lora_B" in name:
                value.data.mul_(-1)
        after = SummedLoss(model, "engine")(part).item()
    with torch.no_grad():
        assert after == pytest.approx(SummedLoss(model, "engine")(part).item(), rel=1e-6) != before


def test_outside_nothing_of_it_is_left_and_switched_off_it_is_the_base():
    model = lora(tiny("llama"), init_lora_weights=False).eval()
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        theirs = model(ids).logits
        with model.disable_adapter():
            base = model(ids).logits
        with fused_lora(model):
            torch.testing.assert_close(model(ids).logits, theirs)
            with model.disable_adapter():
                assert torch.equal(model(ids).logits, base)
            longer = model.generate(input_ids=ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
        assert torch.equal(longer, model.generate(input_ids=ids, max_new_tokens=8, do_sample=False, pad_token_id=0))
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"use_dora": True}, "a variant of LoRA"),
        ({"init_lora_weights": "pissa"}, "it starts from another base (pissa)"),
        ({"modules_to_save": ["lm_head"]}, "whole layers train beside it (modules_to_save)"),
        ({"bias": "all"}, "weights or biases of the base train"),
        ({"lora_bias": True}, "weights or biases of the base train"),
    ],
)
def test_what_is_not_on_the_list_keeps_pefts_path(settings, reason):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        target = ["q_proj", "v_proj"]
        model = get_peft_model(tiny("qwen2"), LoraConfig(r=4, target_modules=target, **settings))
    with fused_lora(model) as said:
        assert said == ["no LoRA layer is fused", f"LoRA by PEFT's own layers: {reason}"]
        assert not any("forward" in vars(module) for module in model.modules())


def test_several_active_adapters_keep_pefts_path():
    model = lora(tiny("llama"))
    model.add_adapter("other", LoraConfig(r=4, target_modules=["q_proj"]))
    model.base_model.set_adapter(["default", "other"])
    with fused_lora(model) as said:
        assert "LoRA by PEFT's own layers: several adapters are active, or none" in said


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_over_quantised_layers(kind, tmp_path):
    pytest.importorskip("bitsandbytes")
    from luthier.models.load import load_model
    from luthier.sections import ModelSection
    from tiny import tiny_llama

    base = load_model(tiny_llama(tmp_path / "m"), ModelSection(name="m", quantize=kind), CPU, say=lambda line: None)
    model = lora(base, init_lora_weights=False)
    adopt(model)
    loss, expected = gradients(model, False)
    with fused_lora(model) as said:
        assert said == ["14 LoRA layers fused into 8"]
    other, found = gradients(model, True)
    assert other == pytest.approx(loss, rel=1e-5)
    assert furthest(found, expected) < 1e-5


def test_rows_of_any_length_and_none_that_is_taught():
    model = lora(tiny("llama"), init_lora_weights=False)
    adopt(model)
    part = pack(ROWS, [0])
    nothing = on_device(
        part.__class__(**{**vars(part), "places": np.zeros(0, np.int64), "targets": np.zeros(0, np.int64)}), CPU
    )
    with fused_lora(model):
        SummedLoss(model, "engine")(nothing).backward()
    assert all(not value.grad.any() for value in model.parameters() if value.requires_grad)


@pytest.mark.parametrize("seed", [None, 7], ids=["no dropout", "dropout"])
@pytest.mark.parametrize("family", ["llama", "gemma", "phi3", "yuan"])
def test_what_norms_and_products_give_is_made_again_instead_of_kept(family, seed, monkeypatch):
    model = lora(tiny(family), init_lora_weights=False, lora_dropout=0.0 if seed is None else 0.2)
    adopt(model)
    part, kept, found = on_device(pack(ROWS, range(6)), CPU, seed), [], []
    for makes in (lambda result: Again(lambda x: x, (result,), 0), again):
        monkeypatch.setattr("luthier.engine.lora.again", makes)
        model.zero_grad()
        storages = {}

        def pack_hook(tensor, storages=storages):
            storages[tensor.untyped_storage().data_ptr()] = (tensor.untyped_storage().nbytes(), tensor)
            return tensor

        with keyed(model, 3), rungs(model.train(), EngineSection()):
            with torch.autograd.graph.saved_tensors_hooks(pack_hook, lambda tensor: tensor):
                loss = SummedLoss(model, "engine")(part)
            kept.append(sum(size for size, _ in storages.values()))
            loss.backward()
        found.append(torch.cat([value.grad.flatten() for value in model.parameters() if value.requires_grad]))
    tokens, config = part.ids.numel(), model.config
    spared = 4 * config.num_hidden_layers * tokens * (config.intermediate_size + config.hidden_size)
    assert torch.equal(found[0], found[1]) and kept[0] - kept[1] >= spared

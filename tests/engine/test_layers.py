"""Fused norms and feed-forwards against the modules' own, and both against fp64."""

from __future__ import annotations

import copy
from collections import Counter
from functools import partial

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaConfig, LlamaMLP, LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm
from transformers.models.phi3.modeling_phi3 import Phi3MLP

from luthier.engine import dropout, layers
from luthier.engine.layers import fused_layers
from luthier.models.yuan2 import YuanMLP
from rows import VOCABULARY, lora, tiny

FAMILIES = {
    "llama": {"LlamaRMSNorm": 5, "LlamaMLP": 2},
    "qwen2": {"Qwen2RMSNorm": 5, "Qwen2MLP": 2},
    "qwen3": {"Qwen3RMSNorm": 9, "Qwen3MLP": 2},  # a norm of query and key in each layer
    "mistral": {"MistralRMSNorm": 5, "MistralMLP": 2},
    "gemma": {"GemmaRMSNorm": 5, "GemmaMLP": 2},
    "gemma2": {"Gemma2RMSNorm": 9, "Gemma2MLP": 2},
    "glm": {"GlmRMSNorm": 5, "GlmMLP": 2},
    "phi3": {"Phi3RMSNorm": 5, "Phi3MLP": 2},
    "yuan": {"LlamaRMSNorm": 7, "YuanMLP": 2},
    "opt": {},
}
IDS = torch.randint(3, VOCABULARY, (3, 17), generator=torch.Generator().manual_seed(2))


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """Five rows of 32 columns: the last piece of 51 rows is smaller."""
    monkeypatch.setattr(dropout, "PIECE", 5 * 32)


def results(model):
    """The loss, and the gradients of all that trains, by name."""
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    loss = F.cross_entropy(model(IDS).logits[:, :-1].flatten(0, 1).float(), IDS[:, 1:].flatten())
    return {"loss": loss.detach(), **dict(zip(trained, torch.autograd.grad(loss, trained.values()), strict=True))}


def distance(mine, true):
    """The largest of all, relative in the Euclidean norm."""
    assert mine.keys() == true.keys()
    return max(
        ((mine[name].double() - true[name].double()).norm() / true[name].double().norm()).item() for name in true
    )


# Whole models, every parameter trained


@pytest.mark.parametrize("family", FAMILIES)
def test_every_gradient_of_a_family_is_as_without(family):
    model = tiny(family)
    plain = results(model)
    with fused_layers(model) as fused:
        assert fused == Counter(FAMILIES[family])
        mine = results(model)
    assert mine["loss"].equal(plain["loss"])
    assert distance(mine, plain) < 1e-6 * (1 + 4 * bool(fused))
    assert not any("forward" in vars(module) for module in model.modules())
    again = results(model)
    assert all(again[name].equal(plain[name]) for name in plain)


@pytest.mark.parametrize("family", ["llama", "gemma2", "glm", "qwen3"])
def test_in_bf16_with_checkpoints_and_adapters(family):
    """The forward is the same to the bit; the gradients differ where the norms' are rounded less often."""
    model = lora(tiny(family).bfloat16(), init_lora_weights=False)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad or "norm" in name)
    true = results(copy.deepcopy(model).double())
    plain = results(model)
    model.get_base_model().activation_checkpointing_enable({"use_reentrant": False})
    model.train()
    with fused_layers(model):
        mine = results(model)
    assert mine["loss"].equal(plain["loss"])
    assert distance(mine, true) < 1.5 * distance(plain, true)


def test_autocast_gives_the_same():
    model = tiny("qwen3")
    found = []
    for context in (lambda model: fused_layers(nn.Module()), fused_layers):
        with context(model), torch.autocast("cpu", torch.bfloat16):
            found.append(results(model))
    assert found[1]["loss"].equal(found[0]["loss"])
    assert distance(found[1], results(model)) < 1.1 * distance(found[0], results(model))


def test_generation_with_a_cache():
    model = tiny("qwen3").eval()
    ask = partial(model.generate, IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=6, do_sample=False)
    plain = ask(pad_token_id=0)
    with fused_layers(model):
        assert ask(pad_token_id=0).equal(plain)


# Each layer

NORMS = {"llama": LlamaRMSNorm, "gemma": GemmaRMSNorm, "olmo": Olmo2RMSNorm}
FORMATS = [(torch.float32,) * 2, (torch.bfloat16,) * 2, (torch.float32, torch.bfloat16)]


def feed_forward(kind, act):
    config = LlamaConfig(hidden_size=32, intermediate_size=48, hidden_act=act)
    config.resid_pdrop = 0.0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return kind(config)


def norm(kind, dtype):
    module = kind(32, eps=1e-3)
    module.weight.data = torch.randn(32, generator=torch.Generator().manual_seed(5))
    return module.to(dtype)


def backward(module, x):
    x = x.clone().requires_grad_()
    wanted = {"x": x, **{name: weight for name, weight in module.named_parameters() if weight.requires_grad}}
    y = module(x)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(8)).to(y.dtype)
    return y.detach(), dict(zip(wanted, torch.autograd.grad(y, wanted.values(), upstream), strict=True))


def inputs(dtype, *shape):
    return torch.randn(*shape, 32, generator=torch.Generator().manual_seed(4)).to(dtype)


def in_fp64(module, x, form):
    """The norm written out, in fp64: transformers' own goes by fp32."""
    x, weight = x.double().requires_grad_(), module.weight.detach().double().requires_grad_()
    y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-3) * (weight + form.offset)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(8)).to(module(x.to(x.dtype)).dtype)
    return dict(zip(("x", "weight"), torch.autograd.grad(y, (x, weight), upstream.double()), strict=True))


@pytest.mark.parametrize("trains", [True, False])
@pytest.mark.parametrize(("own", "given"), FORMATS)
@pytest.mark.parametrize("kind", NORMS)
def test_a_norm_and_its_gradient(kind, own, given, trains):
    module = norm(NORMS[kind], own).requires_grad_(trains)
    x = inputs(given, 3, 17)
    y, plain = backward(module, x)
    with fused_layers(module) as fused:
        assert fused == {NORMS[kind].__name__: 1}
        assert module.forward.func.__self__ == getattr(layers, kind.upper())
        mine_y, mine = backward(module, x)
        assert backward(module, x[:0])[0].shape == (0, 17, 32)
    assert mine_y.dtype == y.dtype and mine_y.equal(y)
    assert {name: part.dtype for name, part in mine.items()} == {name: part.dtype for name, part in plain.items()}
    true = {name: part for name, part in in_fp64(module, x, getattr(layers, kind.upper())).items() if name in mine}
    for name in true:
        near, far = (distance({name: part[name]}, {name: true[name]}) for part in (mine, plain))
        assert near < max(1e-6, 1.05 * far)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("act", ["silu", "gelu_pytorch_tanh", "gelu"])
@pytest.mark.parametrize("kind", [LlamaMLP, Phi3MLP, YuanMLP])
def test_a_feed_forward_gives_the_very_same_numbers(kind, act, dtype):
    module = feed_forward(kind, act).to(dtype)
    x = inputs(dtype, 3, 17)
    y, plain = backward(module, x)
    with fused_layers(module) as fused:
        assert fused == {kind.__name__: 1}
        assert module.forward.func.__self__.swapped == (kind is YuanMLP)
        mine_y, mine = backward(module, x)
    assert mine_y.equal(y)
    assert all(mine[name].equal(plain[name]) for name in plain)


# What is left alone


class Scaled(LlamaMLP):
    def forward(self, x):
        return super().forward(x) * 1.01


class Tanh(LlamaMLP):
    def __init__(self, config):
        super().__init__(config)
        self.act_fn = nn.Tanh()


class Centred(LlamaRMSNorm):
    def forward(self, x):
        return super().forward(x - x.mean(-1, keepdim=True))


class WithMore(LlamaMLP):
    def forward(self, x, more):
        return super().forward(x) + more


def test_layers_that_compute_something_else():
    others = [feed_forward(kind, "silu") for kind in (Scaled, Tanh, WithMore)]
    others += [feed_forward(LlamaMLP, "relu"), Centred(32), nn.LayerNorm(32), nn.LayerNorm(32, bias=False)]
    watched = feed_forward(LlamaMLP, "silu")
    watched.act_fn.register_forward_hook(lambda *_: None)  # would be left out
    own = norm(LlamaRMSNorm, torch.float32)
    own.forward = given = lambda x: x
    model = nn.ModuleList([*others, watched, own, norm(LlamaRMSNorm, torch.float32)])
    with fused_layers(model) as fused:
        assert fused == {"LlamaRMSNorm": 1}
        assert own.forward is given
    assert own.forward is given and "forward" not in vars(model[-1])


def test_a_class_that_is_fused_in_one_setting_and_not_in_another():
    model = nn.ModuleList(feed_forward(LlamaMLP, act) for act in ("silu", "relu", "gelu"))
    with fused_layers(model):
        assert ["forward" in vars(module) for module in model] == [True, False, True]


def test_one_inside_another_and_an_error_inside():
    model = tiny("llama")
    with pytest.raises(ZeroDivisionError), fused_layers(model) as outer:
        with fused_layers(model) as inner:
            assert not inner
        assert sum("forward" in vars(module) for module in model.modules()) == outer.total() == 7
        raise ZeroDivisionError
    assert not any("forward" in vars(module) for module in model.modules())


def test_hooks_run_and_random_numbers_stay():
    model, called = tiny("llama"), []
    model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: called.append("mlp"))
    state = torch.get_rng_state()
    with fused_layers(model) as fused:
        model(IDS)
    assert fused.total() == 7 and called == ["mlp"]
    assert torch.get_rng_state().equal(state)


def test_compiled_code_has_the_classes_own_forward():
    model = feed_forward(LlamaMLP, "silu")
    graphs = []

    def look(graph, _):
        graphs.append(str(graph.graph))
        return graph.forward

    with fused_layers(model):
        y = torch.compile(model, backend=look, fullgraph=True)(inputs(torch.float32, 4))
    torch._dynamo.reset()
    assert "silu" in graphs[0] and "_Gated" not in graphs[0] and "autograd_function" not in graphs[0]
    assert y.equal(model(inputs(torch.float32, 4)))


# What it saves


def kept(module, x):
    """Bytes that wait for the backward, weights not counted."""
    weights = {weight.untyped_storage().data_ptr() for weight in module.parameters()}
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = storage.nbytes(), tensor
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        y = module(x)  # noqa: F841 - what is kept lives as long
    return sum(size for size, _ in storages.values())


def test_a_norm_keeps_what_it_was_given_and_a_number_a_token():
    module, x = norm(LlamaRMSNorm, torch.bfloat16), inputs(torch.bfloat16, 51).requires_grad_()
    plain = kept(module, x)
    with fused_layers(module):
        assert kept(module, x) == 51 * 32 * 2 + 51 * 4
    assert plain >= 51 * 32 * 6


@pytest.mark.parametrize("kind", [LlamaMLP, Phi3MLP])
def test_a_feed_forward_keeps_gate_and_up(kind):
    module = feed_forward(kind, "silu").bfloat16().requires_grad_(False)
    x = inputs(torch.bfloat16, 51).requires_grad_()
    plain = kept(module, x)
    with fused_layers(module):
        assert kept(module, x) == 51 * 48 * 2 * 2
        with torch.no_grad():
            assert kept(module, x) == 0
    assert plain == 51 * 48 * 2 * 3

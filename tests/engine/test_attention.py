"""The attention function by itself: each segment against the definition, in float64."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import GptOssConfig, GptOssForCausalLM

from luthier.data.pack import Segment, pack, pad
from luthier.engine.attention import CannotPackError, Layout, attend
from luthier.engine.forward import SummedLoss, adopt, on_device
from rows import SIZE, random_rows

SEGMENTS = (Segment(0, 1), Segment(1, 12), Segment(12, 20))
MODULE = SimpleNamespace(is_causal=True, num_key_value_groups=2)


def tensors(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, heads, 20, 8, generator=generator, dtype=dtype) * 3 for heads in (4, 2, 2)]


def by_definition(query, key, value, scaling, window=None, softcap=None, sinks=None):
    """One token at a time: what it may see, its scores, its softmax."""
    out = torch.zeros(1, 20, 4, 8, dtype=query.dtype)
    for start, stop, _ in SEGMENTS:
        for place in range(start, stop):
            first = start if window is None else max(start, place - window + 1)
            for head in range(4):
                scores = key[0, head // 2, first : place + 1] @ query[0, head, place] * scaling
                if softcap is not None:
                    scores = softcap * torch.tanh(scores / softcap)
                weights = scores.exp()
                rest = 0.0 if sinks is None else sinks[head].exp()
                out[0, place, head] = weights @ value[0, head // 2, first : place + 1] / (weights.sum() + rest)
    return out


@pytest.mark.parametrize(
    "asked",
    [{}, {"sliding_window": 4}, {"softcap": 2.0}, {"s_aux": torch.arange(4.0)}, {"sliding_window": 4, "softcap": 2.0}],
    ids=["plain", "window", "softcap", "sinks", "window and softcap"],
)
def test_each_segment_is_causal_attention_by_itself(asked):
    query, key, value = tensors()
    out, weights = attend(MODULE, query, key, value, None, scaling=0.3, layout=Layout(SEGMENTS), **asked)
    expected = by_definition(
        query, key, value, 0.3, asked.get("sliding_window"), asked.get("softcap"), asked.get("s_aux")
    )
    assert weights is None
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)  # softmax is taken in fp32


TREE = (Segment(0, 6), Segment(6, 11, 0), Segment(11, 14, 1), Segment(14, 16, 1), Segment(16, 20))


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("asked", [{}, {"sliding_window": 1}, {"sliding_window": 4}, {"sliding_window": 10}], ids=str)
def test_a_prefix_is_seen_before_each_row(asked, fast):
    """Every row by itself, the prefix's keys and values before its own; a window counts them as tokens of the row."""
    query, key, value = tensors()
    generator = torch.Generator().manual_seed(1)
    prefix = [torch.randn(1, 2, 3, 8, generator=generator, dtype=torch.float64, requires_grad=True) for _ in "kv"]
    inputs = [query.requires_grad_(), key.requires_grad_(), value.requires_grad_(), *prefix]
    weight = torch.randn(1, 20, 4, 8, generator=generator, dtype=torch.float64)
    module = SimpleNamespace(is_causal=True, layer_idx=0)
    layout = Layout(TREE, fast=fast, prefix=((prefix[0], prefix[1]),))
    out, _ = attend(module, query, key, value, None, scaling=0.3, layout=layout, **asked)
    expected = torch.zeros_like(out)
    window = asked.get("sliding_window", 100)
    for chain in ((0, 1, 2), (0, 1, 3), (4,)):
        places = torch.cat([torch.arange(*TREE[number][:2]) for number in chain])
        keys, values = (
            torch.cat((x, y[:, :, places]), 2)[0].repeat_interleave(2, 0)
            for x, y in zip(prefix, (key, value), strict=True)
        )
        distance = torch.arange(3, 3 + len(places))[:, None] - torch.arange(3 + len(places))
        scores = (query[0, :, places] @ keys.mT * 0.3).masked_fill((distance < 0) | (distance >= window), -torch.inf)
        expected[0, places] = (scores.softmax(-1) @ values).transpose(0, 1)
    torch.testing.assert_close(out, expected)
    found, wanted = (torch.autograd.grad((x * weight).sum(), inputs, allow_unused=True) for x in (out, expected))
    for mine, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, other)


def test_what_hangs_beside_is_added():
    """LLaMA-Adapter's own attention, with a layout and without."""
    query, key, value = tensors()
    module = SimpleNamespace(is_causal=True, num_key_value_groups=2)
    for layout in (Layout(SEGMENTS), None):
        module.__dict__.pop("luthier_beside", None)
        alone, _ = attend(module, query, key, value, None, scaling=0.3, layout=layout)
        module.luthier_beside = lambda query, scaling: scaling * query.transpose(1, 2)
        both, _ = attend(module, query, key, value, None, scaling=0.3, layout=layout)
        torch.testing.assert_close(both - alone, 0.3 * query.transpose(1, 2))


def test_without_scaling_it_is_the_usual_one():
    query, key, value = tensors()
    out, _ = attend(MODULE, query, key, value, None, layout=Layout(SEGMENTS))
    torch.testing.assert_close(out, by_definition(query, key, value, 1 / math.sqrt(8)))


@pytest.mark.parametrize("masked", [True, False])
def test_a_soft_cap_without_a_layout_follows_the_mask(masked):
    """Gemma 2 that generates after training: transformers' SDPA refuses soft caps."""
    query, key, value = tensors()
    mask = torch.ones(20, 20, dtype=torch.bool).tril()[None, None] if masked else None
    out, _ = attend(MODULE, query, key, value, mask, scaling=0.3, softcap=2.0)
    last, _ = attend(MODULE, query[:, :, -1:], key, value, None, scaling=0.3, softcap=2.0)
    whole, _ = attend(MODULE, query, key, value, None, scaling=0.3, softcap=2.0, layout=Layout((Segment(0, 20),)))
    torch.testing.assert_close(out, whole)
    torch.testing.assert_close(last, whole[:, -1:])  # one new token, the cache before it


def test_what_is_not_known_is_no_reason_to_guess():
    query, key, value = tensors()
    with pytest.raises(CannotPackError, match="passes position_bias, which is not known here"):
        attend(nn.Linear(1, 1), query, key, value, None, layout=Layout(SEGMENTS), position_bias=torch.ones(1))
    with pytest.raises(CannotPackError, match="is not causal"):
        attend(nn.Linear(1, 1), query, key, value, None, layout=Layout(SEGMENTS), is_causal=False)
    attend(MODULE, query, key, value, None, layout=Layout(SEGMENTS), position_ids=torch.zeros(1), position_bias=None)


def test_sinks_of_a_real_model():
    torch.manual_seed(0)
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8, "head_dim": 8}
    rope = {"rope_type": "default", "rope_theta": 10_000.0}
    sizes = {"num_key_value_heads": 2, "intermediate_size": 48, "initializer_range": 0.2}
    model = GptOssForCausalLM(GptOssConfig(**SIZE, **experts, **sizes, rope_parameters=rope)).eval()
    for layer in model.model.layers:
        nn.init.normal_(layer.self_attn.sinks)
    rows = random_rows(4, longest=30)
    cpu = torch.device("cpu")
    expected = SummedLoss(model, "plain")(on_device(pad(rows, range(4), 0), cpu)).item()
    adopt(model)
    packed = SummedLoss(model, "engine")(on_device(pack(rows, range(4)), cpu)).item()
    assert packed == pytest.approx(expected, rel=1e-6)

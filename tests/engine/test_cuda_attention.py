"""The attention of a pass on CUDA, as far as a machine without a card can tell: masks, blocks and what is handed over.

The kernels themselves run in benchmarks/gpu.py, against float64.
"""

from __future__ import annotations

import inspect

import numpy as np
import pytest
import torch
from torch.nn.attention import flex_attention, varlen

from luthier.engine import cuda_attention
from luthier.engine.cuda_attention import BLOCK, attend_cuda, blocks, family, why

PLAIN = ((0, 1, -1), (1, 140, -1), (140, 280, -1))
TREE = ((0, 30, -1), (30, 40, -1), (40, 190, 0), (190, 250, 2), (250, 280, 0), (280, 300, 1), (300, 301, 2))
"""Two families, the first of three generations, in an order that is no walk through the tree."""
DEEP = ((0, 300, -1), (300, 700, 0), (700, 800, 1))
CPU = torch.device("cpu")


def tensors(places, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, n, places, 8, generator=generator, dtype=dtype) * 2 for n in (4, 2, 2)]


def chain(segments, number, place):
    """The places that a token of a segment sees, in the order of its row: found by walking up."""
    seen = list(range(segments[number][0], place + 1))
    while (number := segments[number][2]) >= 0:
        seen = [*range(*segments[number][:2]), *seen]
    return seen


def by_definition(query, key, value, segments, scaling, window=None, softcap=None):
    """One token at a time, in float64: [1, L, H, E]."""
    out = torch.zeros_like(query).transpose(1, 2)
    for number, (start, stop, _) in enumerate(segments):
        for place in range(start, stop):
            seen = chain(segments, number, place)[-(window or 10**9) :]
            for head in range(query.shape[1]):
                scores = key[0, head // 2, seen] @ query[0, head, place] * scaling
                if softcap is not None:
                    scores = softcap * torch.tanh(scores / softcap)
                out[0, place, head] = scores.softmax(0) @ value[0, head // 2, seen]
    return out


@pytest.fixture
def eager(monkeypatch):
    """flex attention by itself: its compiler for the CPU takes seconds, and knows no soft cap."""
    monkeypatch.setattr(flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    monkeypatch.setattr(cuda_attention, "_compiled_flex", lambda: flex_attention.flex_attention)


@pytest.mark.parametrize("segments", [PLAIN, TREE], ids=["plain", "tree"])
@pytest.mark.parametrize("asked", [(None, None), (20, None), (None, 2.0), (150, 2.0)], ids=str)
def test_flex_attention_sees_the_chain_of_ancestors(eager, segments, asked):
    query, key, value = tensors(segments[-1][1])
    with torch.no_grad():
        out = cuda_attention._flex(query, key, value, segments, 0.3, *asked)
    torch.testing.assert_close(out, by_definition(query, key, value, segments, 0.3, *asked), rtol=1e-6, atol=1e-6)
    assert out.is_contiguous()


@pytest.mark.parametrize("segments", [PLAIN, TREE, DEEP, ((0, 3, -1),), ((0, 256, -1), (256, 512, 0))], ids=str)
@pytest.mark.parametrize("window", [None, 1, 100, 300])
def test_the_blocks_are_those_that_torch_finds_by_looking_at_every_pair(segments, window):
    ours = cuda_attention._mask(segments, window, CPU)
    places = segments[-1][1]
    theirs = flex_attention.create_block_mask(ours.mask_mod, None, None, places, places, device="cpu")
    assert ours.seq_lengths == theirs.seq_lengths == (places, places)
    for name in ("num_blocks", "indices"):
        for kind in ("kv", "full_kv", "q", "full_q"):
            assert torch.equal(getattr(ours, f"{kind}_{name}"), getattr(theirs, f"{kind}_{name}")), (kind, name)


def test_blocks_are_seen_in_part_wholly_or_not_at_all():
    partly, whole = blocks(DEEP, family(DEEP, None).first)
    assert (partly | whole).tolist() == np.tri(7, dtype=bool).tolist()
    assert [int(row.sum()) for row in whole] == [0, 1, 2, 3, 4, 5, 0]  # the last has places beyond the pass
    partly, whole = blocks(DEEP, family(DEEP, BLOCK).first)
    assert (partly | whole).tolist() == (np.tri(7) - np.tri(7, k=-2) > 0).tolist()
    assert not whole.any()


def test_a_segment_is_above_those_that_were_entered_before_it_was_left():
    numbers = family(TREE, 100)
    starts = [start for start, *_ in TREE]
    assert numbers.entered[starts].tolist() == [0, 5, 1, 2, 4, 6, 3]
    assert numbers.left[starts].tolist() == [5, 7, 4, 3, 5, 7, 4]
    assert numbers.positions[starts].tolist() == [0, 0, 30, 180, 30, 10, 180]
    assert numbers.first[starts].tolist() == [0, 0, 0, 81, 0, 0, 81]


def flash(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1), **further):
    """torch's varlen_attn as its documentation has it, in float64. window_size: tokens to the left and to the right."""
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32 and max_q == max_k == int(cu_seq_q.diff().max())
    assert (query.shape[1] == key.shape[1]) == (not further.get("enable_gqa")) and window_size[1] == 0
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    out = torch.zeros_like(query)
    for start, stop in zip(cu_seq_q[:-1].tolist(), cu_seq_q[1:].tolist(), strict=True):
        at = torch.arange(stop - start)
        distance = at[:, None] - at
        allowed = (distance >= 0) & ((distance <= window_size[0]) | (window_size[0] == -1))
        q, k, v = (x[start:stop].transpose(0, 1) for x in (query, key, value))
        scores = (q @ k.mT * scale).masked_fill(~allowed, -torch.inf)
        out[start:stop] = (scores.softmax(-1) @ v).transpose(0, 1)
    return out


def of_torch_2_11(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None,
                  window_size=(-1, -1)):  # fmt: skip
    return flash(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale=scale, window_size=window_size)


def of_this_torch(*args, **kwargs):
    return flash(*args, **kwargs)


of_this_torch.__signature__ = inspect.signature(varlen.varlen_attn)  # type: ignore[attr-defined]


@pytest.mark.parametrize("theirs", [of_this_torch, of_torch_2_11])
@pytest.mark.parametrize("window", [None, 1, 20, 139, 500])
def test_flash_attention_is_given_what_its_signature_takes(monkeypatch, theirs, window):
    def checked(*args, **kwargs):
        inspect.signature(theirs).bind(*args, **kwargs)
        return theirs(*args, **kwargs)

    checked.__signature__ = inspect.signature(theirs)  # type: ignore[attr-defined]
    monkeypatch.setattr(varlen, "varlen_attn", checked)
    query, key, value = tensors(280)
    out = cuda_attention._flash(query, key, value, PLAIN, 0.3, window)
    torch.testing.assert_close(out, by_definition(query, key, value, PLAIN, 0.3, window))


def test_flash_attention_takes_these_arguments_forward_and_backward():
    """torch's own function, on tensors without numbers: types and shapes."""
    query, key, value = (x.to("meta", torch.bfloat16).requires_grad_() for x in tensors(280))
    out = cuda_attention._flash(query, key, value, PLAIN, None, 20)
    assert out.shape == (1, 280, 4, 8) and out.dtype == torch.bfloat16
    gradients = torch.autograd.grad(out, (query, key, value), torch.empty_like(out))
    assert [x.shape for x in gradients] == [x.shape for x in (query, key, value)]


def test_the_edges_of_segments_are_made_once_a_pass():
    edges, longest = cuda_attention._edges(PLAIN, CPU)
    assert edges.dtype == torch.int32 and edges.tolist() == [0, 1, 140, 280] and longest == 140
    assert cuda_attention._edges(((0, 1, -1), (1, 140, -1), (140, 280, -1)), CPU)[0] is edges
    assert cuda_attention._mask(TREE, None, CPU) is cuda_attention._mask(TREE, None, CPU)


@pytest.fixture
def forgetful(monkeypatch):
    monkeypatch.setattr(cuda_attention, "_failed", {})
    cuda_attention._tried.cache_clear()
    yield
    cuda_attention._tried.cache_clear()


def test_what_no_kernel_does_is_said_and_not_tried_again(monkeypatch, forgetful):
    monkeypatch.setattr(cuda_attention, "_try", lambda case: pytest.fail("tried"))
    query, key, value = tensors(280, torch.float32)
    assert attend_cuda(query, key, value, PLAIN, None, None) is None
    query, key, value = (torch.zeros(1, 2, 280, 12, dtype=torch.bfloat16) for _ in range(3))
    assert attend_cuda(query, key, value, PLAIN, None, None) is None
    assert why() == {
        "flash, float32, 4/2 heads of 8, cpu": "flash attention is for bf16 and fp16",
        "flash, bfloat16, 2/2 heads of 12, cpu": "flash attention is for head sizes in steps of 8 up to 256",
    }


def test_a_kernel_that_fails_is_tried_once_and_the_caller_goes_another_way(monkeypatch, forgetful):
    calls = []

    def fails(*args):
        calls.append(args)
        raise RuntimeError("no Triton here\nand more")

    monkeypatch.setattr(torch.cuda, "device", lambda device: torch.no_grad())
    monkeypatch.setattr(cuda_attention, "_flex", fails)
    query, key, value = tensors(301, torch.float32)
    assert attend_cuda(query, key, value, TREE, None, None) is None
    assert attend_cuda(query, key, value, TREE, None, None, 50.0) is None  # a soft cap is another kernel
    assert attend_cuda(query, key, value, TREE, None, None) is None
    assert len(calls) == 2
    assert why() == {
        "flex, float32, 4/2 heads of 8, cpu": "RuntimeError: no Triton here",
        "flex, float32, 4/2 heads of 8, capped, cpu": "RuntimeError: no Triton here",
    }


def test_a_pass_of_one_block_goes_segment_by_segment(monkeypatch, forgetful):
    monkeypatch.setattr(cuda_attention, "_try", lambda case: pytest.fail("tried"))
    assert attend_cuda(*tensors(128), ((0, 28, -1), (28, 78, 0), (78, 128, 0)), None, None) is None
    assert why() == {}


def test_memory_that_runs_out_is_no_reason_to_give_a_kernel_up(monkeypatch, forgetful):
    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch.cuda, "device", lambda device: torch.no_grad())
    monkeypatch.setattr(cuda_attention, "_flex", full)
    with pytest.raises(torch.OutOfMemoryError):
        attend_cuda(*tensors(301, torch.float32), TREE, None, None)
    assert why() == {}


def test_what_the_compiler_says_of_a_later_pass_is_remembered_too(monkeypatch, forgetful):
    from torch._dynamo.exc import FailOnRecompileLimitHit

    def one_too_many(*args):
        raise FailOnRecompileLimitHit("recompile_limit reached")

    monkeypatch.setattr(cuda_attention, "_try", lambda case: None)
    monkeypatch.setattr(cuda_attention, "_flex", one_too_many)
    assert attend_cuda(*tensors(301, torch.float32), TREE, None, None) is None
    assert why() == {"flex, float32, 4/2 heads of 8, cpu": "FailOnRecompileLimitHit: recompile_limit reached"}


def test_a_checkpoint_around_it_neither_counts_the_trial_nor_is_swallowed(monkeypatch, forgetful):
    """A checkpoint counts what its block saves, and again when that is computed anew, which it ends by an exception."""

    def twin(query, key, value, *_):
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, enable_gqa=True).transpose(1, 2)

    monkeypatch.setattr(torch.cuda, "device", lambda device: torch.enable_grad())
    monkeypatch.setattr(cuda_attention, "_flex", twin)
    query, key, value = (x.requires_grad_() for x in tensors(301, torch.float32))

    def attention(*inputs):
        return attend_cuda(*inputs, TREE, None, None)

    torch.utils.checkpoint.checkpoint(attention, query, key, value, use_reentrant=False).sum().backward()
    assert why() == {}
    assert query.grad is not None and query.grad.abs().sum() > 0

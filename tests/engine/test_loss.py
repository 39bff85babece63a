"""The summed loss against transformers' own."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from luthier.data.pack import pad
from luthier.engine.loss import on_device, summed_loss
from rows import lora, random_rows, tiny

CPU = torch.device("cpu")
ROWS = random_rows(6)
EVERY = np.arange(6)
FAMILIES = [(family, tied) for family in ("llama", "qwen2", "opt") for tied in (False, True)]


def theirs(model, pass_):
    """transformers' mean over the supervised tokens, times their number."""
    labels = torch.full(pass_.ids.shape, -100)
    labels[:, 1:] = torch.from_numpy(pass_.targets[:, :-1])
    ids, mask = torch.from_numpy(pass_.ids), torch.from_numpy(pass_.mask).long()
    return model(input_ids=ids, attention_mask=mask, labels=labels).loss * (labels != -100).sum()


@pytest.mark.parametrize(("family", "tied"), FAMILIES)
def test_value_and_gradient_are_transformers_own(family, tied):
    model = tiny(family, tied=tied).eval()
    pass_ = pad(ROWS, EVERY, pad_id=1)
    parameters = list(model.parameters())
    ours = summed_loss(model, on_device(pass_, CPU))
    expected = theirs(model, pass_)
    assert ours.dtype == torch.float32 and ours.shape == ()
    assert ours.item() == pytest.approx(expected.item(), rel=1e-5)
    for mine, other in zip(
        torch.autograd.grad(ours, parameters), torch.autograd.grad(expected, parameters), strict=True
    ):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "qwen2", "opt"])
def test_a_peft_model_keeps_its_adapters(family):
    bare = summed_loss(tiny(family).eval(), on_device(pad(ROWS, EVERY, 1), CPU)).item()
    model = lora(tiny(family), modules_to_save=["lm_head"], init_lora_weights=False).eval()
    pass_ = pad(ROWS, EVERY, pad_id=1)
    ours = summed_loss(model, on_device(pass_, CPU)).item()
    assert ours == pytest.approx(theirs(model, pass_).item(), rel=1e-5)
    assert abs(ours - bare) > 1  # or the adapters were passed by


@pytest.mark.parametrize("family", ["llama", "qwen2", "opt"])
def test_a_row_alone_is_the_row_in_a_padded_pass(family):
    model = tiny(family).eval()
    together = summed_loss(model, on_device(pad(ROWS, EVERY, 0), CPU)).item()
    alone = sum(summed_loss(model, on_device(pad(ROWS, EVERY[[row]], 0), CPU)).item() for row in range(6))
    assert together == pytest.approx(alone, rel=1e-6)


def test_the_pad_id_does_not_matter():
    model = tiny("llama").eval()
    losses = {summed_loss(model, on_device(pad(ROWS, EVERY, pad_id), CPU)).item() for pad_id in (0, 1, 60)}
    assert len(losses) == 1


def test_only_supervised_places_meet_the_head():
    model = tiny("qwen2").eval()
    seen = []
    model.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(tuple(output.shape)))
    summed_loss(model, on_device(pad(ROWS, EVERY, 0), CPU))
    assert seen == [(int(ROWS.supervised.sum()), 61)]


def test_the_sum_is_taken_in_fp32_where_the_weights_are_bf16():
    model = tiny("llama").eval()
    exact = summed_loss(model, on_device(pad(ROWS, EVERY, 0), CPU))
    rounded = summed_loss(model.bfloat16(), on_device(pad(ROWS, EVERY, 0), CPU))
    assert rounded.dtype == torch.float32
    assert rounded.item() == pytest.approx(exact.item(), rel=2e-2)

"""A pass → its summed loss, packed or padded, against transformers' own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import CohereConfig, CohereForCausalLM, FalconConfig, FalconForCausalLM, Phi3Config, Phi3ForCausalLM

from luthier.data.pack import pack, pad, passes
from luthier.engine.attention import CannotPackError
from luthier.engine.forward import SummedLoss, adopt, on_device, rotary_border
from luthier.training.start import recompute_activations
from rows import ROTARY, SIZE, lora, random_rows, tiny

CPU = torch.device("cpu")
ROWS = random_rows(6, longest=30)
EVERY = np.arange(6)
FAMILIES = ["llama", "qwen2", "qwen3", "gemma", "gemma2", "opt", "glm", "phi3", "mistral"]


def ours(model, pass_, route="engine"):
    return SummedLoss(model, route)(on_device(pass_, CPU))


def theirs(model, pass_):
    """transformers' mean over the supervised tokens, times their number."""
    labels = torch.full(pass_.ids.shape, -100)
    labels.view(-1)[torch.from_numpy(pass_.places) + 1] = torch.from_numpy(pass_.targets)
    ids, mask = torch.from_numpy(pass_.ids), torch.from_numpy(pass_.mask).long()
    return model(input_ids=ids, attention_mask=mask, labels=labels).loss * (labels != -100).sum()


def gradients(loss, parameters):
    return torch.autograd.grad(loss, parameters)


def assert_equal(mine, other, model):
    """Each gradient to 1e-5 of its norm; one that is nothing by nature (OPT's key bias) to that of the largest."""
    largest = max(value.norm() for value in other)
    for a, b, (name, _) in zip(mine, other, model.named_parameters(), strict=True):
        assert (a - b).norm() <= 1e-5 * max(b.norm(), 1e-2 * largest), name


@pytest.mark.parametrize("route", ["engine", "own_logits"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_packed_pass_has_the_loss_and_gradient_of_padded_transformers(family, route):
    """Sabotages that it catches: attention across segments (no mask); positions that do not restart; a window, soft
    cap or scale that is not honoured; a target across the border of two rows."""
    model = tiny(family).train()
    parameters = list(model.parameters())
    expected = theirs(model, pad(ROWS, EVERY, pad_id=1))
    wanted = gradients(expected, parameters)
    adopt(model)
    loss = ours(model, pack(ROWS, EVERY), route)
    assert loss.dtype == torch.float32 and loss.shape == ()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert_equal(gradients(loss, parameters), wanted, model)


@pytest.mark.parametrize("family", ["llama", "gemma2", "opt"])
def test_the_plain_twin_is_transformers_own(family):
    model = tiny(family, tied=True).train()
    parameters = list(model.parameters())
    pass_ = pad(ROWS, EVERY, pad_id=1)
    expected = theirs(model, pass_)
    wanted = gradients(expected, parameters)
    for route in ("plain", "engine"):
        loss = ours(model, pass_, route)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
        assert_equal(gradients(loss, parameters), wanted, model)


@pytest.mark.parametrize("family", ["llama", "qwen2", "opt"])
def test_a_peft_model_keeps_its_adapters(family):
    bare = ours(tiny(family).eval(), pad(ROWS, EVERY, 1)).item()
    model = lora(tiny(family), modules_to_save=["lm_head"], init_lora_weights=False).eval()
    expected = theirs(model, pad(ROWS, EVERY, 1)).item()
    adopt(model)
    assert ours(model, pack(ROWS, EVERY)).item() == pytest.approx(expected, rel=1e-6)
    assert abs(expected - bare) > 1  # or the adapters were passed by


@pytest.mark.parametrize("family", FAMILIES)
def test_checkpointing_recomputes_the_pass_it_belongs_to(family):
    """The backward of one pass runs after another pass went forward: a Layout kept in the module, and not handed on as
    an argument, would be the other one's."""
    first, second = pack(ROWS, [0, 1, 2]), pack(ROWS, [3, 4, 5])
    model = tiny(family).train()
    adopt(model)
    parameters = list(model.parameters())
    wanted = [gradients(ours(model, one), parameters) for one in (first, second)]
    recompute_activations(model)
    losses = [ours(model, one) for one in (first, second)]
    for loss, other in zip(losses, wanted, strict=True):
        assert_equal(gradients(loss, parameters), other, model)


def test_only_supervised_places_meet_the_head():
    model = tiny("qwen2").eval()
    adopt(model)
    seen = []
    model.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(tuple(output.shape)))
    for route in ("engine", "own_logits"):
        ours(model, pack(ROWS, EVERY), route)
    count = int(ROWS.supervised.sum())
    assert seen == [(count, 61), (1, count, 61)]


def test_no_mask_is_made_for_a_packed_pass():
    """transformers would make one of the whole pass, from the positions: 4,096 × 4,096 for 4,096 tokens."""
    model = tiny("llama").eval()
    adopt(model)
    seen = []
    layer = model.model.layers[0].self_attn
    layer.register_forward_pre_hook(lambda m, args, kwargs: seen.append(kwargs["attention_mask"]), with_kwargs=True)
    ours(model, pack(ROWS, EVERY))
    assert seen[0].numel() == 0


def test_the_sum_is_taken_in_fp32_where_the_weights_are_bf16():
    model = tiny("llama").eval()
    adopt(model)
    exact = ours(model, pack(ROWS, EVERY))
    rounded = ours(model.bfloat16(), pack(ROWS, EVERY))
    assert rounded.dtype == torch.float32
    assert rounded.item() == pytest.approx(exact.item(), rel=2e-2)


def test_logits_that_are_scaled_are_so_here():
    torch.manual_seed(0)
    model = CohereForCausalLM(CohereConfig(**{**SIZE, **ROTARY}, logit_scale=0.3)).eval()
    expected = theirs(model, pad(ROWS, EVERY, 1)).item()
    adopt(model)
    assert ours(model, pack(ROWS, EVERY)).item() == pytest.approx(expected, rel=1e-6)


def test_a_family_with_an_attention_of_its_own_cannot_pack():
    model = FalconForCausalLM(FalconConfig(vocab_size=61, hidden_size=32, num_hidden_layers=1, num_attention_heads=4))
    with pytest.raises(CannotPackError, match="FalconForCausalLM has an attention of its own"):
        adopt(model)


def long_rope():
    """Frequencies that are four times slower for rows of more than 12 tokens."""
    torch.manual_seed(0)
    rope = {"rope_type": "longrope", "rope_theta": 10_000.0, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    config = Phi3Config(**SIZE, **ROTARY, original_max_position_embeddings=12, rope_parameters=rope)
    return Phi3ForCausalLM(config).eval()


def test_rows_whose_rotary_frequencies_differ_share_no_pass():
    model = long_rope()
    alone = [theirs(model, pad(ROWS, [row], 0)).item() for row in EVERY]
    border = rotary_border(model)
    assert border == 12 and len({bool(length > 12) for length in ROWS.lengths}) == 2
    adopt(model)
    mixed = ours(model, pack(ROWS, EVERY)).item()
    assert abs(mixed - sum(alone)) > 1e-3  # what would be done without the border
    parts = passes(ROWS, EVERY, 1000, border)
    assert len(parts) == 2
    assert sum(ours(model, part).item() for part in parts) == pytest.approx(sum(alone), rel=1e-6)
    assert rotary_border(tiny("llama")) is None

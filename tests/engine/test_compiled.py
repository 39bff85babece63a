"""Compiled decoder layers against the same layers as they are, over passes of unlike lengths."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from itertools import pairwise

import pytest
import torch
from torch._dynamo.utils import counters

from luthier.data.pack import Segment
from luthier.engine.attention import Layout
from luthier.engine.compiled import compiled
from luthier.engine.dropout import keyed
from luthier.engine.forward import adopt, base_of
from rows import VOCABULARY, lora, tiny

PASSES = [[5, 7, 9], [4, 6, 3, 2], [11, 3], [8, 2, 2, 2, 2]]
KINDS = {"plain": (False, False), "checkpoints": (True, False), "LoRA with dropout": (True, True)}


@pytest.fixture(autouse=True)
def traced_only(monkeypatch):
    """All of torch.compile but the compiler."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def results(model, lengths):
    """The sum of the log-sum-exps of all logits, and its gradients."""
    stops = torch.tensor([0, *lengths]).cumsum(0).tolist()
    generator = torch.Generator().manual_seed(sum(lengths))
    layout = Layout(tuple(Segment(*ends) for ends in pairwise(stops)), torch.randint(1 << 60, (stops[-1],)))
    logits = base_of(model)(
        input_ids=torch.randint(3, VOCABULARY, (1, stops[-1]), generator=generator),
        position_ids=torch.cat([torch.arange(length) for length in lengths])[None],
        attention_mask=torch.empty(1, 1, 1, 0),
        use_cache=False,
        layout=layout,
    ).logits
    loss = logits.logsumexp(-1).sum()
    return [loss.detach(), *torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])]


@pytest.mark.full
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch looks at it itself
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_numbers_and_nothing_compiled_anew_for_another_length(kind):
    checkpoints, adapters = KINDS[kind]
    model = tiny("qwen2").train()
    adopt(model)
    if adapters:
        model = lora(model, init_lora_weights=False, lora_dropout=0.3)
    if checkpoints:
        base_of(model).activation_checkpointing_enable({"use_reentrant": False})
    lines, graphs = [], []
    with keyed(model, seed=3) if adapters else nullcontext():
        torch.manual_seed(0)
        plain = [results(model, lengths) for lengths in PASSES]
        torch.manual_seed(0)
        with compiled(model, lines.append) as layers:
            for lengths, expected in zip(PASSES, plain, strict=True):
                found = results(model, lengths)
                graphs.append(counters["stats"]["unique_graphs"])
                for mine, true in zip(found, expected, strict=True):
                    assert (mine - true).norm() <= 3e-6 * true.norm()
    assert layers == 2 and graphs[0] > 1 and len(set(graphs)) == 1
    assert len(lines) == 1 and lines[0].startswith("engine.compile: 2 layers compiled in ")
    assert not any("forward" in vars(module) for module in model.modules())
    again = results(model.eval(), PASSES[0])
    assert counters["stats"]["unique_graphs"] == graphs[0] and again[0].isfinite()

"""A step's gradient when memory runs out, and how many tokens go through the model at once."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from luthier.engine.forward import adopt
from luthier.errors import RunError
from luthier.sections import TrainSection
from luthier.training import budget
from luthier.training.budget import kept_bytes, measure
from luthier.training.distributed import World
from luthier.training.gradients import Gradients, smaller
from rows import fit, lora, random_rows, tiny, trained

ROWS = random_rows(24, longest=30)


def with_room_for(monkeypatch, tokens):
    """A device whose memory is full when a pass of training has more tokens, from the second step on."""

    def limited(self, part, step=0, module=None):
        loss = real(self, part, step, module)
        if part.mask.nbytes > tokens and step and torch.is_grad_enabled():
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return loss

    real = Gradients.loss
    monkeypatch.setattr(Gradients, "loss", limited)


def test_a_step_that_does_not_fit_is_done_again_in_smaller_passes_and_comes_out_the_same(tmp_path, monkeypatch):
    section = TrainSection(batch=8, steps=5, lr=3e-3, tokens_per_pass=1000, save_every=2)
    model = lora(tiny("llama"), lora_dropout=0.1)
    expected = fit(tmp_path / "roomy", model, ROWS, section)
    with_room_for(monkeypatch, 60)
    said, narrow = [], lora(tiny("llama"), lora_dropout=0.1)
    outcome = fit(tmp_path / "narrow", narrow, ROWS, section, say=said.append)
    assert outcome.losses == pytest.approx(expected.losses, rel=1e-5)
    others = trained(narrow)
    for name, value in trained(model).items():
        torch.testing.assert_close(others[name], value, rtol=1e-4, atol=1e-6)
    told = [line for line in said if "out of memory" in line]
    assert told[0].startswith("out of memory in step 2: done again in passes of at most ")
    assert told[0].endswith(" tokens instead of 1,000; the result is the same") and len(told) in (1, 2, 3)
    lines = [json.loads(line) for line in (tmp_path / "narrow" / "metrics.jsonl").read_text().splitlines()]
    assert lines[0]["passes"] == 1 and all(line["passes"] >= 2 for line in lines[1:])  # decided once
    state = json.loads((tmp_path / "narrow" / "checkpoints" / "step-000002" / "state.json").read_text())
    decided = state["state"]["tokens_per_pass"]
    assert decided <= 60
    said.clear()
    resume = tmp_path / "narrow" / "checkpoints" / "step-000004"
    again = fit(
        tmp_path / "narrow", lora(tiny("llama"), lora_dropout=0.1), ROWS, section, say=said.append, resume=resume
    )
    assert again.losses == outcome.losses
    assert not [line for line in said if "out of memory" in line or "rounding" in line]


def test_a_row_that_does_not_fit_by_itself_is_one_line(tmp_path, monkeypatch):
    with_room_for(monkeypatch, 20)
    with pytest.raises(RunError) as error:
        fit(tmp_path, lora(tiny("llama")), ROWS, TrainSection(batch=8, steps=5, tokens_per_pass=1000), proof=False)
    assert str(error.value).startswith("out of memory on the device; lower train.tokens_per_pass or set ")
    assert json.loads((tmp_path / "status.json").read_text())["state"] == "failed"


LIMITED = """
import resource, sys
sys.path.insert(0, sys.argv[1])
import torch
from pathlib import Path
from luthier.sections import TrainSection
from rows import fit, lora, random_rows, tiny

rows = random_rows(64, shortest=40, longest=60)
class Hungry(torch.autograd.Function):  # 16 MiB a token
    @staticmethod
    def forward(ctx, x):
        ctx.kept = torch.ones(x.shape[1], 4 << 20)
        return x.clone()
    @staticmethod
    def backward(ctx, g):
        return g
model = lora(tiny("llama"))
embedding = model.get_base_model().model.embed_tokens
embedding.register_forward_hook(lambda m, i, o: Hungry.apply(o.requires_grad_()))
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (5 << 30), used + (5 << 30)))
section = TrainSection(batch=8, steps=2, tokens_per_pass=1000)
outcome = fit(Path(sys.argv[2]), model, rows, section, say=print, proof=False)
print("losses", len(outcome.losses))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space as Linux does")
@pytest.mark.full
def test_a_cpu_without_memory_is_known_by_its_own_error(tmp_path):
    """A real limit of 5 GiB: a step of 400 tokens would take 6.4, half of it fits."""
    script = tmp_path / "limited.py"
    script.write_text(LIMITED)
    tests = str(Path(__file__).parents[1])
    done = subprocess.run(
        [sys.executable, script, tests, tmp_path / "run"],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "out of memory in step 1: done again in passes of at most " in done.stdout
    assert done.stdout.splitlines()[-1] == "losses 2"


def test_half_of_what_the_largest_pass_had():
    lengths = np.array([30, 20, 10, 20])
    assert smaller(lengths, 1000) == 40
    assert smaller(lengths, 50) == 30  # no less than the longest row
    assert smaller(lengths, 30) is None and smaller(lengths[:1], 1000) is None


def computing(model, **given):
    adopt(model)
    return Gradients(
        model, "engine", World.alone(torch.device("cpu")), None, pad_id=0, autocast=None, beat=lambda: None, **given
    )


def test_kept_bytes_grow_with_the_pass_and_leave_out_the_weights():
    model = tiny("llama").train()
    gradients = computing(model)
    one, four = (kept_bytes(gradients, gradients.cut(ROWS, np.arange(n), 10_000)[0]) for n in (6, 24))
    tokens = int(ROWS.lengths[:6].sum()), int(ROWS.lengths.sum())
    assert four / one == pytest.approx(tokens[1] / tokens[0], rel=0.1)
    weights = sum(value.numel() * value.element_size() for value in model.parameters())
    assert one < 10 * weights and one > tokens[0] * 32 * 4  # at least the hidden states


@pytest.mark.parametrize(("free", "tokens"), [(1 << 40, 4096), (4 << 20, None), (0, 30)])
def test_the_budget_follows_the_memory_that_is_free(monkeypatch, free, tokens):
    monkeypatch.setattr(budget, "free_memory", lambda device: free)
    gradients = computing(tiny("llama").train())
    decided, line = measure(gradients, ROWS)
    longest = int(ROWS.lengths.max())
    assert longest == 30
    if tokens is None:
        assert longest < decided < 4096
    else:
        assert decided == tokens
    assert line.startswith(f"train.tokens_per_pass: auto is {decided:,} (longest row 30; ")
    assert re.search(rf"; \d+\.\d+ KiB a token, {free / 2**30:.1f} GiB free\)$", line)

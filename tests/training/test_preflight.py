"""Before step 1: what would fail later fails there, and nothing that is tried changes a number."""

from __future__ import annotations

import json
import re

import pytest
import torch

from luthier.errors import RunError
from luthier.sections import TrainSection
from luthier.training import checkpoint
from luthier.training.gradients import Gradients
from luthier.training.loop import Training
from luthier.training.preflight import Preflight
from rows import fit, lora, random_rows, tiny, trained

ROWS, HELD_OUT = random_rows(24, longest=30), random_rows(9, seed=1)
SECTION = TrainSection(batch=8, steps=5, lr=3e-3, tokens_per_pass=1000)


def with_room_for(monkeypatch, tokens):
    """A device whose memory is full when a pass with a gradient has more tokens; gives those that were tried."""
    tried = []

    def limited(self, part, step=0, module=None):
        loss = real(self, part, step, module)
        tried.append(part.mask.nbytes)
        if part.mask.nbytes > tokens and torch.is_grad_enabled():
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return loss

    real = Gradients.loss
    monkeypatch.setattr(Gradients, "loss", limited)
    return tried


def test_the_longest_pass_is_tried_and_cut_until_it_fits(tmp_path, monkeypatch):
    expected = fit(tmp_path / "roomy", lora(tiny("llama")), ROWS, SECTION)
    tried, said, model = with_room_for(monkeypatch, 60), [], lora(tiny("llama"))
    outcome = fit(tmp_path / "narrow", model, ROWS, SECTION, say=said.append, proof=False)
    assert outcome.losses == pytest.approx(expected.losses, rel=1e-5)
    told = [line for line in said if "do not fit" in line]
    assert told[0].startswith("preflight: passes of 1,000 tokens do not fit into memory; ")
    assert told[0].endswith(" at most instead: the result is the same") and 1 < len(told) < 4
    assert not [line for line in said if line.startswith("out of memory")]  # no step meets it any more
    longest = sorted(ROWS.lengths)[-8:]
    assert tried[-1] <= 60 and sum(longest) in tried


def test_a_row_that_does_not_fit_by_itself_is_one_line(tmp_path, monkeypatch):
    with_room_for(monkeypatch, 20)
    with pytest.raises(RunError) as error:
        fit(tmp_path, lora(tiny("llama")), ROWS, SECTION, proof=False)
    row = int(ROWS.lengths.argmax())
    assert re.fullmatch(
        rf"preflight: the longest row, rows\.jsonl:{row + 1} with 30 tokens, does not fit into memory, [\d.]+ GiB of "
        r"which are free; train\.activation_checkpointing: true, a smaller data\.max_length or model\.quantize: nf4 "
        "take less",
        str(error.value),
    )
    assert json.loads((tmp_path / "status.json").read_text())["state"] == "failed"
    assert list((tmp_path / "checkpoints").glob("*")) == [] and (tmp_path / "metrics.jsonl").read_text() == ""


def test_it_says_what_it_tried(tmp_path):
    said, asked = [], []
    section = TrainSection(batch=24, steps=2, save_every=1)
    fit(tmp_path, lora(tiny("llama")), ROWS, section, eval_rows=HELD_OUT, say=said.append, ask=asked.append)
    first, second = [line for line in said if line.startswith("preflight")]
    took = r"\d\.\d\d s"
    tried = rf"{ROWS.lengths.sum()} tokens forward and backward {took}, evaluation {took}, checkpoint {took}"
    assert re.fullmatch(rf"preflight: {tried}, answers {took}", first), first
    free = (
        r"preflight: [\d.]+ GiB of memory free; about [\d.]+ KiB of disk \([\d.]+ KiB a checkpoint\), [\d.]+ GiB free"
    )
    assert re.fullmatch(free, second), second
    assert said.index(second) < next(number for number, other in enumerate(said) if other.startswith("eval"))
    assert asked[0] == 2


@pytest.mark.parametrize("place", ["save", "ask"])
def test_what_cannot_be_done_at_the_end_ends_the_run_at_its_start(tmp_path, place):
    def fail(*_):
        raise ValueError("this cannot be written")

    how = {"write": fail} if place == "save" else {"ask": fail}
    with pytest.raises(ValueError, match="cannot be written"):
        fit(tmp_path, lora(tiny("llama")), ROWS, SECTION, kind="full" if place == "save" else "lora", **how)
    assert (tmp_path / "metrics.jsonl").read_text() == "" and not list(tmp_path.glob(".adapter.*"))


def test_nothing_of_it_changes_a_number(tmp_path, monkeypatch):
    """Dropout of the adapters and of the base model, which draws in sequence; an answer that draws as well."""
    section = TrainSection(batch=8, steps=4, lr=3e-3, base_dropout=True)

    def run(path):
        model = lora(tiny("opt", dropout=0.3), lora_dropout=0.1)
        outcome = fit(path, model, ROWS, section, eval_rows=HELD_OUT)
        return outcome.losses, trained(model)

    losses, weights = run(tmp_path / "with")
    monkeypatch.setattr(Training, "preflight", lambda self: None)
    others, bare = run(tmp_path / "without")
    assert losses == others
    assert all(torch.equal(value, bare[name]) for name, value in weights.items())


def test_on_going_on_the_optimizer_has_its_memory_already(tmp_path, monkeypatch):
    reserved, real = [], Preflight.passes
    monkeypatch.setattr(Preflight, "passes", lambda self, *parts: reserved.append(parts[3]) or real(self, *parts))
    model = lora(tiny("llama"))
    fit(tmp_path, model, ROWS, SECTION)
    newest = checkpoint.latest(tmp_path / "checkpoints")
    assert newest is not None
    fit(tmp_path, lora(tiny("llama")), ROWS, SECTION.model_copy(update={"steps": 6}), resume=newest)
    assert reserved == [8 * sum(value.numel() for value in trained(model).values()), 0]


@pytest.mark.parametrize("tokens", [64, 80, 90, 128, 512])
@pytest.mark.parametrize("route", ["engine", "plain"])
def test_no_pass_of_the_run_is_larger_than_what_was_tried(tmp_path, monkeypatch, tokens, route):
    rows = random_rows(60, longest=50)
    real, sizes = Gradients.loss, []

    def watched(self, part, step=0, module=None):
        sizes.append(part.mask.nbytes)
        return real(self, part, step, module)

    monkeypatch.setattr(Gradients, "loss", watched)
    if route == "plain":
        monkeypatch.setattr("luthier.training.start.choose_route", lambda *_, **__: ("plain", True))
    marks = []
    tried = Preflight.forget
    monkeypatch.setattr(Preflight, "forget", lambda self: marks.append(len(sizes)) or tried(self))
    section = TrainSection(batch=12, steps=10, lr=1e-3, tokens_per_pass=tokens)
    fit(tmp_path, lora(tiny("llama")), rows, section, proof=False)
    begin, end = marks
    assert max(sizes[end:]) <= max(sizes[begin:end]) <= tokens + min(rows.lengths)


@pytest.mark.parametrize("place", ["evaluation", "answers"])
def test_what_memory_has_no_room_for_later_is_one_line_now(tmp_path, monkeypatch, place):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    ask = full if place == "answers" else None
    if place == "evaluation":
        real = Gradients.loss
        monkeypatch.setattr(
            Gradients, "loss", lambda self, part, *rest: real(self, part, *rest) if torch.is_grad_enabled() else full()
        )
    with pytest.raises(RunError) as error:
        fit(tmp_path, lora(tiny("llama")), ROWS, SECTION, eval_rows=HELD_OUT, ask=ask, proof=False)
    told = {
        "evaluation": r"preflight: the longest row, rows\.jsonl:\d+ with \d+ tokens, does not fit .* takes less",
        "answers": r"preflight: the answers to generate\.prompts do not fit into memory; .* generate\.max_new_tokens",
    }
    assert re.fullmatch(told[place], str(error.value))

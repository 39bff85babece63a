"""Shared prefixes: one gradient and one curve, whether what rows have in common is computed once or in each of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from luthier.data.pack import passes
from luthier.engine.dropout import keyed
from luthier.engine.forward import adopt
from luthier.engine.rungs import rungs
from luthier.sections import EngineSection, TrainSection
from luthier.training.distributed import World
from luthier.training.gradients import Gradients
from luthier.training.start import recompute_activations
from rows import Rows, fit, lora, tiny

FAMILIES = ("llama", "qwen2", "gemma", "gemma2", "opt", "glm", "phi3", "mistral", "yuan")
OFF = EngineSection(shared_prefixes=False)


def rows_of_a_tree(seed: int = 0) -> Rows:
    """A system prompt of 14 tokens (longer than the windows of 8) over two documents of 12, four questions each, of
    which one is a document alone and two are equal; a row under the system prompt; two apart. A third teach it all."""
    generator = np.random.default_rng(seed)

    def tokens(count: int) -> list[int]:
        return generator.integers(3, 61, count).tolist()

    system, documents = tokens(14), [[5, *tokens(11)], [6, *tokens(11)]]
    rows = [system + documents[i % 2] + [7 + i, *tokens(int(generator.integers(2, 9)))] for i in range(8)]
    rows += [rows[3], system + documents[0], [*system, 20, *tokens(4)], tokens(9), tokens(17)]
    return Rows([(row, 0 if i % 3 == 0 else min(len(row) - 1, 20)) for i, row in enumerate(rows)])


ROWS = rows_of_a_tree()


def gradient(model: Any, engine: EngineSection, tokens: int = 1000) -> tuple[float, dict[str, torch.Tensor]]:
    world = World.alone(torch.device("cpu"))
    adopt(model)
    model.train().zero_grad()
    with keyed(model, 3), rungs(model, engine):
        gradients = Gradients(model, "engine", world, 3, pad_id=0, autocast=None, beat=lambda: None, engine=engine)
        found = gradients.of_step(ROWS, np.arange(len(ROWS)), 1, tokens, None)
    return found.loss.item(), {n: value.grad.clone() for n, value in model.named_parameters() if value.requires_grad}


def furthest(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    floor = 1e-2 * max(value.norm() for value in expected.values())
    return max(((found[name] - value).norm() / max(value.norm(), floor)).item() for name, value in expected.items())


@pytest.mark.parametrize("family", FAMILIES)
def test_the_gradient_is_that_of_rows_by_themselves(family: str) -> None:
    """With dropout, in one pass and in three, computed again and not, by either attention."""
    model = lora(tiny(family), init_lora_weights=False, lora_dropout=0.2)
    loss, expected = gradient(model, OFF)
    (whole,) = passes(ROWS, np.arange(len(ROWS)), 1000, shared=True)
    assert whole.ids.size < 0.6 * whole.length
    assert max(len({node for node in _chain(whole, n)}) for n in range(len(whole.segments))) == 3
    for engine in (EngineSection(), EngineSection(fast_attention=False, fused_lora=False, fused_layers=False)):
        other, found = gradient(model, engine)
        assert other == pytest.approx(loss, rel=1e-6)
        assert furthest(found, expected) < 1e-5
    assert furthest(gradient(model, EngineSection(), tokens=60)[1], expected) < 1e-5
    recompute_activations(model)
    assert furthest(gradient(model, EngineSection(), tokens=60)[1], expected) < 1e-5


def _chain(part: Any, number: int) -> list[int]:
    return [] if number < 0 else [*_chain(part, part.segments[number].parent), number]


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_where_the_head_trains_too(family: str) -> None:
    """Full fine-tuning; Llama's head is its embedding."""
    model = tiny(family, tied=family == "llama")
    loss, expected = gradient(model, OFF)
    other, found = gradient(model, EngineSection())
    assert other == pytest.approx(loss, rel=1e-6) and furthest(found, expected) < 1e-5


def test_a_run_has_the_same_curve_and_says_what_it_saved(tmp_path: Path) -> None:
    section = TrainSection(batch=8, steps=5, lr=0.01, warmup=1, save_every=5, tokens_per_pass=1000)
    lines: list[str] = []
    curves = []
    for name, engine in (("on", EngineSection()), ("off", OFF)):
        model = lora(tiny("qwen2"), init_lora_weights=False, lora_dropout=0.1)
        fit(tmp_path / name, model, ROWS, section, engine=engine, say=lines.append)
        metrics = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text("utf-8").splitlines()]
        curves.append([(line["loss"], line["grad_norm"]) for line in metrics])
        proof = json.loads((tmp_path / name / "proof.json").read_text("utf-8"))
        assert proof["path"] == "engine" and ("shared_prefixes" in proof["rungs"]) == (name == "on")
        assert all((line["computed"] < line["tokens"]) == (name == "on") for line in metrics)
    assert curves[0] == [pytest.approx(pair, rel=1e-5) for pair in curves[1]]
    said = [line for line in lines if "shared" in line]
    assert len(said) == 1 and said[0].startswith("shared prefixes: ")

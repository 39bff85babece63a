"""Every cell of the matrix: what `luthier.matrix` says of it is what happens, on a tiny real model of the family.

`make test` takes sixty of them: each kind in each format, each family in each format. `make test-full` takes all, and
each unquantised one in bf16 as well. Sabotages, each seen to fail: a verdict of yes for `full` on int8, or of no for it
unquantised; an adapter's file without one of its tensors; an optimizer's moments left out of a checkpoint; packed rows
that see the row before them; a merge at 1.01 of the scale; a tensor that the optimizer does not have.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import trials
from trials import EVERY, ROWS, Training, attached, copies, load, logits, silent, trainable

from luthier import verbs
from luthier.data.pack import pack, pad
from luthier.engine.forward import adopt
from luthier.engine.rungs import rungs
from luthier.errors import ModelError, RecipeError
from luthier.folder import RunFolder
from luthier.matrix import COLUMNS, FAMILIES, FORMATS, unquantised, verdict
from luthier.merge import merge
from luthier.methods import METHODS, trains_base, whole
from luthier.models.adapters import adapter_off, fill_adapter, load_adapter, save_adapter
from luthier.quiet import quiet
from luthier.recipe import load_recipe
from luthier.run import Run
from luthier.sections import EngineSection, MethodSection
from luthier.training.start import recompute_activations
from tiny import moved

HELD = {"fp32": "none", "int8": "int8", "nf4": "nf4", "bf16": "none"}
"""How a base is held here, and the format of the matrix that it stands for."""
SAMPLED = 3
"""Of them: those that `make test` tries; 16 bits are below int8 and NF4 as well."""
EXACT = 1e-5
"""fp32: packed and apart differ by the order of their sums, below 1e-6 of a gradient where it was looked at."""
ROUNDED = 0.2
"""bf16 has 8 bits, and packed rows are rounded in other places: 0.16 of a gradient was the most (OPT's, whose
layers all have biases; LoRA's sums are rounded in another order than PEFT's), and 1e-3 of the loss."""


FAR = {
    **dict.fromkeys(("pissa", "olora"), {True: 1e-5, False: 0.2}),
    **dict.fromkeys(("ln_tuning", "freeze", "full"), {False: 0.3}),
}
"""How far the loaded result's logits, of about 4, may be off, by kind and whether all is in fp32: B·A − B₀·A₀ is one
product there; and what trained in fp32 is held in bf16 again. Elsewhere not by a bit."""
VIRTUAL = ("prompt", "prefix", "p_tuning")
"""Kinds that are not the base before the first step."""


def all_cells() -> list[Any]:
    """Each kind begins with another family, and goes on by three for each format: eleven families come round in
    twenty kinds."""
    families, found = list(FAMILIES), []
    for number, kind in enumerate(METHODS):
        for place, held in enumerate(HELD):
            now = families[(number + 3 * place) % len(families)] if place < SAMPLED else None
            for family in families:
                marks = () if family == now else pytest.mark.full
                found.append(pytest.param(kind, family, held, marks=marks))
    return found


@pytest.fixture(autouse=True)
def _quiet() -> None:
    quiet()


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folders of tiny models by family."""
    made: dict[str, Path] = {}

    def base(family: str) -> Path:
        if family not in made:
            made[family] = trials.write_base(family, tmp_path_factory.mktemp(family))
        return made[family]

    return base


@pytest.mark.parametrize(("kind", "family", "held"), all_cells())
def test_a_cell(tmp_path: Path, bases: Callable[[str], Path], kind: str, family: str, held: str) -> None:
    if held in ("int8", "nf4"):
        pytest.importorskip("bitsandbytes")
    said = verdict(kind, family, HELD[held])
    if said["packed"]:
        assert set(said.values()) == {said["packed"]}
        check_refused(tmp_path, kind, held, said["packed"])
        return
    assert {column for column, why in said.items() if why} <= {"merge"}
    base = bases(family)
    plain, model = logits(load(base, held)), attached(load(base, held), kind)
    widened = held != "fp32" and trains_base(MethodSection(kind=kind))  # to fp32: it rounds no more
    if kind not in VIRTUAL and not widened:
        far = 0.2 if kind == "boft" and held != "fp32" else 0  # PEFT takes the bias off and puts it on: bf16 rounds
        torch.testing.assert_close(logits(model), plain, rtol=0, atol=far)  # before the first step it is the base
    adopt(model)
    before = copies(model)
    training = Training(model)
    losses = [training.step(), training.step()]
    saved = training.save(tmp_path / "checkpoints")
    losses += [training.step(), training.loss()]
    assert losses[-1] < losses[0] - 5e-3, losses
    third = copies(model)
    assert [name for name, value in third.items() if torch.equal(value, before[name])] == [], "did not move"
    check_resumed(attached(load(base, held), kind), saved, third)
    tuned = logits(model)
    assert (tuned[-len(plain) :] - plain).abs().max() > 1e-2
    save_adapter(model, tmp_path / "result", trials.TOKENIZER)
    again = load(tmp_path / "result", held) if whole(kind) else load_adapter(load(base, held), tmp_path / "result")
    far = FAR.get(kind, {}).get(held == "fp32", 0.0)
    torch.testing.assert_close(logits(again), tuned, rtol=0, atol=far)
    if far < 1e-3:
        assert trials.answers(again) == trials.answers(model)
    if not whole(kind):
        check_adapters([again] if widened else [again, model], plain)
        if kind != "p_tuning":  # whose folder has what its network gives, and not the network
            fill_adapter(moved(model), tmp_path / "result")
            assert torch.equal(logits(model), tuned), "filled again, it is the model that trained"
    check_merged(base, tmp_path / "result", tmp_path / "merged", kind, said["merge"])


def check_refused(path: Path, kind: str, held: str, reason: str) -> None:
    """Before anything is loaded: the model is not even there."""
    (path / "rows.jsonl").write_text('{"prompt": "a", "response": "b"}\n')
    (path / "r.yaml").write_text(
        f"model: {{name: ./none, quantize: {held}}}\ndata: {{train: rows.jsonl}}\nmethod: {{kind: {kind}}}\n"
    )
    with pytest.raises(RecipeError) as caught:
        load_recipe(path / "r.yaml")
    assert f"{kind} {reason}" in str(caught.value)


def check_resumed(model: Any, saved: Path, third: dict[str, torch.Tensor]) -> None:
    """A fresh model, two steps from the checkpoint. In it rows packed give the loss and the gradients of rows apart,
    which transformers computes; activations computed again, the very same; and the third step is that of the model
    that was never stopped, bit for bit."""
    training = Training(model)
    training.resume(saved)
    apart = trials.with_gradients(model, pad(ROWS, EVERY, 0), "plain")
    adopt(model)
    with rungs(model, EngineSection()):
        packed = trials.with_gradients(model, pack(ROWS, EVERY))
    recompute_activations(model)
    with rungs(model, EngineSection()):
        again = trials.with_gradients(model, pack(ROWS, EVERY))
    rounded = any(value.dtype == torch.bfloat16 for value in model.parameters())
    tolerance = ROUNDED if rounded else EXACT
    assert packed[0] == pytest.approx(apart[0], rel=tolerance / 20)
    largest = max(value.norm() for value in apart[1].values())
    for name, value in apart[1].items():
        assert (packed[1][name] - value).norm() <= tolerance * max(value.norm(), 1e-2 * largest), name
    assert again[0] == packed[0]
    assert [name for name, value in again[1].items() if not torch.equal(value, packed[1][name])] == []
    training.step()
    assert [name for name, value in copies(model).items() if not torch.equal(value, third[name])] == []


def check_adapters(models: list[Any], plain: torch.Tensor) -> None:
    """Switched off, they are the base to the last bit; what trains, trains on."""
    assert not trainable(models[0]), "loaded, it is for answers"
    for model in models:
        names = list(trainable(model))
        with adapter_off(model):
            assert torch.equal(logits(model), plain)
        assert list(trainable(model)) == names


def check_merged(base: Path, result: Path, out: Path, kind: str, reason: str) -> None:
    """One folder that is the result on the unquantised base, in fp32; or the line that says why there is none."""
    if reason:
        with pytest.raises(ModelError, match="cannot be merged; ship its folder"):
            merge(base, result, out, "fp32", say=silent)
        return
    merge(base, result, out, "fp32", say=silent)
    wanted = load(result, "fp32") if whole(kind) else load_adapter(load(base, "fp32"), result)
    torch.testing.assert_close(logits(load(out, "fp32")), logits(wanted), rtol=0, atol=1e-4)


# -- the verdicts -----------------------------------------------------------------------------------------------------


def test_the_sample_has_every_pair_with_a_format() -> None:
    sample = [cell.values for cell in all_cells() if not cell.marks]
    assert len(all_cells()) == len(METHODS) * len(FAMILIES) * len(HELD)
    for held in list(HELD)[:SAMPLED]:
        assert {kind for kind, _, there in sample if there == held} == set(METHODS)
        assert {family for _, family, there in sample if there == held} == set(FAMILIES)
    assert set(HELD.values()) == set(FORMATS)
    assert len({(kind, family) for kind, family, _ in sample}) == 3 * len(METHODS)


def test_what_a_verdict_says() -> None:
    assert verdict("lora", "yuan2", "nf4") == dict.fromkeys(COLUMNS, "")
    assert verdict("full", "llama", "int8") == dict.fromkeys(
        COLUMNS,
        "trains every weight, and weights in int8 (model.quantize) cannot be trained; take lora, or "
        "model.quantize: none",
    )
    assert verdict("prompt", "opt", "none") == {**dict.fromkeys(COLUMNS, ""), "merge": METHODS["prompt"].reason}
    assert unquantised("lokr", "nf4", "generate.quantize").endswith("; take lora, or generate.quantize: int8")


@pytest.mark.parametrize("kind", [kind for kind, method in METHODS.items() if not method.merges])
def test_a_merge_is_refused_with_the_verdicts_reason(tmp_path: Path, kind: str) -> None:
    """Before model or data are looked for."""
    (tmp_path / "r.yaml").write_text(
        f"model: {{name: ./none}}\ndata: {{train: none.jsonl}}\nmethod: {{kind: {kind}}}\n"
    )
    folder = RunFolder(tmp_path / "run")
    run = Run(folder, load_recipe(tmp_path / "r.yaml", check_files=False))
    with pytest.raises(RecipeError) as caught:
        verbs.merge(run, tmp_path / "out")
    assert str(caught.value) == f"{folder.shown}: {kind} cannot be merged: {verdict(kind, 'llama', 'none')['merge']}"

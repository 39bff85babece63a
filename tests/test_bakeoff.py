"""Methods side by side: each run is what it would be alone, the table says what was measured, none is trained twice."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from luthier import bakeoff
from luthier.bakeoff import checked, compare_methods, twin
from luthier.errors import LuthierError, RecipeError, RunError
from luthier.history import read_lines
from luthier.loaded import load_data
from luthier.methods import METHODS
from luthier.models.adapters import attach
from luthier.models.load import load_model
from luthier.models.soft_prompts import VIRTUAL_TOKENS
from luthier.quiet import quiet
from luthier.recipe import load_recipe, with_method
from luthier.replies import Question, Reply
from luthier.run import load_run, open_run, train
from luthier.scores import Score, differences, figures
from luthier.sections import MethodSection, ModelSection
from luthier.strength import drawn_rows, losses
from shell import luthier
from tiny import moved, tiny_llama, tiny_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
IDS = torch.tensor([[5, 9, 200, 31, 77, 140, 8, 6]])


def silent(line: str) -> None:
    """Say nothing."""


@pytest.fixture
def town(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe with LoRA r 4 at a rate of its own, twelve rows, of which four are held out."""
    quiet()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "cache"))
    tiny_llama(tmp_path / "model")
    rows = [{"prompt": f"Where is {i}?", "response": f"In town {i % 3}."} for i in range(12)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "town.yaml").write_text(
        "model: {name: ./model}\ndata: {train: rows.jsonl, eval: 4}\n"
        "method: {kind: lora, r: 4, dropout: 0.1}\n"
        "train: {batch: 4, steps: 3, lr: 1e-2, warmup: 0, seed: 7}\n"
        "generate: {prompts: [你好], max_new_tokens: 3}\nmerge: {dtype: fp32}\n"
    )
    return tmp_path / "town.yaml"


# -- the whole ---------------------------------------------------------------------------------------------------------


def test_each_run_is_what_it_would_be_by_itself(town: Path) -> None:
    """full before LoRA: had it moved the shared base, LoRA's numbers would be others."""
    said: list[str] = []
    found = compare_methods(town, ["full", "lora", "prompt"], rows=3, say=said.append).figures
    assert found is not None
    assert [line for line in said if line.startswith("\n──")] == [
        f"\n── {title}, seed {seed} ── {number} of 6\n"
        for number, (title, seed) in enumerate(
            ((title, seed) for title in ("full", "LoRA", "prompt tuning") for seed in (7, 8)), start=1
        )
    ]
    assert sum(line.startswith("model: ") for line in said) == 1, "one loaded base"
    assert sum(line.startswith("engine = reference") for line in said) == 3, "proven once a method"
    methods = {one["kind"]: one for one in found["methods"]}
    for kind in methods:
        shared = open_run(f"runs/town-{kind}-8")
        alone = train(shared.folder.recipe, ["run=alone-" + kind], say=silent, proof=False)
        for file in (alone.folder.path).glob("*/*model*.safetensors"):
            here = load_file(shared.folder.path / file.relative_to(alone.folder.path))
            assert here.keys() == (there := load_file(file)).keys()
            assert all(torch.equal(here[name], there[name]) for name in here), kind
        seed = methods[kind]["seeds"][1]
        assert (seed["seed"], seed["run"]) == (8, f"runs/town-{kind}-8")
        assert [step for step, _ in seed["curve"]] == [0, 2, 3]
    assert methods["lora"]["settings"]["r"] == 4 and methods["lora"]["rate"] == 0.01, "as the recipe has it"
    assert methods["lora"]["why"] == "the recipe's own"
    assert methods["full"]["rate"] != 0.01 and methods["full"]["why"] == METHODS["full"].why
    assert methods["prompt"]["trainable"] == VIRTUAL_TOKENS["prompt"] * 64 and not methods["prompt"]["mergeable"]
    assert methods["full"]["trainable"] == methods["full"]["total"]
    assert found["best"] == found["methods"][0]["kind"] and found["methods"][0]["difference"] is None
    assert (found["seeds"], found["steps"], found["rows"]["scored"]) == ([7, 8], 3, 3)

    stamps = {path: path.stat().st_mtime_ns for path in Path("runs").glob("town-*/metrics.jsonl")}
    again: list[str] = []
    assert compare_methods(town, ["full", "lora", "prompt"], rows=3, say=again.append).figures == found
    assert sum(line.endswith("trained already") for line in again) == 6
    assert stamps == {path: path.stat().st_mtime_ns for path in Path("runs").glob("town-*/metrics.jsonl")}


@pytest.mark.full
def test_another_recipe_is_another_run(town: Path) -> None:
    compare_methods(town, ["lora", "ia3"], say=silent)
    said: list[str] = []
    compare_methods(town, ["lora", "ia3"], ["generate.max_new_tokens=2"], say=said.append)
    assert sum(line.endswith("trained already") for line in said) == 4, "which trains nothing"
    other = compare_methods(town, ["lora", "ia3"], ["train.steps=2"], say=silent).figures
    assert other is not None and {len(one["curve"]) for m in other["methods"] for one in m["seeds"]} == {2}
    assert Path("runs/town-lora-7-2").is_dir()
    weights = town.parent / "model" / "model.safetensors"
    os.utime(weights, ns=(0, 0))
    compare_methods(town, ["lora", "ia3"], say=silent)
    assert Path("runs/town-lora-7-3").is_dir(), "other weights at the same place"


def test_what_the_table_says_is_what_the_saved_runs_do(town: Path) -> None:
    found = compare_methods(town, ["prefix", "p_tuning", "prompt"], rows=4, say=silent).figures
    assert found is not None
    for method in found["methods"]:
        of_seeds = []
        for seed in method["seeds"]:
            loaded = load_run(run := open_run(seed["run"]))

            rows = drawn_rows(load_data(run.recipe, loaded.encoder, silent).eval, loaded.encoder, 4)
            curve = [line["eval_loss"] for line in read_lines(run.folder.metrics) if line["eval_loss"] is not None]
            assert seed["figures"]["loss"] == pytest.approx(min(curve[1:]), rel=1e-5), (
                "PEFT's forward, and the engine's"
            )
            measured = list(losses(loaded.model, rows, lambda: None))
            of_seeds.append(sum(loss for loss, _ in measured) / sum(count for _, count in measured))
            assert seed["figures"]["loss"] == pytest.approx(of_seeds[-1], rel=1e-6)
            asked = next(one for one in found["answers"] if one["prompt"] == "你好")
            assert asked["replies"].keys() == {"base", "prefix", "p_tuning", "prompt"}
        assert method["figures"]["loss"] == pytest.approx(sum(of_seeds) / 2, rel=1e-6)
    page = Path("runs/town-methods/methods.html")
    assert json.loads(page.with_suffix(".json").read_text()) == json.loads(json.dumps(found))
    assert "你好" in page.read_text() and "prefix" in page.with_suffix(".md").read_text()


@pytest.mark.full
def test_a_method_that_breaks_off_is_told_and_the_others_go_on(town: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = bakeoff.carried

    def breaks(bench: Any, *rest: Any, **named: Any) -> Any:
        if bench.recipe.method.kind == "prefix":
            raise RunError("step 2: loss nan")
        return there(bench, *rest, **named)

    def full(*_: Any) -> Score:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(bakeoff, "carried", breaks)
    said: list[str] = []
    found = compare_methods(town, ["prefix", "lora"], say=said.append).figures
    assert found is not None and found["best"] == "lora"
    last = found["methods"][-1]
    assert (last["kind"], last["failed"], last["figures"], last["seeds"]) == ("prefix", "step 2: loss nan", None, [])
    assert "prefix: step 2: loss nan" in said and not any("prefix tuning, seed 8" in line for line in said)
    monkeypatch.setattr(bakeoff, "_scored", full)
    none = compare_methods(town, ["ia3", "lora"], say=silent).figures
    assert none is not None and none["best"] is None
    assert [one["failed"] for one in none["methods"]] == ["out of memory", "out of memory"]


@pytest.mark.full
def test_on_the_command_line(town: Path) -> None:
    done = luthier(town.parent, "compare", "--methods", "lora,prompt", "town.yaml", "train.steps=1", "--rows", "2")
    assert done.returncode == 0, done.stderr
    assert "prompt tuning" in done.stdout and done.stdout.splitlines()[-1].startswith("next: luthier ")
    assert "Traceback" not in done.stderr


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        (["lora", "prefx"], "--methods: there is no method prefx; did you mean prefix?"),
        (["lora", "lora"], "--methods: lora is named twice"),
        (["lora", " "], "--methods: name two at least, as lora,p_tuning"),
    ],
)
def test_methods_that_cannot_be(methods: list[str], message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        checked(methods)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("methods", "overrides", "message"),
    [
        (["lora", "freeze"], ["model.quantize=nf4"], "freeze: method.kind: freeze trains whole layers"),
        (["lora", "full"], ["train.min_lr=0.009"], "train.min_lr: 0.009 is above the learning rate 0.000"),
        (["lora", "prompt"], ["data.eval=null"], "nothing to compare methods by: give data.eval"),
        (["lora", "prompt"], ["train.devices=[cpu, cpu]"], "train.devices: the methods of a comparison are trained on"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_a_run(
    town: Path, methods: list[str], overrides: list[str], message: str
) -> None:
    with pytest.raises(LuthierError) as caught:
        compare_methods(town, methods, overrides, say=silent)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not Path("runs").exists()


def test_options_that_do_not_go_together(town: Path) -> None:
    for arguments, message in (
        (["town.yaml", "--methods", "lora,ia3", "--strength"], "--strength is of a run, --methods of a recipe"),
        (["town.yaml", "train.steps=1"], "train.steps=1 goes with --methods"),
        (["town.yaml", "--seeds", "3"], "--seeds goes with --methods"),
        (["town.yaml", "--methods", "lora,ia3", "--rows", "0"], "--rows: 1 at least with --methods"),
    ):
        done = luthier(town.parent, "compare", *arguments)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1) and message in done.stderr


# -- its parts ---------------------------------------------------------------------------------------------------------


def test_another_method_takes_its_own_keys_and_rate(town: Path) -> None:
    recipe = load_recipe(town)
    same, other = with_method(recipe, "lora", 8), with_method(recipe, "prefix", 8)
    assert (same.method, same.train.lr, same.train.seed, same.merge) == (recipe.method, 0.01, 8, recipe.merge)
    assert other.method == MethodSection(kind="prefix") and other.train.lr == "auto"
    assert (other.train.batch, other.train.steps, other.data) == (4, 3, recipe.data)


@pytest.mark.parametrize("quantize", ["none", "int8", "nf4"])
def test_a_twin_shares_every_number_and_no_module(tmp_path: Path, quantize: Any) -> None:
    base = tiny_llama(tmp_path / "base")
    load: Callable[[], Any] = lambda: load_model(  # noqa: E731
        base, ModelSection(name="tiny", quantize=quantize), torch.device("cpu"), say=silent
    )
    model = load().eval()
    with torch.no_grad():
        before = model(IDS).logits
    for kind in ("lora", "prefix", "bottleneck", "llama_adapter"):
        adapted = attach(
            twin(model, weights=False), MethodSection(kind=kind), 1, say=silent, tokenizer=tiny_tokenizer()
        )
        own = {id(value) for value in model.parameters()}
        assert own <= {id(value) for value in adapted.parameters()}
        with torch.no_grad():
            assert not torch.equal(moved(adapted).eval()(IDS).logits, before), kind
            assert torch.equal(model(IDS).logits, before), "the model itself is as it was"
    apart = twin(model, weights=True)
    assert not {id(value) for value in model.parameters()} & {id(value) for value in apart.parameters()}


def test_figures_of_seeds_are_means_and_differences_are_paired() -> None:
    questions = [Question(f"e:{i}", "?", [1], "yes") for i in range(4)]
    yes, no = Reply("yes", [1], True), Reply("no", [1], False)
    base = Score([(8.0, 2)] * 4, [(20.0, 10)], [no] * 4)
    one = Score([(2.0, 2)] * 4, [(21.0, 10)], [yes, yes, yes, no])
    two = Score([(4.0, 2)] * 4, [(23.0, 10)], [yes, no, no, no])
    found = figures([one, two], base, questions)
    assert (found["loss"], found["exact"], found["exact_share"], found["stopped_share"]) == (1.5, 2.0, 0.5, 0.5)
    assert found["perplexity_change"] == pytest.approx(2.718281828**0.2 - 1)
    apart = differences([two], [one], questions)
    assert apart["loss"] == (1.0, 1.0)
    assert apart["exact"] is not None and apart["exact"][0] == -1.0 and apart["exact"][1] == 0.0
    assert differences([one], [one], questions)["exact"] == (0.0, 0.0)

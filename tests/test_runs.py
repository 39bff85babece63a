"""`luthier runs`: every state in the list, one run on a screen, runs side by side, stopped, cleaned without loss."""

from __future__ import annotations

import json
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import psutil
import pytest
from rich.cells import cell_len
from rich.console import Console

from luthier import runs
from luthier.errors import RecipeError, RunError
from luthier.folder import RunFolder
from luthier.history import History, place, read_history
from luthier.recipe import save_recipe
from luthier.sections import Recipe
from luthier.view.runscompare import cautions, compare_html, differing, final_figures, plot, show_compared
from luthier.view.runsview import blocks, facts, next_steps, show_list, show_run, written
from shell import ENVIRONMENT, LUTHIER, begin, luthier, well

NOW = time.time()
DATA = {"train": "/x/train.jsonl", "eval": "/x/eval.jsonl"}
PARTS = ("train", "eval")
EVIL = "<b>x</b> [red]\x1b[31m"


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def line(step: int, loss: float | None, eval_loss: float | None = None) -> dict[str, Any]:
    """A line of metrics.jsonl."""
    trained = {"lr": 1e-3, "grad_norm": 1.0, "tokens": 100, "supervised": 40, "rows": 4, "passes": 1}
    known = (
        trained | {"tokens_per_second": 500.0} if loss is not None else dict.fromkeys([*trained, "tokens_per_second"])
    )
    always = {"step": step, "epoch": step / 10, "time": NOW, "memory_gib": 0.5, "gpu": None}
    return always | {"loss": loss, "eval_loss": eval_loss} | known


def run(
    name: str,
    state: str = "done",
    *,
    lines: list[dict[str, Any]] | None = None,
    checkpoints: tuple[int, ...] = (),
    adapter: bool = False,
    sections: dict[str, Any] | None = None,
    data: dict[str, Any] | None = None,
    **status: Any,
) -> RunFolder:
    """A run's folder as training leaves it, below ./runs; "running" is this process, "dead" one that never was."""
    folder = RunFolder(Path("runs").absolute() / name)
    folder.checkpoints.mkdir(parents=True)
    given: dict[str, Any] = {"model": {"name": "m"}, "data": DATA}
    save_recipe(Recipe.model_validate({**given, **(sections or {}), "run": name}), folder.recipe)
    lines = [line(0, None, 5.0), line(1, 4.0), line(2, 2.0, 3.0), line(3, 1.5)] if lines is None else lines
    folder.metrics.write_text("".join(json.dumps(one) + "\n" for one in lines))
    me = psutil.Process()
    told = {"state": "running" if state == "dead" else state, "phase": "training", "step": 3, "steps": 10}
    told |= {"steps_per_epoch": 10, "usual": 1.0, "seconds": 3.0, "left": None, "time": NOW, "progress": NOW}
    told |= {"hung": False, "pid": me.pid, "born": me.create_time() - 99 * (state == "dead"), "place": place()}
    told |= {"memory_gib": 0.4, "gpu": None, "message": ""}
    folder.status.write_text(json.dumps(told | status))
    rows = {"train_rows": 12, "eval_rows": 4, "train_tokens": 300, "supervised_tokens": 120, "template_sha256": "t"}
    sources = [{"path": f"/x/{part}.jsonl", "part": part, "sha256": part, "rows": 9, "weight": 1.0} for part in PARTS]
    folder.data.write_text(json.dumps(rows | {"sources": sources} | (data or {})))
    for step in checkpoints:
        place_of = folder.checkpoints / f"step-{step:06d}"
        place_of.mkdir()
        (place_of / "state.json").write_text("x" * 1000)
    if adapter:
        folder.adapter.mkdir()
        (folder.adapter / "adapter_model.safetensors").write_text("x" * 5000)
    return folder


def printed(show: Callable[[Console], None], width: int = 80, **console: Any) -> str:
    screen = Console(file=StringIO(), width=width, highlight=False, **console)
    show(screen)
    assert isinstance(screen.file, StringIO)
    return "\n".join(part.rstrip() for part in screen.file.getvalue().splitlines())


def glances() -> list[History]:
    return [runs.glance(folder, NOW) for folder in runs.all_runs()]


# -- the list --------------------------------------------------------------------------------------------------------


def test_the_list_tells_every_state_and_aligns_chinese() -> None:
    run("a", "running", left=130.0)
    run("b", "running", hung=True, progress=NOW - 200)
    run("中文的名字", checkpoints=(3,), adapter=True)
    run("d", "stopped", time=NOW - 7200)
    run("e", "dead", lines=[])
    run("f", "failed", steps=None)
    Path("runs/no-run").mkdir()
    Path("runs/.gone.old").mkdir()
    Path("runs/.gone.old/recipe.yaml").write_text("")
    sizes = [runs.disk_bytes(folder.path) / 1024 for folder in runs.all_runs()]
    screen = printed(lambda console: show_list(glances(), console)).splitlines()
    assert [" ".join(row.split()) for row in screen] == [
        "best last",
        "name state step loss eval sign size",
        f"a running, 2 min left 3/10 1.5000 3.0000 0 s {sizes[0]:.1f} KiB",
        f"b running, hangs for 3 min 3/10 1.5000 3.0000 0 s {sizes[1]:.1f} KiB",
        f"d stopped 3/10 1.5000 3.0000 2 h {sizes[2]:.1f} KiB",
        f"e dead 3/10 – – 0 s {sizes[3]:.1f} KiB",
        f"f failed – 1.5000 3.0000 0 s {sizes[4]:.1f} KiB",
        f"中文的名字 done 3/10 1.5000 3.0000 0 s {sizes[5]:.1f} KiB",
    ]
    below = screen[1:]
    starts = {cell_len(row[: re.search(r"state|running|stopped|dead|failed|done", row).start()]) for row in below}  # type: ignore[union-attr]
    assert len(starts) == 1 and {cell_len(row) for row in below} == {cell_len(below[0])}
    assert all(cell_len(row) <= 80 for row in screen)
    wide = printed(lambda console: show_list(glances(), console), 120).splitlines()
    assert re.split(r"\s{2,}", wide[0]) == ["name", "state", "step", "loss", "best eval", "last sign", "size"]
    assert len(wide) == 7 and {cell_len(row) for row in wide} == {cell_len(wide[0])}


def test_an_evaluation_before_training_is_no_best_one() -> None:
    run("a", "failed", lines=[line(0, None, 5.0)])
    assert "failed  3/10     –          –" in printed(lambda console: show_list(glances(), console), 120)


def test_step_and_loss_are_of_one_moment_where_status_json_lags_behind() -> None:
    folder = run("a", "running", step=1, left=130.0)
    told = {history.step for history in (*glances(), read_history(folder, NOW))}
    assert told == {3} and facts(*glances())["loss"] == 1.5
    assert "3/10  1.5000" in printed(lambda console: show_list(glances(), console))
    screen = printed(lambda console: show_run(read_history(folder, NOW), console))
    assert "step 3 of 10" in screen and "4.0000 → 1.5000" in screen
    figures = dict(final_figures([read_history(folder, NOW)]))
    assert (figures["steps"], figures["last loss"]) == (["3 of 10"], ["1.5000"])


def test_a_long_name_gives_way_and_is_whole() -> None:
    run("n" * 60, "running", left=130.0, step=1234, steps=12000)
    screen = printed(lambda console: show_list(glances(), console)).splitlines()
    assert all(cell_len(row) <= 80 for row in screen) and "running, 2 min left  1234/12000" in screen[2]
    assert sum(row.count("n") for row in screen[3:]) + screen[2].split()[0].count("n") == 60


def test_json_lines() -> None:
    now = time.time()  # not NOW: an old sign of life reads as a step that hangs
    folder = run("a", "running", left=130.0, time=now, progress=now)
    run("b", "failed", time=now - 50, message="no room", lines=[])
    first, second = map(json.loads, well(Path.cwd(), "runs", "--json").splitlines())
    then = facts(runs.glance(folder, now + 7))
    assert (then["left"], then["age"]) == (123.0, 7.0)
    assert {"left", "age"} <= set(first) and first.pop("left") is not None and first.pop("age") is not None
    assert first == {
        "name": "a",
        "path": str(folder.path),
        "state": "running",
        "phase": "training",
        "hung": None,
        "step": 3,
        "steps": 10,
        "loss": 1.5,
        "eval_loss": 3.0,
        "eval_step": 2,
        "bytes": runs.disk_bytes(folder.path),
        "message": "",
    }
    assert (second["name"], second["loss"], second["message"]) == ("b", None, "no room")
    named = [json.loads(row)["name"] for row in well(Path.cwd(), "runs", "list", "--json").splitlines()]
    assert named == ["a", "b"] and "best eval" in well(Path.cwd(), "runs", "list")


def test_a_glance_tells_what_the_whole_history_tells() -> None:
    folder = run("a", "running", left=130.0)
    with folder.metrics.open("a") as file:
        file.write('{"step": 4, "loss": 0.1, "eval_loss": 0.2')  # half written
    brief, whole = runs.glance(folder, NOW), read_history(folder, NOW)
    assert facts(brief) == facts(whole) and brief.last == whole.last
    assert [one["step"] for one in brief.metrics] == [0, 2, 3]


def test_a_hundred_runs_take_under_a_second_and_no_torch() -> None:
    lines = [line(0, None, 5.0), *(line(step, 1.0, 2.0 if step % 50 == 0 else None) for step in range(1, 1000))]
    first = run("r0", lines=lines, checkpoints=(1, 2, 3))
    for number in range(1, 100):
        shutil.copytree(first.path, first.path.with_name(f"r{number}"))
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert len(well(Path.cwd(), "runs").splitlines()) == 101
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.0


def test_no_verb_of_runs_loads_torch() -> None:
    run("a", checkpoints=(3,), adapter=True)
    run("b", "stopped")
    verbs = [["runs"], ["runs", "show", "a"], ["runs", "compare", "a", "b"], ["runs", "watch", "a"]]
    code = (
        "import sys; from contextlib import suppress; from luthier.cli.main import main\n"
        f"for verb in {verbs + [['runs', 'clean', '--yes']]}:\n    sys.argv = ['luthier', *verb]\n"
        "    with suppress(SystemExit): main()\n"
        "heavy = {'torch', 'transformers', 'peft', 'datasets', 'pandas', 'pyarrow'} & set(sys.modules)\n"
        "print('heavy:', sorted(heavy))"
    )
    done = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True)
    assert done.stderr == "" and done.stdout.splitlines()[-1] == "heavy: []"
    assert not list(Path("runs/a/checkpoints").iterdir())  # they did run, to the last


def test_no_runs_yet() -> None:
    assert well(Path.cwd(), "runs") == (
        f"no runs below {Path('runs').absolute()}; begin one with: luthier train RECIPE, or luthier quickstart\n"
    )


def test_a_file_in_the_place_of_runs_is_said() -> None:
    Path("runs").touch()
    for verb in ([], ["list"], ["--json"], ["show", "town"], ["clean"]):
        told = luthier(Path.cwd(), "runs", *verb)
        assert (told.returncode, told.stderr) == (
            2,
            f"error: {Path('runs').absolute()} is a file, where the folder of all runs belongs; "
            "move it, or train elsewhere\n",
        )


def test_what_is_there_and_no_run_is_said() -> None:
    run("town", adapter=True)
    Path("tiny").mkdir()
    Path("town.yaml").touch()
    Path("recipe.yaml").touch()  # the recipe of a run to be, not of one
    none = "is a folder, but no run (there is no recipe.yaml in it)"
    for text, expected in {
        "./tiny": f"./tiny {none}",
        "tiny": f"tiny {none}",
        "runs": f"runs {none}",
        "runs/town/adapter": f"runs/town/adapter {none}; the run is runs/town",
        "town/adapter": f"runs/town/adapter {none}; the run is runs/town",
        "runs/town/recipe.yaml": "runs/town/recipe.yaml is a file; name the run's folder: runs/town",
        "town.yaml": "town.yaml is no run's folder; see `luthier runs`",
        "recipe.yaml": "recipe.yaml is no run's folder; see `luthier runs`",
    }.items():
        with pytest.raises(RecipeError) as told:
            runs.find_run(text)
        assert str(told.value) == expected


def test_a_runs_name_for_a_command_names_the_command() -> None:
    run("town 2")
    told = luthier(Path.cwd(), "runs", "town 2")
    expected = "error: town 2 is a run, no command; try: luthier runs show 'runs/town 2'\n"
    assert (told.returncode, told.stderr) == (2, expected)
    told = luthier(Path.cwd(), "runs", "sow")
    assert told.returncode == 2 and "No such command 'sow'" in told.stderr


def test_the_help_of_runs_is_short_and_whole() -> None:
    lines = well(Path.cwd(), "runs", "--help").splitlines()
    verbs = [row.split()[0] for row in lines[lines.index("Commands:") + 1 :]]
    assert verbs == ["list", "show", "watch", "stop", "compare", "clean"]
    assert not [row for row in lines if row.endswith("...") and "Usage" not in row]
    usages = {"show": "RUN", "watch": "RUN", "stop": "RUN", "compare": "RUN...", "clean": "[RUN]..."}
    for verb, names in usages.items():
        said = well(Path.cwd(), "runs", verb, "--help")
        assert said.splitlines()[0] == f"Usage: luthier runs {verb} [OPTIONS] {names}"
    assert "  Example: luthier runs clean --all town-2\n" in said


def test_a_run_goes_by_folder_or_name_and_an_unknown_one_names_the_nearest() -> None:
    folder = run("town")
    run("village")
    assert runs.find_run("town") == runs.find_run("runs/town") == runs.find_run(str(folder.path)) == folder
    with pytest.raises(RecipeError, match=r"^there is no run twon; did you mean town\?$"):
        runs.find_run("twon")
    with pytest.raises(RecipeError, match=r"^there is no run zzz; see `luthier runs`$"):
        runs.find_run("zzz")
    told = luthier(Path.cwd(), "runs", "show", "twon")
    assert (told.returncode, told.stderr) == (2, "error: there is no run twon; did you mean town?\n")


# -- one run ---------------------------------------------------------------------------------------------------------


def test_one_run_on_a_screen() -> None:
    sections = {"method": {"r": 4}, "generate": {"prompts": [EVIL]}, "train": {"lr": 0.01}}
    folder = run("a", checkpoints=(2, 3), adapter=True, sections=sections, message="best of step 2 by eval loss")
    proof = {"path": "engine", "tried": {"engine": {"loss": 1e-7, "difference": 2e-6}}, "gradients": 56}
    folder.proof.write_text(json.dumps(proof | {"rows": ["d:1", "d:2"], "format": "fp32"}))
    sides = {"base": {"exact_share": 0.0, "stopped_share": 0.5}, "tuned": {"exact_share": 0.75, "stopped_share": 1.0}}
    (folder.path / "compare.json").write_text(json.dumps({"figures": sides | {"held_out": 4}, "answers": []}))
    samples = [{"step": 0, "prompt": "old", "reply": "old", "stopped": True}]
    samples += [{"step": 3, "prompt": [{"role": "user", "content": EVIL}], "reply": "一\n二" * 40, "stopped": False}]
    folder.samples.write_text("".join(json.dumps(one) + "\n" for one in samples))
    screen = printed(lambda console: show_run(read_history(folder, NOW), console))
    assert all(cell_len(row) <= 80 for row in screen.splitlines()) and "\x1b" not in screen
    for expected in (
        "a  done  runs/a",
        "progress   step 3 of 10 in 3 s; last sign 0 s ago",
        "method     lora r 4, alpha 16 on auto",
        "data       12 rows to train on, 4 held out; 300 tokens, 40.0 % taught",
        "method.r 4 (8) · train.lr 0.01 (auto)",
        "loss       4.0000 → 1.5000    █▂▁",
        "eval loss  5.0000 → 3.0000    █▁",
        "best eval  3.0000 at step 2",
        "work       500 tokens/s, 300 tokens so far, memory 0.5 GiB at most",
        "proof      engine = reference, 2e-06 (2 rows, loss and 56 gradients; fp32)",
        "compare    0 % → 75 % of 4 held-out rows exact; 50 % → 100 % of the answers",
        "samples of step 3",
        "    <b>x</b> [red]␛[31m",
        "一 ⏎ 二一 ⏎ 二",
        "[did not stop]",
        "  adapter/       4.9 KiB  best of step 2 by eval loss",
        "  checkpoints/   2.0 KiB  step 2, 3",
        "next  luthier merge runs/a -o DIR",
    ):
        assert expected in screen
    assert "old" not in screen and "generate.prompts" not in screen


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        ("running", ["luthier runs watch 'runs/a b'", "luthier runs stop 'runs/a b'"]),
        ("done", ["luthier compare 'runs/a b'", "luthier merge 'runs/a b' -o DIR", "luthier chat 'runs/a b'"]),
        ("stopped", ["luthier train 'runs/a b' --resume"]),
        ("dead", ["luthier train 'runs/a b' --resume"]),
        ("failed", ["luthier train 'runs/a b' --resume", "luthier train 'runs/a b/recipe.yaml' KEY=VALUE"]),
    ],
)
def test_what_to_do_next(state: str, expected: list[str]) -> None:
    history = read_history(run("a b", state, checkpoints=(2,)), NOW)
    assert next_steps(history) == expected
    assert f"next  {expected[0]}" in printed(lambda console: show_run(history, console))


def test_a_command_quotes_what_a_shell_needs_quoted() -> None:
    assert next_steps(read_history(run("测试运行一号", "stopped"), NOW)) == ["luthier train runs/测试运行一号 --resume"]


NAN = "step 2: loss nan; last good checkpoint: none yet; look at train.jsonl:3, lower train.lr, or compute in fp32"
FULL = (
    "out of memory; lower train.tokens_per_pass or set train.activation_checkpointing: true, or lower data.max_length"
)
OTHERS = "  (or train.activation_checkpointing, data.max_length)"


@pytest.mark.parametrize(
    ("message", "changed"),
    [("no luck", "KEY=VALUE"), (NAN, "train.lr=VALUE"), (FULL, f"train.tokens_per_pass=VALUE{OTHERS}")],
)
def test_a_failed_run_without_a_checkpoint_is_begun_anew(message: str, changed: str) -> None:
    history = read_history(run("a", "failed", message=message), NOW)
    again = f"luthier train runs/a/recipe.yaml {changed}"
    assert next_steps(history) == [again]
    assert runs.has_ended(history) == f"failed at step 3; no checkpoint yet; begin anew with: {again}"


def test_a_run_whose_status_json_is_gone_or_damaged() -> None:
    folder = run("a", adapter=True, checkpoints=(3,))
    for spoil, why in {"damaged": "its status.json is damaged", "gone": "its status.json is gone"}.items():
        folder.status.write_text('{"sta') if spoil == "damaged" else folder.status.unlink()
        history = read_history(folder, NOW)
        screen = printed(lambda console, history=history: show_run(history, console))
        assert f"unknown    {why}\n" in screen and "killed" not in screen
        assert next_steps(history) == [
            f"luthier {verb}" for verb in ("compare runs/a", "merge runs/a -o DIR", "chat runs/a")
        ]
        assert runs.has_ended(history) == f"{why}; see: luthier runs show runs/a"
    shutil.rmtree(folder.adapter)
    assert next_steps(read_history(folder, NOW)) == ["luthier train runs/a --resume"]


def test_what_is_empty_is_no_file_worth_a_line() -> None:
    folder = run("a", "stopped")
    folder.rejected.touch()
    (folder.path / "trackers").mkdir()
    screen = printed(lambda console: show_run(read_history(folder, NOW), console))
    assert "metrics.jsonl" in screen
    assert not [name for name in ("rejected", "trackers", "checkpoints", " 0.0 KiB") if name in screen]


def test_the_speed_is_that_of_the_whole_run() -> None:
    lines = [line(1, 4.0) | {"tokens_per_second": 50.0}, line(2, 2.0), line(3, 1.0)]
    folder = run("a", lines=lines)  # 300 tokens in 2 + 0.2 + 0.2 s
    assert "125 tokens/s, 300 tokens" in printed(lambda console: show_run(read_history(folder, NOW), console))
    assert dict(final_figures([read_history(folder, NOW)]))["tokens/s"] == ["125"]


def test_a_run_that_only_begins_can_be_shown() -> None:
    folder = run("a", "running", phase="starting", lines=[], steps=None, step=0)
    folder.data.unlink()
    assert "a  running, starting  runs/a" in printed(lambda console: show_run(read_history(folder, NOW), console))
    folder.status.unlink()
    screen = printed(lambda console: show_run(read_history(folder, NOW), console))
    assert "a  dead" in screen and "it has no status.json: it has not begun to train" in screen
    folder.recipe.write_text("modle: {}\n")
    assert "unknown" in printed(lambda console: show_run(read_history(folder, NOW), console))


def test_a_curve_in_one_line() -> None:
    assert blocks([0.0, 1.0, 2.0, 7.0], 4, log=False) == "▁▂▃█"
    assert blocks([1.0, 10.0, 100.0], 3, log=True) == "▁▅█"
    assert blocks([1.0, 3.0, 5.0, 7.0], 2, log=False) == "▁█"
    assert blocks([2.0, 2.0], 9, log=False) == "▁▁"


OTHER = {"part": "eval", "path": "/x/eval.jsonl", "sha256": "new", "weight": 1.0, "rows": 1}


# -- side by side ----------------------------------------------------------------------------------------------------


def test_runs_that_may_be_compared_have_no_caution() -> None:
    histories = [read_history(run("a")), read_history(run("b", sections={"train": {"lr": 0.01}, "method": {"r": 4}}))]
    assert cautions(histories) == []
    assert differing(histories) == [("method.r", ["8", "4"]), ("train.lr", ["auto", "0.01"])]


@pytest.mark.parametrize(
    ("sections", "data", "expected"),
    [
        ({}, {"train_tokens": 301}, ["other training rows"]),
        ({}, {"sources": [OTHER]}, ["other training rows", "other eval rows"]),
        ({}, {"template_sha256": "u"}, ["other training rows", "other eval rows"]),
        ({"train": {"batch": 8}}, {}, ["other batches"]),
        ({"train": {"seed": 1}}, {}, ["other seeds"]),
        ({"data": {**DATA, "seed": 1}}, {}, ["other training rows", "other seeds"]),
        ({"model": {"name": "n"}}, {}, ["other models"]),
    ],
)  # fmt: skip
def test_what_makes_losses_not_comparable_is_said(sections: Any, data: Any, expected: list[str]) -> None:
    histories = [read_history(run("a")), read_history(run("b", sections=sections, data=data))]
    assert [one.partition(":")[0] for one in cautions(histories)] == expected


def test_figures_side_by_side() -> None:
    first, second = run("a", adapter=True), run("b", "stopped", lines=[line(1, 4.0)], seconds=250.0)
    sides = {"tuned": {"exact_share": 0.75, "stopped_share": 1.0}, "held_out": 4}
    (first.path / "compare.json").write_text(json.dumps({"figures": sides}))
    assert final_figures([read_history(first, NOW), read_history(second, NOW)]) == [
        ("state", ["done", "stopped"]),
        ("steps", ["3 of 10", "3 of 10"]),
        ("last loss", ["1.5000", "4.0000"]),
        ("eval loss before training", ["5.0000", "–"]),
        ("best eval loss", ["3.0000", "–"]),
        ("at step", ["2", "–"]),
        ("exact answers", ["75 % of 4", "–"]),
        ("answers that stopped", ["100 %", "–"]),
        ("tokens trained on", ["300", "100"]),
        ("wall time", ["3.0 s", "250 s (4 min 10 s)"]),
        ("tokens/s", ["500", "500"]),
        ("peak memory", ["0.5 GiB", "0.5 GiB"]),
        ("adapter or model", ["4.9 KiB", "–"]),
    ]


def test_curves_overlaid_as_letters() -> None:
    field = plot([[(0, 0.0), (10, 9.0)], [(0, 0.0), (5, 9.0)]], 11, log=False)
    assert (field[0], field[-1]) == ("     B    A", "*          ")
    field = plot([[(0, 1.0), (1, 10.0), (2, 100.0)]], 3, log=True)
    assert [row.index("A") for row in (field[0], field[-1])] == [2, 0] and sum(row[1] == "A" for row in field) == 1


@pytest.mark.parametrize("width", [80, 120])
def test_the_comparison_on_the_terminal(width: int) -> None:
    histories = [
        read_history(run(name, sections={"train": {"batch": i + 2}}), NOW)
        for i, name in enumerate(["甲", "[red]\x1b[31m"])
    ]
    screen = printed(lambda console: show_compared(histories, console), width)
    assert all(cell_len(row) <= width for row in screen.splitlines()) and "\x1b" not in screen
    assert "A 甲" in screen and "B [red]␛[31m" in screen and "train.batch  2" in screen
    assert "! other batches: " in screen
    titles = [row.split()[0] for row in screen.splitlines() if re.match("Figures|loss by|eval loss by|Recipes", row)]
    assert titles == ["Figures", "loss", "eval", "Recipes"]


def test_curves_that_cross_are_smoothed() -> None:
    def noisy(start: float) -> list[dict[str, Any]]:
        return [line(step, start - step / 100 + (-1) ** step / 4) for step in range(1, 121)]

    histories = [read_history(run(name, lines=noisy(start)), NOW) for name, start in (("a", 3.0), ("b", 2.9))]
    screen = printed(lambda console: show_compared(histories, console)).splitlines()
    top = screen.index("loss by step, smoothed")
    field = [row.partition("┤")[2] for row in screen[top + 1 : top + 11]]
    assert sum(row.count("B") for row in field) > 30
    assert all(re.fullmatch(r"[B* ]*[A* ]*", row) for row in field)  # they fall: B is lower, and earlier in every line
    assert all(cell_len(row) <= 80 for row in screen)


def test_the_page_stands_by_itself_and_escapes() -> None:
    names = ["a", "<i>b"]
    page = compare_html(
        [read_history(run(name, sections={"train": {"lr": (i + 1) / 10}})) for i, name in enumerate(names)]
    )
    assert "&lt;i&gt;b" in page and "<i>b" not in page and page.count("<figure") == 2
    assert not re.search(r"https?://|<script|<link", page) and "<td>train.lr</td><td>0.1</td><td>0.2</td>" in page


def test_compare_writes_its_page_and_wants_two_runs() -> None:
    run("a"), run("b")
    assert well(Path.cwd(), "runs", "compare", "a", "runs/b").splitlines()[-1] == "page: runs-compare.html"
    assert Path("runs-compare.html").read_text().startswith("<!doctype html>")
    told = luthier(Path.cwd(), "runs", "compare", "a", "runs/a")
    assert (told.returncode, told.stderr) == (2, "error: runs compare: give two runs at least, 26 at most\n")


# -- watching and stopping -------------------------------------------------------------------------------------------


ON = "newest checkpoint: step 2; go on with: luthier train runs/a --resume"
REACH = "out of reach from here; stop it there"
NONE = 2**22 + 1  # no process has this number
CONTAINER = f"{place().split()[0]} pid:[1]"


def test_watching_a_run_that_has_ended_returns() -> None:
    run("a", "stopped", message="last", checkpoints=(2,))
    told = well(Path.cwd(), "runs", "watch", "a").splitlines()[-1]
    assert told == f"runs/a: stopped at step 3; {ON}"


def test_ctrl_c_while_watching_leaves_the_run_alone() -> None:
    run("a", "running")
    watching = subprocess.Popen([LUTHIER, "runs", "watch", "a"], env=ENVIRONMENT, stdout=subprocess.PIPE, text=True)
    assert watching.stdout is not None and "loss" in watching.stdout.readline()
    watching.send_signal(signal.SIGINT)
    told, _ = watching.communicate()
    assert watching.returncode == 0
    assert told.splitlines()[-1] == "runs/a goes on by itself; back to it with: luthier runs watch runs/a"


@pytest.mark.parametrize(
    ("state", "status", "expected"),
    [
        ("done", {}, "runs/a is not running: it has ended, done"),
        ("stopped", {}, f"runs/a is not running: stopped at step 3; {ON}"),
        ("dead", {}, f"runs/a is not running: its process has gone at step 3; {ON}"),
        ("running", {"place": "far pid:[1]", "pid": NONE}, f"runs/a runs on far (process {NONE}), {REACH}"),
        ("running", {"place": CONTAINER, "pid": NONE}, f"runs/a runs in another container (process {NONE}), {REACH}"),
    ],
)
def test_what_cannot_be_stopped_is_one_line(state: str, status: dict[str, Any], expected: str) -> None:
    folder = run("a", state, checkpoints=(2,), **{"time": time.time(), **status})  # not heard of for a minute is dead
    with pytest.raises(RecipeError) as told:
        runs.ask_to_stop(folder)
    assert str(told.value) == expected


@pytest.mark.parametrize("stopping", [False, True])
def test_a_run_is_asked_to_stop_once(stopping: bool) -> None:
    """A second signal would end it without a checkpoint."""
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as process:
        born = psutil.Process(process.pid).create_time()
        runs.ask_to_stop(run("a", "running", pid=process.pid, born=born, stopping=stopping))
        if stopping:
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(0.2)
            process.kill()
        assert process.wait() == (-signal.SIGKILL if stopping else -signal.SIGTERM)


def test_a_process_that_has_the_number_of_a_dead_run_is_left_alone() -> None:
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as process:
        folder = run("a", "running", pid=process.pid, born=psutil.Process(process.pid).create_time() - 99)
        with pytest.raises(RecipeError, match="its process has gone"):
            runs.ask_to_stop(folder)
        assert process.poll() is None
        process.kill()


def test_stopping_a_real_run(tmp_path: Path) -> None:
    begin(tmp_path, train={"steps": 100_000, "save_every": 100_000, "eval_every": 100_000})
    training = subprocess.Popen([LUTHIER, "train", "town.yaml"], env=ENVIRONMENT, stdout=subprocess.PIPE, text=True)
    folder = RunFolder(tmp_path / "runs" / "town")
    while (read_history(folder).step if folder.status.is_file() else 0) < 3:
        assert training.poll() is None
        time.sleep(0.05)
    assert "running" in well(tmp_path, "runs") and "luthier runs stop runs/town" in well(
        tmp_path, "runs", "show", "town"
    )
    told = well(tmp_path, "runs", "stop", "town").splitlines()
    with folder.locked():  # it is gone: one may go on at once
        step = read_history(folder).step
    assert told == [
        "runs/town: asked to stop; it finishes its step and saves",
        f"runs/town: stopped at step {step}; {folder.standing()}",
    ]
    assert runs.steps_saved(folder) == [step] and training.communicate() and training.returncode == 143


# -- cleaning --------------------------------------------------------------------------------------------------------


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_only_what_a_done_run_does_not_need_goes() -> None:
    done = run("done", checkpoints=(2, 3), adapter=True)
    run("lost", checkpoints=(3,))  # somebody removed its adapter
    run("stopped", "stopped", checkpoints=(2, 3), adapter=True)
    run("running", "running", checkpoints=(2,), adapter=True)
    run("dead", "dead", checkpoints=(2,))
    run("empty", "failed")
    told = well(Path.cwd(), "runs", "clean", "--yes").splitlines()
    assert told == [
        "2.0 KiB  runs/done  2 checkpoints; adapter/ stays",
        "2.0 KiB to free",
        "2.0 KiB freed",
    ]
    assert names(done.checkpoints) == [] and names(done.adapter) == ["adapter_model.safetensors"]
    assert [len(names(folder.checkpoints)) for folder in runs.all_runs()] == [1, 0, 0, 1, 1, 2]


def test_dead_takes_what_nothing_can_go_on_from() -> None:
    run("done", adapter=True), run("dead", "dead"), run("failed", "failed"), run("stopped", "stopped")
    run("dead-with-checkpoint", "dead", checkpoints=(2,)), run("failed-with-adapter", "failed", adapter=True)
    run("running", "running")
    half = run("half", "dead").checkpoints / "step-000002"
    half.mkdir()  # without its state.json
    well(Path.cwd(), "runs", "clean", "--dead", "--yes")
    assert names(Path("runs")) == ["dead-with-checkpoint", "done", "failed-with-adapter", "running"]


def test_all_takes_the_named_and_no_running_one() -> None:
    run("a", "stopped", checkpoints=(2,), adapter=True), run("b", "running"), run("c")
    told = well(Path.cwd(), "runs", "clean", "--all", "a", "b", "--yes")
    assert "the whole run (stopped, adapter/, checkpoints up to step 2)" in told
    assert "runs/b stays: it is running" in told
    assert names(Path("runs")) == ["b", "c"]
    told_too = luthier(Path.cwd(), "runs", "clean", "--all", "--yes")
    assert (told_too.returncode, names(Path("runs"))) == (2, ["b", "c"])


def test_nothing_goes_without_a_yes() -> None:
    folder = run("a", checkpoints=(2,), adapter=True)
    told = luthier(Path.cwd(), "runs", "clean")
    assert (told.returncode, told.stderr) == (2, "error: nothing removed: there is no terminal to ask on; add --yes\n")
    assert runs.steps_saved(folder) == [2]


def test_a_run_that_another_process_holds_loses_nothing() -> None:
    folder = run("a", checkpoints=(2,), adapter=True)
    with folder.locked():
        told = luthier(Path.cwd(), "runs", "clean", "--yes")
    assert told.returncode == 1 and "is being trained by another process" in told.stderr
    assert runs.steps_saved(folder) == [2]


def test_a_run_that_went_on_after_it_was_looked_at_loses_nothing() -> None:
    folder = run("a", "failed")
    planned = runs.removal(folder, dead=True)
    assert planned is not None
    (folder.checkpoints / "step-000004").mkdir()
    (folder.checkpoints / "step-000004" / "state.json").write_text("{}")
    with pytest.raises(RunError, match="runs/a has changed since; left as it is"):
        runs.remove(planned, dead=True)
    assert runs.steps_saved(folder) == [4]


def test_a_removal_that_was_cut_short_is_ended() -> None:
    gone = Path("runs/.a.old")
    gone.mkdir(parents=True)
    (gone / "big").write_text("x" * 2048)
    assert well(Path.cwd(), "runs", "clean", "--yes").splitlines()[-1] == "2.0 KiB freed"
    assert not gone.exists()


def test_written_keys_are_those_of_the_recipe() -> None:
    keys = written(Recipe.model_validate({"model": {"name": "m"}, "data": {"train": str(Path("d.jsonl").absolute())}}))
    assert keys["data.train"] == "d.jsonl" and keys["train.betas"] == "[0.9, 0.999]" and keys["run"] == "null"

"""The story of a run, in this process: what is refused before it begins, what a resumed one must find again."""

from __future__ import annotations

import errno
import fcntl
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import luthier.run
from luthier import verbs
from luthier.errors import DataError, LuthierError, ModelError, RecipeError, RunError
from luthier.folder import RunFolder
from luthier.loaded import load_folder
from luthier.run import Run, load_run, open_run, train
from luthier.training.loop import Training
from tiny import CHATML, tiny_llama, tiny_tokenizer

ROWS = [{"prompt": f"Where is {i}?", "response": f"In town {i % 3}."} for i in range(12)]
RECIPE: dict[str, Any] = {
    "model": {"name": "./model"},
    "data": {"train": "rows.jsonl", "eval": 2, "max_length": 64},
    "method": {"r": 4},
    "train": {"batch": 4, "steps": 4, "lr": 2e-2, "eval_every": 2, "save_every": 2, "warmup": 0},
    "generate": {"prompts": ["Where is 7?"], "max_new_tokens": 6},
}
Said = list[str]


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def row_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def here(tmp_path: Path, model: Path, row_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: model, rows.jsonl, town.yaml."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LUTHIER_CACHE", str(row_cache))
    (tmp_path / "model").symlink_to(model)
    write_rows(tmp_path, ROWS)
    write_recipe(tmp_path)
    return tmp_path


def write_rows(folder: Path, rows: list[dict[str, str]]) -> None:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_recipe(folder: Path, **changes: dict[str, Any]) -> None:
    """town.yaml with `changes` in its sections; None takes a key out."""
    recipe = {name: RECIPE.get(name, {}) | changes.get(name, {}) for name in RECIPE | changes}
    plain = {name: {k: v for k, v in values.items() if v is not None} for name, values in recipe.items()}
    (folder / "town.yaml").write_text(yaml.safe_dump(plain))


def begin(said: Said, *overrides: str, **options: Any) -> Run:
    return train("town.yaml", overrides, say=said.append, **options)


def killed_after(monkeypatch: pytest.MonkeyPatch, steps: int) -> RunFolder:
    """A run that is killed in the step after `steps`."""
    step = Training.step

    def dying(self: Training, stop: int | None) -> Any:
        if self.state.step == steps:
            raise SystemExit
        return step(self, stop)

    with monkeypatch.context() as patch:
        patch.setattr(Training, "step", dying)
        with pytest.raises(SystemExit):
            begin([])
    return RunFolder.open(Path("runs/town").absolute())


# -- refused before a folder is made ---------------------------------------------------------------------------------


def strict_template(folder: Path) -> None:
    refusal = "{% if messages[0].role == 'system' %}{{ raise_exception('no system prompt') }}{% endif %}"
    (folder / "strict.jinja").write_text(refusal + CHATML)
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Where is 7?"}]
    (folder / "p.jsonl").write_text(json.dumps({"messages": chat}))


def stretch(folder: Path) -> None:
    write_rows(folder, [*ROWS, {"prompt": "Where?", "response": "In town. " * 150}])


def held_out_stretch(folder: Path) -> None:
    (folder / "held.jsonl").write_text(json.dumps({"prompt": "Where?", "response": "In town. " * 150}) + "\n")


@pytest.mark.parametrize(
    ("changes", "prepare", "error", "message"),
    [
        ({"generate": {"prompts": "p.jsonl"}}, lambda f: (f / "p.jsonl").write_text('{"q": 1}\n'), DataError,
         r"p\.jsonl:1: not a prompt; a line is a text, .*"),
        ({"data": {"template": "strict.jinja"}, "generate": {"prompts": "p.jsonl"}}, strict_template, DataError,
          r"prompt 'Where is 7\?': the chat template refuses it: no system prompt"),
        ({"generate": {"prompts": ["to " * 400]}}, None, ModelError,
         r"prompt 1 has \d+ tokens; this model reads 256, prompt and answer together"),
        ({"generate": {"prompts": ["Where is 7?"], "max_length": 2, "max_new_tokens": None}}, None, RecipeError,
         r"generate\.max_length: 2 leaves no room for an answer: prompt 1 has \d+ tokens"),
        ({"data": {"max_length": 2048}}, stretch, ModelError,
         r"rows\.jsonl:13 has [\d,]+ tokens, and .*/model reads 256 \(max_position_emb.*\); set data\.max_length: 256"),
        ({"data": {"max_length": 2048, "eval": "held.jsonl"}}, held_out_stretch, ModelError,
         r"held\.jsonl:1 has [\d,]+ tokens, and .*; set data\.max_length: 256"),
        ({"train": {"min_lr": 0.5, "lr": "auto"}}, None, RecipeError,
         r"train\.min_lr: 0\.5 is above the learning rate 0\.0\d+; lower it or raise lr"),
        ({"train": {"precision": "fp32"}, "model": {"dtype": "bf16"}}, None, RecipeError,
         r"train\.precision: fp32, but the weights are held in bf16; change model\.dtype"),
        ({"data": {"train": [{"path": "rows.jsonl", "weight": 0.01}]}}, None, DataError,
         r"data\.train: an epoch would draw no row; .*"),
        ({"model": {"name": "./small"}}, lambda f: tiny_llama(f / "small", vocab_size=300), ModelError,
         r".*small: its tokenizer gives id \d+, and the model has embeddings for 300 tokens only; .*"),
    ],
    ids=["prompt-file", "prompt-template", "prompt-length", "no-room", "window", "eval-window", "min_lr", "precision",
         "no-draw", "vocabulary"],
)  # fmt: skip
def test_what_cannot_be_right_is_refused_before_a_folder_is_made(
    here: Path,
    changes: dict[str, dict[str, Any]],
    prepare: Callable[[Path], Any] | None,
    error: type[LuthierError],
    message: str,
) -> None:
    if prepare is not None:
        prepare(here)
    write_recipe(here, **changes)
    with pytest.raises(error) as caught:
        begin([])
    assert re.search(message + r"\Z", str(caught.value)), str(caught.value)
    assert not (here / "runs").exists()


def test_the_held_out_rows_count_for_the_vocabulary(here: Path) -> None:
    """Ids that only the held-out file has: an embedding without them fails in the first evaluation."""
    tokenizer = tiny_tokenizer()
    largest = max(
        id
        for row in ROWS
        for text in [
            *row.values(),
            tokenizer.apply_chat_template(
                [{"role": "user", "content": ""}], tokenize=False, add_generation_prompt=True
            ),
        ]
        for id in tokenizer(text).input_ids
    )
    beyond = tokenizer.decode([383])
    tiny_llama(here / "small", vocab_size=largest + 1)
    (here / "held.jsonl").write_text(json.dumps({"prompt": beyond, "response": "a"}) + "\n")
    write_recipe(here, model={"name": "./small"}, data={"eval": "held.jsonl"})
    with pytest.raises(ModelError, match=f"gives id 383, and the model has embeddings for {largest + 1} tokens only"):
        begin([])


# -- going on with a run ---------------------------------------------------------------------------------------------


def test_resume_says_from_where_and_keeps_what_it_began_with(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = killed_after(monkeypatch, 3)
    first = {
        name: (folder.path / name).stat().st_mtime_ns for name in ("data.json", "environment.json", "rejected.jsonl")
    }
    said: Said = []
    run = begin(said, "generate.prompts=['Where is 8?']", resume=True)
    assert "resume: from checkpoints/step-000002" in said and not any("--no-proof" in line for line in said)
    assert {name: (folder.path / name).stat().st_mtime_ns for name in first} == first
    assert run.outcome is not None and run.outcome.steps == 4
    assert open_run(folder.path).recipe.generate.prompts == ["Where is 8?"]
    assert [json.loads(line)["step"] for line in folder.metrics.read_text().splitlines()] == [0, 1, 2, 3, 4]


def test_resume_says_that_no_proof_changes_nothing(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    killed_after(monkeypatch, 3)
    said: Said = []
    begin(said, resume=True, proof=False)
    assert said.count("resume: the proof belongs to a run's start: --no-proof changes nothing") == 1


def test_resume_without_a_checkpoint_begins_again(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = killed_after(monkeypatch, 1)
    said: Said = []
    train(folder.path, say=said.append, resume=True)
    assert "resume: no checkpoint yet, from the start" in said
    assert len(folder.metrics.read_text().splitlines()) == 5


def test_resume_refuses_other_data(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = killed_after(monkeypatch, 3)
    before = folder.data.read_bytes()
    write_rows(here, [*ROWS, {"prompt": "Where is 77?", "response": "Here."}])
    with pytest.raises(RecipeError) as caught:
        begin([], resume=True)
    old, lines = json.loads(before), str(caught.value).splitlines()
    assert lines[0] == f"{folder.path} was begun with other data; undo the change, or start anew:"
    assert lines[1] == f"  {here / 'rows.jsonl'}: its content"
    assert lines[2].startswith(f"  train_rows: {old['train_rows']} -> ") and "  train_tokens: " in lines[3]
    assert folder.data.read_bytes() == before
    begin([], "run=anew")
    assert Path("runs/anew/adapter").is_dir()


def test_resume_refuses_another_recipe(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = killed_after(monkeypatch, 1)
    with pytest.raises(RecipeError) as caught:
        begin([], "train.lr=1e-3", "method.r=8", "train.log_every=2", resume=True)
    assert str(caught.value) == (
        f"{folder.path} was begun with another recipe; undo the change, or start anew:\n"
        "  method.r: 4 -> 8\n  train.lr: 0.02 -> 0.001"
    )
    with pytest.raises(RecipeError) as caught:
        train(folder.path)
    assert str(caught.value) == (
        f"{folder.path} is a run; go on with it by --resume, or train its recipe anew: {folder.path / 'recipe.yaml'}"
    )


def test_resume_takes_the_newest_run_of_that_very_name(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = killed_after(monkeypatch, 1)
    for name in ("town-2", "town12", "town-x", "townhall-9"):
        (here / "runs" / name / "checkpoints").mkdir(parents=True)
        (here / "runs" / name / "recipe.yaml").write_bytes(folder.recipe.read_bytes())
    (here / "runs" / "town-3" / "checkpoints").mkdir(parents=True)  # made, and killed before its recipe was written
    assert begin([], resume=True).folder.path == here / "runs" / "town-2"


def test_one_process_a_run(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = killed_after(monkeypatch, 1)
    pid = json.loads(folder.status.read_text())["pid"]
    with (folder.path / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(RunError) as caught:
            begin([], resume=True)
    assert str(caught.value) == (
        f"{folder.path} is being trained by another process (pid {pid} by status.json); wait for it, or end it"
    )

    def held(run: RunFolder) -> bool:
        with (run.path / ".lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
            return False

    seen = []
    monkeypatch.setattr(Training, "finish", lambda self, stopped: seen.append(held(self.folder)) or sys.exit(7))
    for options in ({"resume": True}, {}):
        with pytest.raises(SystemExit):
            begin([], **options)
    assert seen == [True, True]
    assert not held(folder)


@pytest.mark.parametrize(
    ("place", "stands"), [("_trained", "no checkpoint yet"), ("_say_samples", "it is trained to its end")]
)
def test_ctrl_c_beside_the_steps_says_what_there_is(
    here: Path, monkeypatch: pytest.MonkeyPatch, place: str, stands: str
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    said: Said = []
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(luthier.run, place, interrupted)
        begin(said)
    assert said[-1] == f"interrupted; {stands}; go on with: luthier train runs/town --resume"
    train("runs/town", say=said.append, resume=True)
    assert Path("runs/town/samples.jsonl").is_file()


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device", "x")])
def test_a_run_whose_record_is_not_whole_leaves_nothing(
    here: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def fail(path: Path, value: Any) -> None:
        raise error

    with monkeypatch.context() as patch, pytest.raises((KeyboardInterrupt, RunError)) as caught:
        patch.setattr(luthier.run, "write_json", fail)
        begin([])
    assert list((here / "runs").iterdir()) == []
    if isinstance(error, OSError):
        assert str(caught.value) == (
            f"{here}/runs/town: no room left on the disk; last good checkpoint: none yet; "
            "free some space and start again"
        )
    folder = killed_after(monkeypatch, 1)
    with monkeypatch.context() as patch, pytest.raises((KeyboardInterrupt, RunError)):
        patch.setattr(luthier.run, "_record", lambda folder, bench: fail(folder.data, None))
        begin([], resume=True)
    assert folder.data.is_file()  # one that was begun stays


def test_rows_longer_than_a_pass_are_said(here: Path) -> None:
    said: Said = []
    begin(said, "train.tokens_per_pass=5", "train.steps=2")
    (line,) = [line for line in said if line.startswith("train.tokens_per_pass")]
    assert re.fullmatch(
        r"train.tokens_per_pass: 5, but the longest row has \d\d: such a row is a pass of its own", line
    )
    begin(said, "train.tokens_per_pass=500", "train.steps=2")
    assert sum(line.startswith("train.tokens_per_pass") for line in said) == 1


# -- what is left of it ----------------------------------------------------------------------------------------------


def best_is_step_2(monkeypatch: pytest.MonkeyPatch) -> None:
    compare = Training.compare
    monkeypatch.setattr(Training, "compare", lambda self, loss: compare(self, float(self.state.step)))


def sampled(run: Run) -> list[str]:
    """Of the step whose weights are saved."""
    assert run.outcome is not None
    lines = [json.loads(line) for line in run.folder.samples.read_text().splitlines()]
    return [line["reply"] for line in lines if line["step"] == run.outcome.best_step]


def test_samples_come_from_the_adapter_that_was_saved(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The best is step 2's: its numbers go into the model of step 4, and no second model is loaded."""
    best_is_step_2(monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(luthier.run, "load_run", None)
        run = begin([], "train.activation_checkpointing=true")
    assert run.outcome is not None and run.outcome.best_step == 2
    last = load_folder("./model", run.folder.checkpoints / "step-000004", print)
    replies = [sampled(run), [run.generate("Where is 7?")], [last.answer(["Where is 7?"], run.recipe.generate)[0].text]]
    assert replies[0] == replies[1] != replies[2]


@pytest.mark.parametrize("method", [{"kind": "full", "r": None}, {"bias": "all"}], ids=["full", "bias"])
def test_where_base_weights_train_they_are_let_go_before_what_was_saved_is_loaded(
    here: Path, monkeypatch: pytest.MonkeyPatch, method: dict[str, Any]
) -> None:
    tiny_llama(here / "half", dtype=torch.bfloat16, attention_bias=True)
    write_recipe(here, model={"name": "./half"}, method=method)
    best_is_step_2(monkeypatch)
    kept: list[Any] = []
    build = luthier.run.workbench
    monkeypatch.setattr(luthier.run, "workbench", lambda *parts: kept.append(build(*parts)) or kept[0])

    def watched(run: Run) -> Any:
        kept.append({value.device.type for value in kept[0].model.parameters()})
        return load_run(run)

    monkeypatch.setattr(luthier.run, "load_run", watched)
    run = begin([])
    assert kept[1] == {"meta"}
    assert sampled(run) == [run.generate("Where is 7?")]


def test_a_run_answers_where_its_devices_are_not_there(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trained on another machine's GPUs. After full fine-tuning it is the run's own weights that are named."""
    write_recipe(here, method={"kind": "full", "r": None})
    run = begin([])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    far = Run(run.folder, run.recipe.model_copy(update={"train": run.recipe.train.model_copy(update={"devices": [5]})}))
    said: Said = []
    assert load_run(far, say=said.append).model.device.type == "cpu"
    assert said == [
        "train.devices: [5]: there is no GPU here; taken instead: cpu",
        f"{run.folder.model}: weights in fp32: as the checkpoint stores them",
    ]
    load_run(far, base=True, say=said.append)
    assert said[-1] == f"{here / 'model'}: weights in fp32: as the checkpoint stores them"
    assert run.generate("Where is 7?") == far.generate("Where is 7?")


def test_compare_lets_the_tuned_model_go_before_it_loads_the_base(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_recipe(here, method={"kind": "full", "r": None})
    run = begin([])
    loaded: list[Any] = []
    devices = []

    def watched(run: Run, **options: Any) -> Any:
        devices.append([one.model.device.type for one in loaded])
        loaded.append(load_run(run, **options))
        return loaded[-1]

    monkeypatch.setattr(verbs, "load_run", watched)
    assert len(run.compare().pairs) == 3
    assert devices == [[], ["meta"]]


def test_the_prompts_of_a_folder_are_written_with_the_date_of_its_run(here: Path) -> None:
    run = begin([])
    note = run.folder.adapter / "luthier.json"
    assert json.loads(note.read_text())["today"] == json.loads(run.folder.data.read_text())["today"]
    note.write_text(note.read_text().replace(json.loads(note.read_text())["today"], "2020-02-29"))
    assert load_folder("./model", run.folder.adapter, print).encoder.today.isoformat() == "2020-02-29"


def test_the_rendered_rows_are_written_by_train_alone(here: Path) -> None:
    write_recipe(here, data={"write_text": "text.jsonl"})
    verbs.look("town.yaml", say=lambda _: None)
    assert not (here / "text.jsonl").exists()
    begin([])
    assert len((here / "text.jsonl").read_text().splitlines()) == 10


# -- verbs -----------------------------------------------------------------------------------------------------------


def test_look_ends_with_what_to_do_next(here: Path) -> None:
    said: Said = []
    verbs.look("town.yaml", ["train.batch=2"], say=said.append)
    assert said[-2:] == ["page: town-look.html", "next: luthier train town.yaml train.batch=2"]
    for bad, words in [(1, "1 bad row; put it right"), (2, "2 bad rows; put them right")]:
        write_rows(here, [*ROWS, *[{"prompt": "Where?", "response": ""}] * bad])
        verbs.look("town.yaml", say=said.append)
        assert said[-1] == f"luthier train would stop: {words}, or set data.bad_rows: skip"
    verbs.look("town.yaml", ["data.bad_rows=skip"], say=said.append)
    assert said[-1] == "next: luthier train town.yaml data.bad_rows=skip"
    with pytest.raises(RecipeError, match=r"^--html no/x\.html: there is no folder no$"):
        verbs.look("town.yaml", html=Path("no/x.html"), say=said.append)


def test_look_at_a_run_takes_its_date(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = killed_after(monkeypatch, 1)
    report = json.loads(folder.data.read_text())
    folder.data.write_text(json.dumps(report | {"today": "2020-02-29"}))
    dates: list[str] = []
    encoder = verbs.load_encoder
    monkeypatch.setattr(verbs, "load_encoder", lambda *parts: dates.append(str(parts[2])) or encoder(*parts))
    said: Said = []
    verbs.look(folder.path, say=said.append)
    assert dates == ["2020-02-29"] and said[-1] == "page: town-look.html"


@pytest.mark.parametrize(
    ("target", "changes", "message"),
    [
        ("runs/town", {"adapter": Path("x")}, "runs/town is a run and has its adapter; --adapter goes with a model"),
        ("./model", {"base": True}, "--base goes with a run; ./model is a model"),
        ("./model", {}, "./model: no prompt; give --prompt, --prompt-file or standard input"),
        ("./model", {"options": {"top_p": 1.5}}, "--top-p: Input should be less than or equal to 1"),
        ("./model", {"options": {"max_new_tokens": 0}}, "--max-new-tokens: Input should be greater than or equal to 1"),
    ],
)
def test_what_generate_refuses(here: Path, target: str, changes: dict[str, Any], message: str) -> None:
    (here / "runs" / "town").mkdir(parents=True)
    (here / "runs" / "town" / "recipe.yaml").write_bytes((here / "town.yaml").read_bytes())
    plain: dict[str, Any] = {"adapter": None, "base": False, "prompts": [], "prompt_file": None, "options": {}}
    with pytest.raises(RecipeError) as caught:
        verbs.generate(
            target, **plain | changes, standard_input=lambda: "\n", as_json=False, stream=False, write=print, say=print
        )
    assert str(caught.value) == message
    with pytest.raises(ModelError) as missing:
        verbs.generate("runs/twon", **plain, standard_input=None, as_json=False, stream=False, write=print, say=print)
    assert str(missing.value) == (
        f"{here / 'runs/twon'}: there is no such run or folder; "
        "a model on a hub is hf:owner/name or modelscope:owner/name"
    )


# -- the run's folder ------------------------------------------------------------------------------------------------


def test_what_a_run_can_be_called_and_where_it_lies(tmp_path: Path) -> None:
    for name in ("../x", ".hidden", "a/b", ""):
        with pytest.raises(RecipeError) as caught:
            RunFolder.create(name, tmp_path)
        cannot = f"run: {name!r} cannot be a folder's name"
        assert str(caught.value) == f"{cannot}; use letters, digits, blanks, '-', '_' and '.'"
    assert [RunFolder.create("甄嬛 1", tmp_path).name for _ in range(2)] == ["甄嬛 1", "甄嬛 1-2"]
    (tmp_path / "runs").rename(tmp_path / "old")
    (tmp_path / "runs").write_text("")
    with pytest.raises(RecipeError) as caught:
        RunFolder.create("x", tmp_path)
    assert str(caught.value) == (
        f"{tmp_path / 'runs'} is a file, where the folder of all runs belongs; move it, or train elsewhere"
    )
    with pytest.raises(RecipeError) as caught:
        RunFolder.open(tmp_path / "old")
    assert str(caught.value) == f"{tmp_path / 'old'}: not a run folder (it has no recipe.yaml)"


# -- chat ------------------------------------------------------------------------------------------------------------


def talk(target: str, *lines: str, system: str | None = None) -> tuple[list[str], Said]:
    """What chat answers to each line, and what it says of itself."""
    said, replies, turns = Said(), [""], iter(lines)

    def write(text: str) -> None:
        replies[-1] += text
        if text == "\n":
            replies.append("")

    verbs.chat(
        target, adapter=None, base=False, system=system, read=lambda: next(turns, None), write=write, say=said.append
    )
    return replies[:-1], said


def test_a_chat_starts_as_a_row_does_and_remembers(here: Path) -> None:
    write_recipe(here, data={"before_prompt": "Say: ", "system": "be kind"})
    run = begin([])
    replies, said = talk("runs/town", "Where is 3?", "Where is 4?", "/new", "Where is 3?")
    assert replies[0] == replies[2] == str(run.generate("Where is 3?")) + "\n"
    assert replies[1] != str(run.generate("Where is 4?")) + "\n"
    assert said[-1] == "/new starts over, /exit or Ctrl-D ends"


def test_a_chat_without_a_place_for_earlier_turns_says_so(here: Path) -> None:
    columns = {"prompt": "prompt", "response": "response"}
    write_recipe(here, data={"text": "Q: {prompt}\nA: {response}", "columns": columns})
    run = begin([])
    replies, said = talk("runs/town", "Where is 3?", "Where is 4?")
    assert replies[1] == str(run.generate("Where is 4?")) + "\n"
    assert said[-1].endswith("; each question stands alone: so the run was trained")
    with pytest.raises(DataError, match="a text pattern without {system} has no place for a system prompt"):
        talk("runs/town", "Where is 3?", system="be kind")

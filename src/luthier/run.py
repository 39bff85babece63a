"""The story of a run: recipe → data → model → adapter → training → samples → the run folder, and back from it."""

from __future__ import annotations

import json
import platform
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.errors import RunError
from luthier.folder import RunFolder, read_json, write_atomic, write_json
from luthier.history import read_history, read_lines
from luthier.html import visible
from luthier.loaded import (
    Loaded,
    Say,
    answering,
    load_encoder,
    ready,
    sampled,
    write_note,
)
from luthier.methods import whole
from luthier.quiet import quiet
from luthier.recipe import load_recipe, run_name, save_recipe
from luthier.replies import said
from luthier.resume import resume_from, step_of, today_of, wanted
from luthier.sections import Recipe
from luthier.training.launch import launch, launched, tell_run, watched
from luthier.view import notebook
from luthier.workbench import Workbench, held, workbench

if TYPE_CHECKING:
    from luthier.merge import MergeReport
    from luthier.replies import Comparison
    from luthier.training.distributed import World
    from luthier.training.monitor import Monitor
    from luthier.training.outcome import Outcome


@dataclass(frozen=True)
class Run:
    """A run: its folder, its recipe and, right after training, what came of it."""

    folder: RunFolder
    recipe: Recipe
    outcome: Outcome | None = None

    def __repr__(self) -> str:
        history = read_history(self.folder)
        steps = f", step {history.step:,} of {history.steps:,}" if history.steps else ""
        return f"<run {self.folder.shown}: {history.state}{steps}>"

    def _repr_html_(self) -> str | None:
        """For a notebook; nothing where the cell shows this run already."""
        shown = notebook.is_shown(self.folder.path)
        return None if shown else notebook.run_html(read_history(self.folder))

    def generate(self, prompt: str | Sequence[str]) -> str | list[str]:
        """The tuned model's reply to a prompt, or a list of replies to several; loads the model anew."""
        quiet()
        loaded = load_run(self)
        texts = [r.text for r in loaded.answer([prompt] if isinstance(prompt, str) else prompt, self.recipe.generate)]
        return texts[0] if isinstance(prompt, str) else texts

    def compare(self) -> Comparison:
        """Base against tuned, as `luthier compare` does it; the files are written into the run's folder."""
        from luthier.verbs import compare

        return compare(self)

    def merge(self, out: str | Path, strength: float = 1.0) -> MergeReport:
        """A stand-alone model folder, verified, as `luthier merge` does it."""
        from luthier.verbs import merge

        return merge(self, Path(out), strength=strength)


def open_run(path: str | Path) -> Run:
    """A run from its folder. Errors: RecipeError where it is none."""
    folder = RunFolder.open(Path(path).absolute())
    return Run(folder, load_recipe(folder.recipe, check_files=False))


def train(
    recipe: str | Path,
    overrides: Sequence[str] = (),
    *,
    resume: bool = False,
    proof: bool = True,
    say: Say = print,
    watch: Callable[[Path], None] | None = None,
) -> Run:
    """Carry a recipe to a trained adapter; with `resume`, a run folder (or the recipe of one) to its end.

    Where `train.devices` names several, it runs in a process for each; in a notebook, too, it has a process of its own,
    and one output of the cell shows it: to interrupt the kernel stops it after the step, and gives the run. Without
    `proof` the engine is not held against the reference before step 1. `watch` is told the run's folder once it is
    there, and shows the steps itself: no lines are said of them. Errors: RecipeError, DataError, ModelError and
    HubError before anything is written; RunError while it trains, or where another process trains that run.
    """
    chosen, begun = wanted(Path(recipe), overrides, resume)
    devices = chosen.train.devices
    count = len(devices) if isinstance(devices, list) else 1
    if (count > 1 or notebook.shell()) and not launched():
        with notebook.shown(say, watch) as (say, watch):
            call = partial(train, resume=resume, proof=proof, watch=watch and watched)
            return launch(call, (recipe, overrides), count, say, watch)

    from luthier.training.distributed import join

    quiet()
    with join(devices) as world, ExitStack() as held:
        say = say if world.leads else lambda _: None
        if begun is not None and world.leads:
            held.enter_context(begun.locked())
        bench = workbench(chosen, begun, world, say)
        return carried(bench, begun, run_name(chosen, Path(recipe)), world, held, proof=proof, say=say, watch=watch)


def carried(
    bench: Workbench,
    begun: RunFolder | None,
    name: str,
    world: World,
    held: ExitStack,
    *,
    proof: bool,
    say: Say,
    watch: Callable[[Path], None] | None,
) -> Run:
    """What is on the bench trained to its end, in a folder of that name or in that of the run that was `begun`.

    `held` keeps the folder to this process, and reports how the run ended.
    """
    folder = world.share(_recorded(begun, name, bench, held) if world.leads else None)
    assert folder is not None
    held.enter_context(_interrupted(folder, say))
    held.enter_context(_reported(folder, say, world.leads))
    say(f"run: {folder.path}" + (f" ({name} is taken)" if begun is None and folder.name != name else ""))
    if watch is not None:
        watch(folder.path)
    checkpoint = resume_from(folder, say) if begun else None
    if checkpoint is not None and not proof:
        say("resume: the proof belongs to a run's start: --no-proof changes nothing")
    run = Run(folder, bench.recipe, _trained(folder, bench, world, checkpoint, proof, say, shown=watch is None))
    if world.leads and run.outcome is not None and run.outcome.stopped is None:
        _say_samples(run, bench, checkpoint, say)
    return run


def load_run(run: Run, *, base: bool = False, say: Say = lambda _: None) -> Loaded:
    """A run's tuned model, ready to answer (`base`: the model that it started from). Errors: RunError, ModelError."""
    from luthier.models.adapters import load_adapter
    from luthier.models.device import device_to_answer
    from luthier.models.load import load_model

    device = device_to_answer(run.recipe.train.devices, say)
    path, tokenizer, encoder = load_encoder(run.recipe, say, today_of(run.folder))
    is_whole = whole(run.recipe.method.kind)
    result, section = result_folder(run), held(run.recipe, device)
    if is_whole and not base:
        path, section = result, section.model_copy(update={"name": str(result)})
    model = load_model(path, answering(section, run.recipe.generate), device, say=say)
    if not is_whole and not base:
        model = load_adapter(model, result)
    return ready(model, tokenizer, encoder)


def result_folder(run: Run) -> Path:
    """Where the run's adapter (or, after full fine-tuning, model) lies. Errors: RunError where it is not there yet."""
    folder = run.folder.model if whole(run.recipe.method.kind) else run.folder.adapter
    if not folder.is_dir():
        raise RunError(
            f"{run.folder.path}: nothing is trained there yet; go on with: luthier train {run.folder.path} --resume"
        )
    return folder


# -- training, and what is left of it --------------------------------------------------------------------------------


def _trained(
    folder: RunFolder, bench: Workbench, world: World, checkpoint: Path | None, proof: bool, say: Say, *, shown: bool
) -> Outcome:
    from luthier.models.load import pad_id
    from luthier.training.loop import train as train_loop

    return train_loop(
        bench.model,
        bench.data,
        bench.order,
        bench.section,
        bench.recipe.method.kind,
        folder,
        pad_id=pad_id(bench.tokenizer),
        write=lambda target: _write_result(target, bench),
        monitor=_monitor(folder, bench, world, say, shown=shown),
        say=say,
        world=world,
        resume=checkpoint,
        proof=proof,
        ask=partial(_replies, bench) if bench.prompts else None,
        engine=bench.recipe.engine,
    )


def _monitor(folder: RunFolder, bench: Workbench, world: World, say: Say, *, shown: bool) -> Monitor:
    """What reports the run: the first process, which reads the cards of all."""
    from luthier.training.gpu import cards, gpu_meter
    from luthier.training.monitor import Monitor
    from luthier.training.trackers import start_trackers

    devices = bench.recipe.train.devices
    numbers = [number for number in devices if isinstance(number, int)] if isinstance(devices, list) else []
    on_gpu = world.leads and world.device.type == "cuda"
    before = (read_json(folder.status) or {}).get("gpu")
    meter = gpu_meter(cards(numbers or [world.device.index or 0]), before) if on_gpu else None
    gpus = meter.read if meter else lambda: None
    settings = bench.recipe.model_dump(mode="json")
    trackers = start_trackers(bench.recipe.track if world.leads else [], folder, settings, say)
    return Monitor(folder, bench.section, say, writes=world.leads, shown=shown, gpus=gpus, trackers=trackers)


def _recorded(begun: RunFolder | None, name: str, bench: Workbench, held: ExitStack) -> RunFolder:
    """The run's folder with its record; a new one is `held` by this process, or gone where it cannot be written."""
    from luthier.training.guard import clear_when_full

    if begun is not None:
        with clear_when_full(begun.checkpoints):
            _record(begun, bench)
        tell_run(begun.path)
        return begun
    folder = RunFolder.create(name, Path.cwd())
    try:
        held.enter_context(folder.locked())
        with clear_when_full(folder.checkpoints, "free some space and start again"):
            _record(folder, bench)
    except BaseException:
        shutil.rmtree(folder.path, ignore_errors=True)
        raise
    tell_run(folder.path)
    return folder


@contextmanager
def _interrupted(folder: RunFolder, say: Say) -> Iterator[None]:
    """Ctrl-C before the first step or after the last ends at once; first it is said what there is to go on with."""
    try:
        yield
    except KeyboardInterrupt:
        say(f"interrupted; {folder.standing()}")
        raise


@contextmanager
def _reported(folder: RunFolder, say: Say, leads: bool) -> Iterator[None]:
    """Behind the block report.html tells how the run stands, however it ended. A report that fails fails nothing."""
    from luthier.view.report import write_report

    try:
        yield
    finally:
        try:
            if leads:
                write_report(folder)
        except Exception as error:
            say(f"report.html is not written: {error}")


def _record(folder: RunFolder, bench: Workbench) -> None:
    """What the run is made of: resolved recipe, environment, rejected rows, data; the latter three of its first start.

    data.json is written last: with it the record is whole.
    """
    save_recipe(bench.recipe.model_copy(update={"run": folder.name}), folder.recipe)
    if folder.data.is_file():
        return
    rejected = [json.dumps(row._asdict(), ensure_ascii=False) + "\n" for row in bench.data.rejected]
    write_atomic(folder.rejected, "".join(rejected))
    libraries = ["luthier", "torch", "transformers", "peft", "tokenizers", "accelerate", "datasets", "safetensors"]
    machine = {"python": platform.python_version(), "platform": platform.platform(), "device": str(bench.model.device)}
    sizes = [(value.numel(), value.requires_grad) for value in bench.model.parameters()]
    counts = {"parameters": sum(count for count, _ in sizes), "trainable": sum(n for n, trains in sizes if trains)}
    of_model = counts | {"weights": bench.weights}
    libraries += ["bitsandbytes"] if find_spec("bitsandbytes") else []
    write_json(
        folder.path / "environment.json",
        machine | {name: version(name) for name in libraries} | {"model": of_model},
    )
    if bench.recipe.data.write_text is not None:
        from luthier.data.prepare import write_text

        write_text(bench.data, bench.recipe.data, bench.encoder)
    write_json(folder.data, bench.data.report)


def _write_result(target: Path, bench: Workbench) -> None:
    """An adapter (or whole model) with its tokenizer, chat template, and the note of how its prompts are written."""
    from luthier.models.adapters import save_adapter

    bench.tokenizer.chat_template = bench.encoder.template.jinja or bench.tokenizer.chat_template
    save_adapter(bench.model, target, bench.tokenizer)
    write_note(target, bench.encoder, bench.recipe.data)


def _replies(bench: Workbench, most: int | None) -> list[dict[str, Any]]:
    """What the model in training answers to the recipe's prompts, as samples.jsonl has it; `most` tokens each."""
    section = bench.recipe.generate
    if most is not None:
        section = section.model_copy(update={"max_new_tokens": most, "max_length": None})
    return sampled(ready(bench.model, bench.tokenizer, bench.encoder), bench.prompts, section)


def _say_samples(run: Run, bench: Workbench, checkpoint: Path | None, say: Say) -> None:
    """What the saved model answers: as it did at its step's evaluation; asked again where that was in an earlier
    process, whose prompts may have been others, or where the saved model is not the one that trained."""
    if not bench.prompts or run.outcome is None:
        return
    step = run.outcome.best_step or run.outcome.steps
    lines = read_lines(run.folder.samples)
    here = [line for line in lines if line["step"] == step]
    earlier = checkpoint is not None and step_of(checkpoint) >= step
    if not here or earlier or not _as_trained(run, bench):
        asked = sampled(_saved(run, bench), bench.prompts, run.recipe.generate)
        here = [{"step": step, **line} for line in asked]
        others = [line for line in lines if line["step"] != step]
        kept = sorted([*others, *here], key=lambda line: int(line["step"]))
        write_atomic(run.folder.samples, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in kept))
    for line in here:
        say(f"sample: {_one_line(said(line['prompt']))} → {_one_line(line['reply']) or '(nothing)'}")


def _as_trained(run: Run, bench: Workbench) -> bool:
    """Is the saved model, as it will answer, the one that trained? Not in another format, nor quantised otherwise, nor
    without the encoder that P-tuning trains."""
    from luthier.models.quantize import quantization

    trained, asked = run.recipe.model, answering(run.recipe.model, run.recipe.generate)
    alike = quantization(trained.quantize) == quantization(asked.quantize)
    adapter = not whole(run.recipe.method.kind) and run.recipe.method.kind != "p_tuning"
    return bool(adapter and bench.model.dtype == bench.stored and alike)


def _saved(run: Run, bench: Workbench) -> Loaded:
    """What the run's folder holds, the best or the last: in the model at hand, so that there is no second in memory.

    Where base weights trained as well, or answers come from another quantisation, it is let go and what was saved is
    loaded, in the format that it will have.
    """
    from luthier.models.adapters import fill_adapter
    from luthier.models.quantize import let_go

    if _as_trained(run, bench):
        fill_adapter(bench.model, result_folder(run))
        return ready(bench.model, bench.tokenizer, bench.encoder)
    let_go(bench.model)
    return load_run(run)


def _one_line(text: str) -> str:
    return " ⏎ ".join(part.strip() for part in visible(text).strip().splitlines() if part.strip())

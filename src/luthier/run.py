"""The story of a run: recipe → data → model → adapter → training → samples → the run folder, and back from it."""

from __future__ import annotations

import json
import math
import platform
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.errors import ModelError, RunError
from luthier.folder import RunFolder, write_atomic, write_json
from luthier.loaded import Loaded, Prompt, Say, answering, load_data, load_encoder, prompt_ids, ready, write_note
from luthier.quiet import quiet
from luthier.recipe import load_prompts, load_recipe, run_name, save_recipe
from luthier.resume import check_same_data, resume_from, today_of, wanted
from luthier.sections import ModelSection, Recipe, TrainSection
from luthier.training.launch import launch, launched, tell_run

if TYPE_CHECKING:
    from luthier.compare import Comparison
    from luthier.data.batches import Order
    from luthier.data.encode import Encoder
    from luthier.data.prepare import Data
    from luthier.merge import MergeReport
    from luthier.training.distributed import World
    from luthier.training.outcome import Outcome


@dataclass(frozen=True)
class Run:
    """A run: its folder, its recipe and, right after training, what came of it."""

    folder: RunFolder
    recipe: Recipe
    outcome: Outcome | None = None

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

    def merge(self, out: str | Path) -> MergeReport:
        """A stand-alone model folder, verified, as `luthier merge` does it."""
        from luthier.verbs import merge

        return merge(self, Path(out))


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
) -> Run:
    """Carry a recipe to a trained adapter; with `resume`, a run folder (or the recipe of one) to its end.

    Where `train.devices` names several, it runs in a process for each; without `proof` the engine is not held against
    the reference before step 1. Errors: RecipeError, DataError, ModelError and HubError before anything is written;
    RunError while it trains, or where another process trains that run.
    """
    chosen, begun = wanted(Path(recipe), overrides, resume)
    devices = chosen.train.devices
    if isinstance(devices, list) and len(devices) > 1 and not launched():
        return launch(partial(train, resume=resume, proof=proof), (recipe, overrides), len(devices), say)

    from luthier.training.distributed import join

    quiet()
    with join(devices) as world, ExitStack() as held:
        say = say if world.leads else lambda _: None
        if begun is not None and world.leads:
            held.enter_context(begun.locked())
        bench = _workbench(chosen, begun, world, say)
        folder = world.share(_recorded(begun, run_name(chosen, Path(recipe)), bench, held) if world.leads else None)
        assert folder is not None
        held.enter_context(_interrupted(folder, say))
        say(f"run: {folder.path}")
        checkpoint = resume_from(folder, say) if begun else None
        if checkpoint is not None and not proof:
            say("resume: the proof belongs to a run's start: --no-proof changes nothing")
        run = Run(folder, chosen, _trained(folder, bench, world, checkpoint, proof, say))
        if world.leads and run.outcome is not None and run.outcome.stopped is None:
            _write_samples(run, bench, say)
    return run


def load_run(run: Run, *, base: bool = False, say: Say = lambda _: None) -> Loaded:
    """A run's tuned model, ready to answer (`base`: the model that it started from). Errors: RunError, ModelError."""
    from luthier.models.adapters import load_adapter
    from luthier.models.device import device_to_answer
    from luthier.models.load import load_model

    device = device_to_answer(run.recipe.train.devices, say)
    path, tokenizer, encoder = load_encoder(run.recipe, say, today_of(run.folder))
    whole = run.recipe.method.kind == "full"
    result, section = result_folder(run), held(run.recipe, device)
    if whole and not base:
        path, section = result, section.model_copy(update={"name": str(result)})
    model = load_model(path, answering(section, run.recipe.generate), device, say=say)
    if not whole and not base:
        model = load_adapter(model, result)
    return ready(model, tokenizer, encoder)


def result_folder(run: Run) -> Path:
    """Where the run's adapter (or, after full fine-tuning, model) lies. Errors: RunError where it is not there yet."""
    folder = run.folder.model if run.recipe.method.kind == "full" else run.folder.adapter
    if not folder.is_dir():
        raise RunError(
            f"{run.folder.path}: nothing is trained there yet; go on with: luthier train {run.folder.path} --resume"
        )
    return folder


# -- before training: what cannot be right is refused here -----------------------------------------------------------


@dataclass(frozen=True)
class Workbench:
    """What a run is trained with, loaded and checked. stored: the number format of the base's weights as loaded."""

    recipe: Recipe
    section: TrainSection
    model: Any
    stored: Any
    tokenizer: Any
    encoder: Encoder
    data: Data
    order: Order
    prompts: list[Prompt]


def _workbench(recipe: Recipe, begun: RunFolder | None, world: World, say: Say) -> Workbench:
    from luthier.data.batches import order_of
    from luthier.generate import check_prompts
    from luthier.models.adapters import attach
    from luthier.models.load import footprint, idle_gpus, load_model
    from luthier.models.quantize import check_extras
    from luthier.training.optim import peak_lr
    from luthier.training.start import autocast_dtype

    check_extras(recipe)
    rate = peak_lr(recipe.train, recipe.method.kind)
    path, tokenizer, encoder = load_encoder(recipe, say, today_of(begun))
    _check_before_data(path, recipe)
    prompts = list[Prompt](load_prompts(recipe.generate))
    ids = [prompt_ids(encoder, prompt, recipe.generate) for prompt in prompts]
    data = load_data(recipe, encoder, say)
    if begun is not None:
        check_same_data(begun, data.report)
    order = order_of(data.train_sources, recipe.data.seed, recipe.train.batch)
    if idle := idle_gpus(recipe.train.devices):
        say(idle)
    model = load_model(path, held(recipe, world.device), world.device, say=say)
    say(f"model: {footprint(model)} on {world.device}{f', in {world.size} processes' if world.size > 1 else ''}")
    check_vocabulary(model, data, path)
    check_window(model, data, path)
    check_prompts(model, ids, recipe.generate)
    stored = model.dtype
    model = attach(model, recipe.method, recipe.train.seed, say=say, revision=recipe.model.revision)
    section = with_precision(recipe.train, stored, model.dtype, world.device.type, say)
    autocast_dtype(model, section)
    _say_rate(recipe, rate, say)
    return Workbench(recipe, section, model, stored, tokenizer, encoder, data, order, prompts)


def _check_before_data(path: Path, recipe: Recipe) -> None:
    """What the configuration alone tells to be wrong, before rows are encoded and weights are read. Errors: ModelError.

    A target that matches nothing, say: the method is tried on the model without its numbers.
    """
    import torch

    from luthier.models.adapters import attach
    from luthier.models.load import check_architecture, read_config
    from luthier.models.quantize import quantization
    from luthier.rehearsal import bare_model

    native = check_architecture(path, read_config(path), recipe.model.trust_vendor_code)
    if native and recipe.method.kind != "full":
        bare = bare_model(path, torch.float32, quantized=quantization(recipe.model.quantize))
        attach(bare, recipe.method, recipe.train.seed, say=lambda _: None)


def check_vocabulary(model: Any, data: Data, path: Path) -> None:
    """Errors: ModelError where the tokenizer gives an id that the model has no embedding for."""
    there = model.get_input_embeddings().num_embeddings
    largest = max(part.largest_id() for part in (data.train, data.eval) if part is not None)
    if largest >= there:
        raise ModelError(
            f"{path}: its tokenizer gives id {largest:,}, and the model has embeddings for {there:,} tokens only; "
            "the two do not belong together, or a token was added to the tokenizer alone"
        )


def check_window(model: Any, data: Data, path: Path) -> None:
    """Errors: ModelError where a row is longer than the model reads: it knows no positions beyond its window."""
    from luthier.models.load import window_of

    window = window_of(model) or math.inf
    for part in (part for part in (data.train, data.eval) if part is not None):
        longest = int(part.lengths.argmax())
        if part.lengths[longest] > window:
            raise ModelError(
                f"{part.origin(longest)} has {part.lengths[longest]:,} tokens, and {path} reads {window:,} "
                f"(max_position_embeddings); set data.max_length: {window}"
            )


def held(recipe: Recipe, device: Any) -> ModelSection:
    """Under train.precision: fp16 a GPU holds frozen weights so as well, unless the recipe names another format."""
    method, fp16 = recipe.method, recipe.train.precision == "fp16" and device.type == "cuda"
    frozen = method.kind != "full" and method.bias == "none" and not method.modules_to_save
    if fp16 and frozen and recipe.model.dtype == "auto":
        return recipe.model.model_copy(update={"dtype": "fp16"})
    return recipe.model


def with_precision(section: TrainSection, stored: Any, dtype: Any, device: str, say: Say) -> TrainSection:
    """auto follows the checkpoint's format, also where the weights were turned to fp32 because they train."""
    if section.precision == "fp16" and device == "cpu":
        say("train.precision: fp16 is for GPUs; a CPU computes in bf16 instead")
        return section.model_copy(update={"precision": "bf16"})
    if section.precision != "auto" or str(stored) != "torch.bfloat16" or dtype == stored:
        return section
    say("train.precision: auto is bf16, the checkpoint's format (by autocast: the weights that train stay fp32)")
    return section.model_copy(update={"precision": "bf16"})


def _say_rate(recipe: Recipe, rate: float, say: Say) -> None:
    from luthier.training.optim import default_lr

    if recipe.train.lr == "auto":
        _, why = default_lr(recipe.method.kind, recipe.train.optimizer)
        say(f"train.lr: auto is {rate:g} for {recipe.method.kind}: {why}")


# -- training, and what is left of it --------------------------------------------------------------------------------


def _trained(
    folder: RunFolder, bench: Workbench, world: World, checkpoint: Path | None, proof: bool, say: Say
) -> Outcome:
    from luthier.models.load import pad_id
    from luthier.training.loop import train as train_loop
    from luthier.training.monitor import Monitor

    return train_loop(
        bench.model,
        bench.data,
        bench.order,
        bench.section,
        bench.recipe.method.kind,
        folder,
        pad_id=pad_id(bench.tokenizer),
        write=lambda target: _write_result(target, bench),
        monitor=Monitor(folder, bench.section, say, writes=world.leads),
        say=say,
        world=world,
        resume=checkpoint,
        proof=proof,
    )


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
    libraries += ["bitsandbytes"] if find_spec("bitsandbytes") else []
    write_json(folder.path / "environment.json", machine | {name: version(name) for name in libraries})
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


def _write_samples(run: Run, bench: Workbench, say: Say) -> None:
    """The tuned model's replies to the recipe's prompts, into samples.jsonl."""
    if not bench.prompts:
        return
    replies = _saved(run, bench).answer(bench.prompts, run.recipe.generate)
    lines = []
    for prompt, reply in zip(bench.prompts, replies, strict=True):
        line = {"step": run.outcome.steps if run.outcome else None, "prompt": prompt, "reply": reply.text}
        lines.append(json.dumps({**line, "stopped": reply.stopped}, ensure_ascii=False) + "\n")
        say(f"sample: {_one_line(prompt)} → {_one_line(reply.text)}")
    write_atomic(run.folder.samples, "".join(lines))


def _saved(run: Run, bench: Workbench) -> Loaded:
    """What the run's folder holds, the best or the last: in the model at hand, so that there is no second in memory.

    Where base weights trained as well, or answers come from another quantisation, it is let go and what was saved is
    loaded, in the format that it will have.
    """
    from luthier.models.adapters import fill_adapter
    from luthier.models.quantize import let_go, quantization

    trained, asked = run.recipe.model, answering(run.recipe.model, run.recipe.generate)
    alike = quantization(trained.quantize) == quantization(asked.quantize)
    if run.recipe.method.kind != "full" and bench.model.dtype == bench.stored and alike:
        fill_adapter(bench.model, result_folder(run))
        return ready(bench.model, bench.tokenizer, bench.encoder)
    let_go(bench.model)
    return load_run(run)


def _one_line(text: Prompt) -> str:
    said = text if isinstance(text, str) else str(text[-1]["content"])
    return " ⏎ ".join(part.strip() for part in said.strip().splitlines() if part.strip())

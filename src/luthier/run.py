"""The story of a run: recipe → data → model → adapter → training → samples → the run folder, and back from it."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier import hub
from luthier.errors import ModelError, RecipeError, RunError
from luthier.folder import RunFolder, write_atomic, write_json
from luthier.quiet import quiet
from luthier.recipe import load_prompts, load_recipe, recipe_difference, run_name, save_recipe
from luthier.sections import DataSection, GenerateSection, ModelSection, Recipe, TrainSection

if TYPE_CHECKING:
    from luthier.compare import Comparison
    from luthier.data.encode import Encoder
    from luthier.data.prepare import Data
    from luthier.generate import Reply
    from luthier.merge import MergeReport
    from luthier.training.loop import Outcome

Say = Callable[[str], None]
Prompt = str | list[dict[str, Any]]

# A resumed run may change these: no step's numbers depend on them.
FREE_ON_RESUME = ("run", "train.log_every", "train.keep", "generate.", "merge.")
NOTE = "luthier.json"  # beside an adapter or a merged model: how its prompts are written


@dataclass(frozen=True)
class Loaded:
    """A model that can answer, with everything that its prompts need."""

    model: Any
    tokenizer: Any
    encoder: Encoder
    end_ids: list[int]

    def answer(
        self, prompts: Sequence[Prompt], section: GenerateSection, on_text: Callable[[str], None] | None = None
    ) -> list[Reply]:
        """Replies in the order of the prompts; `on_text` streams the one prompt's."""
        from luthier.generate import generate

        ids = [prompt_ids(self.encoder, prompt, section) for prompt in prompts]
        return generate(self.model, self.tokenizer, ids, section, self.end_ids, on_text)


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


def train(recipe: str | Path, overrides: Sequence[str] = (), *, resume: bool = False, say: Say = print) -> Run:
    """Carry a recipe to a trained adapter; with `resume`, a run folder (or the recipe of one) to its end.

    Errors: RecipeError, DataError, ModelError and HubError before anything is written; RunError while it trains.
    """
    quiet()
    wanted, continued = _wanted(Path(recipe), overrides, resume)
    from luthier.data.batches import order_of
    from luthier.models.adapters import attach
    from luthier.models.load import footprint, load_model, pad_id, pick_device
    from luthier.training.loop import train as train_loop
    from luthier.training.monitor import Monitor
    from luthier.training.optim import default_lr

    device = pick_device(wanted.train.devices)
    path, tokenizer, encoder = load_encoder(wanted, say, today_of(continued))
    data = load_data(wanted, encoder, say)
    model = load_model(path, wanted.model, device, say=say)
    say(f"model: {footprint(model)} on {device}")
    _check_vocabulary(model, data, path)
    stored = model.dtype
    model = attach(model, wanted.method, wanted.train.seed, say=say, revision=wanted.model.revision)
    section = _with_precision(wanted.train, stored, model, say)
    if wanted.train.lr == "auto":
        rate, reason = default_lr(wanted.method.kind)
        say(f"train.lr: auto is {rate:g} for {wanted.method.kind}: {reason}")
    folder = continued or RunFolder.create(run_name(wanted, Path(recipe)), Path.cwd())
    _record(folder, wanted, data, device)
    say(f"run: {folder.path}")
    outcome = train_loop(
        model,
        data,
        order_of(data.train_sources, wanted.data.seed, section.batch),
        section,
        wanted.method.kind,
        folder,
        pad_id=pad_id(tokenizer),
        write=lambda target: _write_result(target, model, tokenizer, encoder, wanted),
        monitor=Monitor(folder, section, say),
        say=say,
        resume=_checkpoint(folder) if continued else None,
    )
    run = Run(folder, wanted, outcome)
    if outcome.stopped is None:
        _write_samples(run, say)
    return run


def read_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of a file, or of a run folder (whose data may have moved since)."""
    if path.is_dir():
        return load_recipe(RunFolder.open(path).recipe, overrides, check_files=False)
    return load_recipe(path, overrides)


def load_encoder(recipe: Recipe, say: Say, today: date) -> tuple[Path, Any, Encoder]:
    """The model's folder, its tokenizer, and the encoder of the recipe's rows and prompts."""
    from luthier.data.encode import Encoder
    from luthier.models.load import load_tokenizer

    path = hub.model_path(recipe.model.name, recipe.model.revision, Path.cwd(), say)
    tokenizer = load_tokenizer(path)
    return path, tokenizer, Encoder(tokenizer, recipe.data, today)


def load_data(recipe: Recipe, encoder: Encoder, say: Say) -> Data:
    """The recipe's rows, encoded or from the cache."""
    from luthier.data.prepare import prepare

    return prepare(recipe.data, encoder, say)


def load_run(run: Run, *, base: bool = False, say: Say = lambda _: None) -> Loaded:
    """A run's tuned model, ready to answer (`base`: the model that it started from). Errors: RunError, ModelError."""
    from luthier.models.adapters import load_adapter
    from luthier.models.load import load_model, pick_device

    device = pick_device(run.recipe.train.devices)
    path, tokenizer, encoder = load_encoder(run.recipe, say, today_of(run.folder))
    whole = run.recipe.method.kind == "full"
    result = result_folder(run)
    if whole and not base:
        path = result
    model = load_model(path, run.recipe.model, device, say=say)
    if not whole and not base:
        model = load_adapter(model, result)
    return _ready(model, tokenizer, encoder)


def load_folder(name: str, adapter: Path | None, say: Say) -> Loaded:
    """A model by name or folder (a merged one, say), with an adapter folder on top where one is given."""
    from luthier.data.encode import Encoder
    from luthier.models.adapters import load_adapter
    from luthier.models.load import load_model, load_tokenizer, pick_device

    section = ModelSection(name=name)
    path = hub.model_path(name, None, Path.cwd(), say)
    noted = adapter if adapter is not None and (adapter / NOTE).is_file() else path
    tokenizer = load_tokenizer(noted)
    encoder = Encoder(tokenizer, _noted(noted, tokenizer), date.today())
    model = load_model(path, section, pick_device("auto"), say=say)
    return _ready(load_adapter(model, adapter) if adapter else model, tokenizer, encoder)


def result_folder(run: Run) -> Path:
    """Where the run's adapter (or, after full fine-tuning, model) lies. Errors: RunError where it is not there yet."""
    folder = run.folder.model if run.recipe.method.kind == "full" else run.folder.adapter
    if not folder.is_dir():
        raise RunError(
            f"{run.folder.path}: nothing is trained there yet; go on with: luthier train {run.folder.path} --resume"
        )
    return folder


def prompt_ids(encoder: Encoder, prompt: Prompt, section: GenerateSection) -> list[int]:
    """A prompt of the recipe or the command line as ids: raw text, a user's turn, or a list of messages."""
    from luthier.data.formats import Message

    if not isinstance(prompt, str):
        return encoder.prompt([Message(m["role"], m["content"]) for m in prompt], raw=False)
    return encoder.prompt(prompt, raw=encoder.template.raw if section.raw is None else section.raw)


# -- the parts -------------------------------------------------------------------------------------------------------


def _wanted(path: Path, overrides: Sequence[str], resume: bool) -> tuple[Recipe, RunFolder | None]:
    """The recipe, and the run folder to go on with. Errors: RecipeError where the recipe has changed since."""
    if (path / "recipe.yaml").is_file() and not resume:
        raise RecipeError(
            f"{path} is a run; go on with it by --resume, or train its recipe anew: {path / 'recipe.yaml'}"
        )
    if not resume:
        return load_recipe(path, overrides), None
    recipe = read_recipe(path, overrides)
    folder = RunFolder.open(path.absolute()) if path.is_dir() else _newest(run_name(recipe, path))
    begun = load_recipe(folder.recipe, check_files=False)
    changed = [line for line in recipe_difference(begun, recipe) if not line.startswith(FREE_ON_RESUME)]
    if changed:
        shown = "\n".join(f"  {line}" for line in changed)
        raise RecipeError(f"{folder.path} was begun with another recipe; undo the change, or start anew:\n{shown}")
    return recipe, folder


def _check_vocabulary(model: Any, data: Data, path: Path) -> None:
    """Errors: ModelError where the tokenizer gives an id that the model has no embedding for."""
    there, largest = model.get_input_embeddings().num_embeddings, data.train.largest_id()
    if largest >= there:
        raise ModelError(
            f"{path}: its tokenizer gives id {largest:,}, and the model has embeddings for {there:,} tokens only; "
            "the two do not belong together, or a token was added to the tokenizer alone"
        )


def _with_precision(section: TrainSection, stored: Any, model: Any, say: Say) -> TrainSection:
    """auto follows the checkpoint's format, also where the weights were turned to fp32 because they train."""
    if section.precision != "auto" or str(stored) != "torch.bfloat16" or model.dtype == stored:
        return section
    say("train.precision: auto is bf16, the checkpoint's format (by autocast: the weights that train stay fp32)")
    return section.model_copy(update={"precision": "bf16"})


def _newest(name: str) -> RunFolder:
    found = [p for p in Path("runs").glob(f"{name}*") if p.name == name or p.name[len(name) :].lstrip("-").isdigit()]
    if not found:
        raise RecipeError(f"there is no run {name} below {Path('runs').absolute()} to resume")
    return RunFolder.open(max(found, key=lambda p: int(p.name[len(name) + 1 :] or 1)).absolute())


def _checkpoint(folder: RunFolder) -> Path | None:
    from luthier.training import checkpoint

    return checkpoint.latest(folder.checkpoints)


def today_of(folder: RunFolder | None) -> date:
    """The date that templates see: the run's own, so that its rows stay the same tomorrow."""
    if folder is None or not folder.data.is_file():
        return date.today()
    return date.fromisoformat(json.loads(folder.data.read_text("utf-8"))["today"])


def _record(folder: RunFolder, recipe: Recipe, data: Data, device: Any) -> None:
    """What the run was made of: resolved recipe, data, environment, rejected rows."""
    save_recipe(recipe.model_copy(update={"run": folder.name}), folder.recipe)
    write_json(folder.data, data.report)
    rejected = [{**row._asdict()} for row in data.rejected]
    write_atomic(folder.rejected, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rejected))
    libraries = ("luthier", "torch", "transformers", "peft", "tokenizers", "accelerate", "datasets", "safetensors")
    environment = {"python": platform.python_version(), "platform": platform.platform(), "device": str(device)}
    write_json(folder.path / "environment.json", environment | {name: version(name) for name in libraries})


def _write_result(target: Path, model: Any, tokenizer: Any, encoder: Encoder, recipe: Recipe) -> None:
    """An adapter (or whole model) with its tokenizer, chat template, and the note of how its prompts are written."""
    from luthier.models.adapters import save_adapter

    tokenizer.chat_template = encoder.template.jinja or tokenizer.chat_template
    save_adapter(model, target, tokenizer)
    write_note(target, encoder, recipe.data)


def write_note(target: Path, encoder: Encoder, section: DataSection) -> None:
    """Record beside a model how its prompts are written, for `luthier generate FOLDER`."""
    keys = {"template", "text", "columns", "system", "before_prompt"}
    note = section.model_dump(include=keys) | ({"template": "auto"} if encoder.template.jinja else {})
    write_json(target / NOTE, {"data": note})


def _noted(folder: Path, tokenizer: Any) -> DataSection:
    if (folder / NOTE).is_file():
        return DataSection.model_validate({"train": "-", **json.loads((folder / NOTE).read_text("utf-8"))["data"]})
    return DataSection(train="-", template="auto" if tokenizer.chat_template else "plain")


def _ready(model: Any, tokenizer: Any, encoder: Encoder) -> Loaded:
    from luthier.models.load import end_ids

    ends = [*encoder.end_ids, *end_ids(tokenizer, model.generation_config)]
    return Loaded(model, tokenizer, encoder, sorted(set(ends)))


def _write_samples(run: Run, say: Say) -> None:
    """The tuned model's replies to the recipe's prompts, into samples.jsonl."""
    prompts = load_prompts(run.recipe.generate)
    if not prompts:
        return
    replies = load_run(run).answer(prompts, run.recipe.generate)
    lines = []
    for prompt, reply in zip(prompts, replies, strict=True):
        line = {"step": run.outcome.steps if run.outcome else None, "prompt": prompt, "reply": reply.text}
        lines.append(json.dumps({**line, "stopped": reply.stopped}, ensure_ascii=False) + "\n")
        say(f"sample: {_one_line(prompt)} → {_one_line(reply.text)}")
    write_atomic(run.folder.samples, "".join(lines))


def _one_line(text: Prompt) -> str:
    said = text if isinstance(text, str) else str(text[-1]["content"])
    return " ⏎ ".join(part.strip() for part in said.strip().splitlines() if part.strip())

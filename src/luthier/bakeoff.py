"""A bake-off: methods trained on the same rows, seeds and step budget, over one loaded base, and put into one table.

Every training is a run like any other, runs/NAME-KIND-SEED, that can be merged, talked with or gone on with; asked the
same again, those that are done are not trained again. `judge.py` measures, `view/bakeoffpage.py` shows.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from luthier.compare import HELD_OUT
from luthier.engine.memory import is_full
from luthier.errors import LuthierError, RecipeError, RunError
from luthier.folder import RunFolder, check_name, read_json, write_atomic, write_json
from luthier.judge import Judge, Trained, judge_of, table
from luthier.loaded import Say
from luthier.methods import METHODS, trains_base, whole
from luthier.models.adapters import load_adapter
from luthier.models.load import load_model
from luthier.models.weights import fingerprint
from luthier.quiet import quiet
from luthier.recipe import load_recipe, recipe_difference, run_name, with_method
from luthier.resume import check_same_data
from luthier.run import Run, carried, result_folder
from luthier.scores import Score
from luthier.sections import Recipe
from luthier.strength import OWN, passages
from luthier.training.distributed import World, join
from luthier.training.launch import launched
from luthier.training.monitor import forget_peak
from luthier.training.optim import peak_lr
from luthier.view.bakeoffpage import bakeoff_html, markdown, show
from luthier.view.notebook import shell
from luthier.workbench import Ground, check_window, held, load_ground, workbench

Given = TypeVar("Given")
NO_TRAINING = ("run:", "track", "generate.", "merge.", "train.log_every", "train.keep")
"""Keys that no number of a training depends on: a run that differs in them alone is not trained anew."""
SEEDS = 2
"""How often each method is trained: from one training nobody can tell a method from its luck."""
Screen = Callable[[], AbstractContextManager[dict[str, Any]]]
"""How a training is shown: `say`, and `watch` as `train` takes it."""


@dataclass(frozen=True)
class BakeOff:
    """What came of it: methods.json's content, and the page.

    stopped: the signal that ended it before all was trained; there are no figures then.
    """

    figures: dict[str, Any] | None
    page: Path
    stopped: int | None = None

    def _repr_html_(self) -> str | None:
        """For a notebook."""
        return bakeoff_html(self.figures) if self.figures else None


def compare_methods(
    recipe: str | Path,
    methods: Sequence[str],
    overrides: Sequence[str] = (),
    *,
    seeds: int = SEEDS,
    rows: int = HELD_OUT,
    text: Path | None = None,
    say: Say = print,
    screen: Screen | None = None,
) -> BakeOff:
    """`luthier compare --methods`: methods.{md,html,json} in runs/NAME-methods.

    The recipe's own method is trained as the recipe has it, the others with their defaults and rates. rows: most
    held-out rows that are scored and answered; text: general text of the user's own, to measure forgetting by.
    Errors: those of `train`, before anything is trained. A method that breaks off while it trains is told of in the
    table, and the others go on.
    """
    quiet()
    kinds, chosen = checked(methods), load_recipe(recipe, overrides)
    name = run_name(chosen, recipe)
    check_name(name, Path.cwd())
    devices = chosen.train.devices
    if launched() or (isinstance(devices, list) and len(devices) > 1):
        raise RecipeError("train.devices: the methods of a comparison are trained on one device; name one")
    numbers = range(chosen.train.seed, chosen.train.seed + seeds)
    recipes = {kind: [with_method(chosen, kind, seed) for seed in numbers] for kind in kinds}
    general = passages(text)
    with join(devices) as world:
        _check_held(recipes, world)
        ground = load_ground(chosen, [of_seeds[0].method for of_seeds in recipes.values()], None, world, say)
        _check(recipes, ground, name)
        if chosen.generate.quantize is not None:
            say("generate.quantize: not for this: every method answers over the base that it was trained on")
        judge = judge_of(ground, chosen.generate, rows, general)
        base = judge.score(ground.model, "the base")
        found: dict[str, list[Trained]] = {kind: [] for kind in kinds}
        for kind, wanted in _turns(recipes, found, say):
            run_of = f"{name}-{kind}-{wanted.train.seed}"
            with screen() if screen else nullcontext({"say": say}) as shown:
                trained = partial(_trained, wanted, run_of, ground, world, not found[kind], **shown)
                run = _or_reason(trained)
            if isinstance(run, Run) and run.outcome is not None and run.outcome.stopped is not None:
                return BakeOff(None, run.folder.path, run.outcome.stopped)
            scored: Score | str = run if isinstance(run, str) else _or_reason(partial(_scored, run, judge, world))
            if isinstance(run, str) or isinstance(scored, str):
                say(f"{kind}: {scored}")
                found[kind].append(Trained(wanted, None, str(scored), None))
            else:
                found[kind].append(Trained(wanted, run, None, scored))
    figures = {"name": name, **table(judge, chosen, base, found, OWN if text is None else str(text))}
    return BakeOff(figures, _written(figures, say))


def checked(methods: Sequence[str]) -> list[str]:
    """The kinds asked for. Errors: RecipeError for one that is unknown or named twice, and for fewer than two."""
    kinds = [kind.strip() for kind in methods if kind.strip()]
    for kind in kinds:
        if kind not in METHODS:
            near = get_close_matches(kind, METHODS, 1)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(METHODS)}"
            raise RecipeError(f"--methods: there is no method {kind}; {hint}")
        if kinds.count(kind) > 1:
            raise RecipeError(f"--methods: {kind} is named twice")
    if len(kinds) < 2:
        raise RecipeError("--methods: name two at least, as lora,p_tuning")
    return kinds


def _turns(
    recipes: Mapping[str, Sequence[Recipe]], found: Mapping[str, Sequence[Trained]], say: Say
) -> Iterator[tuple[str, Recipe]]:
    """Method by method, seed by seed, each announced; no further seed of a method that broke off."""
    turns = [(kind, wanted) for kind, of_seeds in recipes.items() for wanted in of_seeds]
    for number, (kind, wanted) in enumerate(turns, start=1):
        if any(one.failed for one in found[kind]):
            continue
        say(f"\n── {METHODS[kind].title}, seed {wanted.train.seed} ── {number} of {len(turns)}\n")
        yield kind, wanted


def _written(figures: dict[str, Any], say: Say) -> Path:
    """The table on the screen, and methods.{json,md,html}; the page's path."""
    from rich.console import Console

    if shell() is None:
        say("")
        show(figures, Console())
    page = Path("runs").absolute() / f"{figures['name']}-methods" / "methods.html"
    page.parent.mkdir(parents=True, exist_ok=True)
    write_json(page.with_suffix(".json"), figures)
    write_atomic(page.with_suffix(".md"), markdown(figures))
    write_atomic(page, bakeoff_html(figures))
    say(f"page: {page}")
    return page


# -- training ----------------------------------------------------------------------------------------------------------


def _check(recipes: Mapping[str, Sequence[Recipe]], ground: Ground, name: str) -> None:
    """What a method would be refused for, and what another process has in hand, before any is trained.

    Errors: RecipeError, ModelError, RunError.
    """
    check_window(ground.model, ground.data, ground.path, ground.virtual)
    for kind, of_seeds in recipes.items():
        peak_lr(of_seeds[0].train, kind, ground.model)
        for wanted in of_seeds:
            begun = _begun(wanted, f"{name}-{kind}-{wanted.train.seed}", ground)
            with begun.locked() if begun is not None else nullcontext():
                pass


def _check_held(recipes: Mapping[str, Sequence[Recipe]], world: World) -> None:
    """Errors: RecipeError where one loaded base is not what each method would load by itself (fp16 on a GPU)."""
    (first, *others) = recipes
    for kind in others:
        if held(recipes[kind][0], world.device) != held(recipes[first][0], world.device):
            raise RecipeError(
                f"train.precision: fp16 holds the base in fp16 for one of {first} and {kind}, and not for the other; "
                "compare them apart, or set train.precision: bf16"
            )


def _or_reason(call: Callable[[], Given]) -> Given | str:
    """What it gives; or in a line why it broke off, for the table."""
    try:
        return call()
    except LuthierError as error:
        return str(error)
    except RuntimeError as error:
        if not is_full(error):
            raise
        return "out of memory"


def _trained(
    recipe: Recipe,
    name: str,
    ground: Ground,
    world: World,
    proof: bool,
    say: Say,
    watch: Callable[[Path], None] | None = None,
) -> Run:
    """The run of a method and a seed: done before, gone on with, or trained."""
    begun = _begun(recipe, name, ground)
    if begun is not None and (read_json(begun.status) or {}).get("state") == "done":
        run = Run(begun, recipe)
        with suppress(RunError):  # its result may have been removed since
            result_folder(run)
            say(f"run: {begun.path}, trained already")
            return run
        begun = None
    forget_peak()
    with ExitStack() as stack:
        if begun is not None:
            stack.enter_context(begun.locked())
        own = replace(ground, model=twin(ground.model, weights=trains_base(recipe.method)))
        bench = workbench(recipe, begun, world, say, own)
        return carried(bench, begun, name, world, stack, proof=proof or begun is not None, say=say, watch=watch)


def twin(model: Any, *, weights: bool) -> Any:
    """A model of the same weights, for a method to change and to be thrown away afterwards.

    Its modules are its own, and with `weights` its weights too. Else each tensor is the model's, and costs nothing.
    """
    if weights:
        return copy.deepcopy(model)
    shared = [*model.parameters(), *model.buffers()]
    shared += [module.quant_state for module in model.modules() if getattr(module, "quant_state", None) is not None]
    return copy.deepcopy(model, {id(one): one for one in shared})


def _begun(recipe: Recipe, name: str, ground: Ground) -> RunFolder | None:
    """The newest run of that name with this very training: recipe, base weights, rows, and day if templates see it."""
    there = Path("runs").absolute().glob(f"{name}*/recipe.yaml")
    weights, today = fingerprint(ground.path), ground.encoder.today.isoformat()
    for folder in sorted((RunFolder(path.parent) for path in there), key=lambda one: -one.recipe.stat().st_mtime):
        with suppress(RecipeError):
            changed = recipe_difference(load_recipe(folder.recipe, check_files=False), recipe)
            if not all(line.startswith(NO_TRAINING) for line in changed):
                continue
            check_same_data(folder, ground.data.report)
            environment = read_json(folder.path / "environment.json") or {}
            same_day = ground.encoder.identity["today"] is None or (read_json(folder.data) or {}).get("today") == today
            if same_day and environment.get("model", {}).get("weights") == weights:
                return folder
    return None


def _scored(run: Run, judge: Judge, world: World) -> Score:
    """The run's result, as it was saved, over the loaded base."""
    return judge.score(_tuned(run, judge.ground, world), f"{run.recipe.method.kind}, seed {run.recipe.train.seed}")


def _tuned(run: Run, ground: Ground, world: World) -> Any:
    result, method = result_folder(run), run.recipe.method
    if whole(method.kind):
        section = run.recipe.model.model_copy(update={"name": str(result)})
        return load_model(result, section, world.device, say=lambda _: None)
    return load_adapter(twin(ground.model, weights=trains_base(method)), result)

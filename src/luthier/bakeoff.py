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
from pathlib import Path
from typing import Any

from luthier.compare import HELD_OUT
from luthier.errors import LuthierError, RecipeError, RunError
from luthier.folder import RunFolder, check_name, read_json, write_atomic, write_json
from luthier.judge import Trained, judge_of, table
from luthier.loaded import Say
from luthier.methods import METHODS, trains_base, whole
from luthier.models.adapters import load_adapter
from luthier.models.load import load_model
from luthier.quiet import quiet
from luthier.recipe import load_recipe, recipe_difference, run_name, with_method
from luthier.resume import check_same_data
from luthier.run import Run, carried, result_folder
from luthier.sections import Recipe
from luthier.strength import OWN, passages
from luthier.training.distributed import World, join
from luthier.training.launch import launched
from luthier.training.monitor import forget_peak
from luthier.view.bakeoffpage import bakeoff_html, markdown, show
from luthier.view.notebook import shell
from luthier.workbench import Ground, load_ground, workbench

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
        ground = load_ground(chosen, [of_seeds[0].method for of_seeds in recipes.values()], None, world, say)
        judge = judge_of(ground, chosen.generate, rows, general)
        base = judge.score(ground.model, "the base")
        found: dict[str, list[Trained]] = {kind: [] for kind in kinds}
        for kind, wanted in _turns(recipes, found, say):
            with screen() if screen else nullcontext({"say": say}) as shown:
                proof = not found[kind]  # another seed's passes are the same
                run = _trained(wanted, f"{name}-{kind}-{wanted.train.seed}", ground, world, proof, **shown)
            if isinstance(run, Run) and run.outcome is not None and run.outcome.stopped is not None:
                return BakeOff(None, run.folder.path, run.outcome.stopped)
            if isinstance(run, str):
                say(f"{kind}: {run}")
                found[kind].append(Trained(wanted, None, run, None))
                continue
            scored = judge.score(_tuned(run, ground, world), f"{kind}, seed {wanted.train.seed}")
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


def _trained(
    recipe: Recipe,
    name: str,
    ground: Ground,
    world: World,
    proof: bool,
    say: Say,
    watch: Callable[[Path], None] | None = None,
) -> Run | str:
    """The run of a method and a seed: done before, gone on with, or trained; or why it broke off, in a line."""
    begun = _begun(recipe, name, ground)
    if begun is not None and (read_json(begun.status) or {}).get("state") == "done":
        run = Run(begun, recipe)
        with suppress(RunError):  # its result may have been removed since
            result_folder(run)
            say(f"run: {begun.path}, trained already")
            return run
        begun = None
    forget_peak()
    try:
        with ExitStack() as held:
            if begun is not None:
                held.enter_context(begun.locked())
            own = replace(ground, model=twin(ground.model, weights=trains_base(recipe.method)))
            bench = workbench(recipe, begun, world, say, own)
            return carried(bench, begun, name, world, held, proof=proof, say=say, watch=watch)
    except LuthierError as error:
        return str(error)


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
    """The newest run of that name with this very recipe and these rows."""
    there = Path("runs").absolute().glob(f"{name}*/recipe.yaml")
    for folder in sorted((RunFolder(path.parent) for path in there), key=lambda one: -one.recipe.stat().st_mtime):
        with suppress(RecipeError):
            changed = recipe_difference(load_recipe(folder.recipe, check_files=False), recipe)
            if all(line.startswith(("run:", "track:")) for line in changed):
                check_same_data(folder, ground.data.report)
                return folder
    return None


def _tuned(run: Run, ground: Ground, world: World) -> Any:
    """The run's result as it was saved, over the loaded base."""
    result, method = result_folder(run), run.recipe.method
    if whole(method.kind):
        section = run.recipe.model.model_copy(update={"name": str(result)})
        return load_model(result, section, world.device, say=lambda _: None)
    return load_adapter(twin(ground.model, weights=trains_base(method)), result)

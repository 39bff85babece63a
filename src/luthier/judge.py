"""What every model of a bake-off is asked, and the table that comes of it: the content of methods.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from luthier.compare import asked, held_out
from luthier.data.batches import total_steps
from luthier.errors import RecipeError
from luthier.folder import read_json
from luthier.history import read_lines
from luthier.loaded import ready
from luthier.methods import METHODS, trains_base
from luthier.models.load import window_of
from luthier.replies import Question
from luthier.run import Run, result_folder
from luthier.scores import Score, differences, figures
from luthier.sections import GenerateSection, Recipe
from luthier.strength import AT_ONCE, Text, drawn_rows, pieces, score
from luthier.training.monitor import GIB, forget_peak
from luthier.view.strengthpage import bar
from luthier.workbench import Ground


@dataclass(frozen=True)
class Trained:
    """One training of a method: its recipe and, where it did not break off (`failed` says why), its run and score."""

    recipe: Recipe
    run: Run | None
    failed: str | None
    score: Score | None


@dataclass(frozen=True)
class Judge:
    """The recipe's prompts, held-out rows and general text, the same for every model."""

    ground: Ground
    section: GenerateSection
    ends: list[int]
    questions: list[Question]
    rows: list[Text]
    general: list[Text]
    peaks: bool
    """Can a training's own peak of memory be told from that of what came before it?"""

    def score(self, model: Any, whose: str) -> Score:
        """A model's losses and greedy answers, behind a progress bar."""
        things = len(self.rows) + len(self.general) + -(-len(self.questions) // AT_ONCE)
        with bar(things, f"{whose} is asked") as done:
            asked = (self.questions, self.rows, self.general, self.section, self.ends)
            return score(model.eval(), self.ground.tokenizer, *asked, done)


def judge_of(ground: Ground, section: GenerateSection, rows: int, general: Sequence[str]) -> Judge:
    """rows: most held-out rows. Errors: RecipeError where there are none.

    Every model is asked the same, which all have room for behind the virtual tokens of any.
    """
    encoder, model = ground.encoder, ground.model
    window = window_of(model)
    window = None if window is None else window - ground.virtual
    room = min((limit for limit in (window, section.max_length) if limit is not None), default=None)
    scored = drawn_rows(ground.data.eval, encoder, rows)
    if not scored:
        raise RecipeError("nothing to compare methods by: give data.eval, rows that are not trained on (0.1, say)")
    kept, _ = held_out(ground.data.eval, encoder, ground.tokenizer, room, rows)
    questions = [*asked(ground.prompts, encoder, section), *kept]
    ends = ready(model, ground.tokenizer, encoder).end_ids
    return Judge(ground, section, ends, questions, scored, pieces(encoder, general, window), forget_peak())


def table(
    judge: Judge, recipe: Recipe, base: Score, found: Mapping[str, Sequence[Trained]], source: str
) -> dict[str, Any]:
    """All but the name: methods from the best to the worst, those that broke off last. source: of the general text.

    The best answers most held-out rows exactly; where there are none, or as many, it has the least held-out loss.
    """
    data, train, questions = judge.ground.data, recipe.train, judge.questions
    scores = {kind: [one.score for one in of_seeds if one.score] for kind, of_seeds in found.items()}
    whole = {kind: figures(of_kind, base, questions) for kind, of_kind in scores.items() if of_kind}
    order = sorted(whole, key=lambda kind: (-(whole[kind]["exact"] or 0), whole[kind]["loss"]))
    methods = []
    for kind in [*order, *(kind for kind in found if kind not in whole)]:
        apart = differences(scores[kind], scores[order[0]], questions) if kind in order[1:] else None
        parts = {"figures": whole.get(kind), "difference": apart}
        methods.append(_method(kind, found[kind], judge) | parts | {"seeds": _seeds(found[kind], base, judge)})
    counts = [tokens for _, tokens in base.texts]
    return {
        "about": f"model {_name(recipe)} · {total_steps(train, judge.ground.order):,} steps of {train.batch} rows",
        "seeds": [one.recipe.train.seed for one in max(found.values(), key=len)],
        "steps": total_steps(train, judge.ground.order),
        "batch": train.batch,
        "rows": {
            "train": len(data.train),
            "held_out": len(data.eval or ()),
            "scored": len(judge.rows),
            "answered": sum(question.reference is not None for question in questions),
        },
        "text": {"from": source, "pieces": len(counts), "tokens": sum(counts)},
        "vocabulary": int(judge.ground.model.config.get_text_config().vocab_size),
        "best": order[0] if order else None,
        "base": figures([base], base, questions),
        "methods": methods,
        "answers": [
            {
                "origin": question.origin,
                "prompt": question.text,
                "reference": question.reference,
                "replies": {"base": base.replies[i].text}
                | {kind: of_kind[0].replies[i].text for kind, of_kind in scores.items() if of_kind},
            }
            for i, question in enumerate(questions)
        ],
    }


def _method(kind: str, of_seeds: Sequence[Trained], judge: Judge) -> dict[str, Any]:
    """What a method was trained with, and what it took: bytes of its result and of memory, seconds a step."""
    method, about = of_seeds[0].recipe.method, METHODS[kind]
    runs = [one.run for one in of_seeds if one.run]
    counts = (read_json(runs[0].folder.path / "environment.json") or {}).get("model", {}) if runs else {}
    auto = of_seeds[0].recipe.train.lr == "auto"
    weights = list(result_folder(runs[0]).glob("*.safetensors")) if runs else []
    peaks = [peak for peak in (_peak(run, judge) for run in runs) if peak is not None]
    return {
        "kind": kind,
        "title": about.title,
        "rate": max((line["lr"] for line in _steps(runs[0])), default=None) if runs else None,
        "why": about.why if auto else "the recipe's own",
        "tuned": about.tuned,
        "settings": {name: value for name, value in method.model_dump().items() if name in about.fields},
        "trainable": counts.get("trainable"),
        "total": counts.get("parameters"),
        "bytes": sum(file.stat().st_size for file in weights) if runs else None,
        "peak_bytes": max(peaks, default=None),
        "seconds_a_step": median(_seconds(run) for run in runs) if runs else None,
        "mergeable": about.merges,
        "failed": next((one.failed for one in of_seeds if one.failed), None),
    }


def _seeds(of_seeds: Sequence[Trained], base: Score, judge: Judge) -> list[dict[str, Any]]:
    return [
        {
            "seed": one.recipe.train.seed,
            "run": str(one.run.folder.shown),
            "figures": figures([one.score], base, judge.questions),
            "seconds_a_step": _seconds(one.run),
            "peak_bytes": _peak(one.run, judge),
            "curve": [
                [line["step"], line["eval_loss"]]
                for line in read_lines(one.run.folder.metrics)
                if line["eval_loss"] is not None
            ],
        }
        for one in of_seeds
        if one.run is not None and one.score is not None
    ]


def _steps(run: Run) -> list[dict[str, Any]]:
    return [line for line in read_lines(run.folder.metrics) if line["loss"] is not None]


def _seconds(run: Run) -> float:
    """The median of its steps but the first, which warms up."""
    taken = _steps(run)[1:] or _steps(run)
    return float(median(line["tokens"] / line["tokens_per_second"] for line in taken))


def _peak(run: Run, judge: Judge) -> int | None:
    """Most bytes while it trained; on the CPU those of the whole process, without a base that lay idle beside it."""
    if not judge.peaks:
        return None
    idle = judge.ground.model.get_memory_footprint() if trains_base(run.recipe.method) else 0
    return int(max(line["memory_gib"] for line in read_lines(run.folder.metrics)) * GIB) - idle


def _name(recipe: Recipe) -> str:
    """A folder's own name, or the hub's."""
    return Path(recipe.model.name).name if Path(recipe.model.name).is_dir() else recipe.model.name

"""A run's adapter at several strengths: what the task gains by it, and what of general text is forgotten for it.

Nothing is trained. `models/scaling.py` says what a strength is, `scores.py` what is measured, and
`view/strengthpage.py` shows it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812

from luthier.compare import answers, asked, held_out, room_of
from luthier.data.encode import Encoder
from luthier.data.examples import Examples
from luthier.data.prepare import Data
from luthier.engine.soft import virtual_of
from luthier.errors import DataError, RecipeError
from luthier.folder import write_atomic, write_json
from luthier.loaded import Prompt, Say, load_data
from luthier.methods import whole
from luthier.models.load import window_of
from luthier.models.quantize import let_go
from luthier.models.scaling import at_strength, check_kind, differing, set_whole
from luthier.recipe import load_prompts
from luthier.replies import Question
from luthier.run import Run, load_run
from luthier.scores import Score, figures, least
from luthier.sections import GenerateSection
from luthier.view.notebook import shell
from luthier.view.report import about, write_report
from luthier.view.strengthpage import bar, markdown, show, strength_html

STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25)
ROWS = 64  # held-out rows that are scored and answered
PIECE, MOST = 512, 16_384  # tokens of a general text at once, and of all; the package's own has about 3,000
OWN = "Luthier's general text"
AT_ONCE = 16  # questions between two steps of the progress bar

Text = tuple[list[int], np.ndarray]
"""ids, and the places whose tokens count: int64, ascending, none of them 0."""
At = Callable[[float], AbstractContextManager[Any]]
"""A strength → the model at it, for the length of a block."""


@dataclass(frozen=True)
class Strengths:
    """A model at several strengths; the first is 0, the base."""

    questions: list[Question]
    scores: dict[float, Score]
    text: str
    """Where the general text is from."""
    words: int
    """Of the model's vocabulary: a perplexity beyond it is worse than guessing."""

    def figures(self) -> dict[float, dict[str, Any]]:
        """`scores.figures` at each strength, those of 0 first."""
        return {at: figures([score], self.scores[0.0], self.questions) for at, score in self.scores.items()}

    @property
    def best(self) -> float | None:
        """`scores.least`; None where the general text is none that the base knows."""
        found = self.figures()
        return least(found) if found[0.0]["perplexity"] <= self.words else None

    def as_json(self) -> dict[str, Any]:
        """All of it, for strength.json."""
        tokens = [tokens for _, tokens in self.scores[0.0].texts]
        return {
            "text": {"from": self.text, "pieces": len(tokens), "tokens": sum(tokens)},
            "vocabulary": self.words,
            "rows": len(self.scores[0.0].rows),
            "strengths": [{"strength": at, **found} for at, found in self.figures().items()],
            "answers": [
                {"origin": question.origin, "prompt": question.text, "reference": question.reference}
                | {"replies": {f"{at:g}": score.replies[i].text for at, score in self.scores.items()}}
                for i, question in enumerate(self.questions)
            ],
        }


def strengths_of(run: Run, *, rows: int, text: Path | None, say: Say) -> Strengths:
    """`luthier compare --strength`: measured, shown, and written into the run's folder. Errors: those of `measure`."""
    from rich.console import Console

    check_kind(run.recipe.method.kind)
    general = passages(text)
    tuned = load_run(run, say=say)
    before = load_run(run, base=True).model if whole(run.recipe.method.kind) else None
    found = measure(
        _whole_at(before, tuned.model) if before is not None else partial(at_strength, tuned.model),
        prompts=load_prompts(run.recipe.generate),
        data=load_data(run.recipe, tuned.encoder, lambda _: None),
        encoder=tuned.encoder,
        tokenizer=tuned.tokenizer,
        section=run.recipe.generate,
        end_ids=tuned.end_ids,
        rows=rows,
        text=general,
        source=OWN if text is None else str(text),
        say=say,
        bar=bar,
    )
    if shell() is None:
        show(found, Console())
    page = run.folder.path / "strength.html"
    told = {"name": run.folder.name, "about": about(run.folder)}
    write_json(page.with_suffix(".json"), found.as_json())
    write_atomic(page.with_suffix(".md"), markdown(found, **told))
    write_atomic(page, strength_html(found, **told))
    write_report(run.folder)
    say(f"page: {page}")
    return found


def _whole_at(base: Any, tuned: Any) -> At:
    """After full fine-tuning, where there is no adapter to scale. The base is let go."""
    moved = differing(base, tuned)
    let_go(base)

    @contextmanager
    def at(strength: float) -> Iterator[Any]:
        set_whole(tuned, moved, strength)
        yield tuned

    return at


def measure(
    at: At,
    *,
    prompts: Sequence[Prompt],
    data: Data,
    encoder: Encoder,
    tokenizer: Any,
    section: GenerateSection,
    end_ids: Sequence[int],
    rows: int = ROWS,
    text: Sequence[str],
    source: str,
    say: Say,
    bar: Callable[[int], AbstractContextManager[Callable[[], None]]],
) -> Strengths:
    """Score a model at every strength of `STRENGTHS`; `at` gives it at one, for the length of a block.

    rows: most held-out rows. text: passages that have nothing to do with the task; source: where they are from. bar:
    given the number of things to do, what to call behind each. Errors: RecipeError where there is neither prompt nor
    held-out row.
    """
    with at(1.0) as model:
        room = room_of(model, section)
        questions = [*asked(prompts, encoder, section), *held_out(data.eval, encoder, tokenizer, room, rows)[0]]
        scored = drawn_rows(data.eval, encoder, rows)
        general = pieces(encoder, text, window_of(model))
        words = int(model.config.get_text_config().vocab_size)
    if not questions and not scored:
        raise RecipeError("nothing to measure the task by: give data.eval, or generate.prompts")
    tokens = sum(len(places) for _, places in general)
    held = len(data.eval) if data.eval else 0
    of = f"{len(scored)} of {held} held-out rows" if held else "no held-out rows (data.eval): the task has no score"
    say(f"strength: {of}, {len(prompts)} prompts, {tokens:,} tokens of {source}")
    each = len(scored) + len(general) + -(-len(questions) // AT_ONCE)
    scores = {}
    with bar(each * len(STRENGTHS)) as done:
        for strength in STRENGTHS:
            with at(strength) as model:
                scores[strength] = score(model, tokenizer, questions, scored, general, section, end_ids, done)
    return Strengths(questions, scores, source, words)


def score(
    model: Any,
    tokenizer: Any,
    questions: Sequence[Question],
    rows: Sequence[Text],
    general: Sequence[Text],
    section: GenerateSection,
    end_ids: Sequence[int],
    done: Callable[[], None],
) -> Score:
    """One model: its losses on rows and general texts, and greedy answers. `done` is called a step of the work."""
    greedy = section.model_copy(update={"sample": False})
    replies = []
    for start in range(0, len(questions), AT_ONCE):
        replies += answers(model, tokenizer, questions[start : start + AT_ONCE], greedy, end_ids)
        done()
    return Score(list(losses(model, rows, done)), list(losses(model, general, done)), replies)


@torch.inference_mode()
def losses(model: Any, texts: Sequence[Text], done: Callable[[], None]) -> Iterator[tuple[float, int]]:
    """Of each text the summed cross entropy of its places, in nats and fp32, and their number.

    PEFT puts a soft prompt's virtual tokens before the row: the logits stand so many places further on.
    """
    virtual = virtual_of(model)
    shift = virtual.tokens if virtual.columns else 0
    for ids, places in texts:
        row = torch.tensor([ids], device=model.device)
        at = torch.from_numpy(places).to(model.device)
        logits = model(input_ids=row, logits_to_keep=at - 1 + shift, use_cache=False).logits[0].float()
        yield float(F.cross_entropy(logits, row[0, at], reduction="sum")), len(places)
        done()


# -- what is read ----------------------------------------------------------------------------------------------------


def drawn_rows(rows: Examples | None, encoder: Encoder, most: int) -> list[Text]:
    """Up to `most` rows of the eval part, in the order in which `compare.held_out` draws them."""
    if not rows:
        return []
    order = np.random.Generator(np.random.Philox(key=[encoder.section.seed, 4])).permutation(len(rows))
    chosen = [rows[i] for i in order[:most].tolist()]
    return [(one.ids.tolist(), np.flatnonzero(one.supervised)) for one in chosen]


def passages(file: Path | None) -> list[str]:
    """Text that has nothing to do with the task: the user's own, or the package's; passages stand between blank lines.

    Errors: DataError for a file that cannot be read or holds no text.
    """
    try:
        text = (file or resources.files("luthier") / "assets" / "general.txt").read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = "not UTF-8" if isinstance(error, UnicodeDecodeError) else error.strerror
        raise DataError(f"--text {file}: {reason}; it is plain text, with blank lines between passages") from None
    found = [passage.strip() for passage in text.replace("\r\n", "\n").split("\n\n") if passage.strip()]
    if not found:
        raise DataError(f"--text {file}: it holds no text")
    return found


def pieces(encoder: Encoder, texts: Sequence[str], window: int | None) -> list[Text]:
    """Texts as ids, as raw prompts are, with what the tokenizer puts before; in pieces that the window holds."""
    size, left = min(PIECE, window or PIECE), MOST
    found: list[Text] = []
    for text in texts:
        ids = encoder.prompt(text, raw=True) if left > 1 else []
        for start in range(0, len(ids), size):
            piece = ids[start : start + min(size, left)]
            left -= len(piece)
            if len(piece) > 1:
                found.append((piece, np.arange(1, len(piece))))
    if not found:
        raise DataError("--text: it is a single token; give some sentences")
    return found

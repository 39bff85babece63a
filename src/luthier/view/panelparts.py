"""What the panel of a run shows, part by part: lines of text as wide as they may be."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from rich.cells import cell_len, chop_cells
from rich.text import Text

from luthier.history import History
from luthier.html import visible
from luthier.replies import said
from luthier.view.charts import smoothed, steep
from luthier.words import duration

COLUMN = 50  # cells of the terminal for a column of facts
LABEL = 15  # cells of a fact's name
CURVE = 4  # lines of the loss's curve
SAMPLES = 3  # replies at once
TURN = 8.0  # seconds until the next ones
ACCENT, GOOD, WARN, BAD, SOFT = "cyan", "green", "yellow", "red", "bright_black"
NOTHING = "–"
PHASES = {"saving": "saving a checkpoint", "ended": "ending"}
STATES = {"done": GOOD, "stopped": WARN, "failed": BAD, "dead": BAD}
BLANK = 0x2800  # of braille; some fonts draw circles for it, so a blank stands in its place
DOTS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))  # of a braille cell: left and right, downwards

Fact = tuple[str, str]


def standing(history: History) -> Fact:
    """In words, and in which colour."""
    if not history.status:
        return "no step yet", SOFT
    if history.state != "running":
        return history.state, STATES[history.state]
    phase = history.status["phase"]
    return ("hung", f"bold {BAD}") if history.hung is not None else (PHASES.get(phase, phase), ACCENT)


def progress(history: History, inner: int) -> Text:
    """The step of all steps, with its bar."""
    step, steps = history.step, history.steps
    if steps is None:
        return Text("no step yet", SOFT)
    line = Text.assemble("step ", (f"{step:,}", "bold"), f" of {steps:,}  ")
    share = f"{min(round(100 * step / max(steps, 1)), 100 if step >= steps else 99):>4} %"
    bar = inner - line.cell_len - len(share)
    done = bar * step // max(steps, 1)
    return line.append("━" * done, standing(history)[1]).append("─" * (bar - done), SOFT).append(share)


def hang(history: History) -> str | None:
    """In words, where the run hangs."""
    if history.hung is None:
        return None
    status, step = history.status, history.step
    what = f"step {step + 1}" if status["phase"] == "training" else f"{status['phase']} after step {step}"
    usual = f"; usual {brief(status['usual'])}" if status.get("usual") else ""
    return f"{what} shows no progress for {duration(history.hung)}{usual}"


def remarks(history: History, inner: int) -> list[Text]:
    """What does not go as it should, and what was said at the end."""
    status, told, style = history.status, hang(history), BAD
    if history.state == "dead" and status:
        ago = duration(history.now - status["time"])
        told = f"its process ended without a word, {ago} ago; {history.folder.standing()}"
    elif history.state in ("done", "stopped", "failed"):
        told, style = plain(status["message"]), BAD if history.state == "failed" else ""
        told = told if history.state == "failed" else f"kept: {told}"
    return [Text(line, style) for line in wrapped(told, inner)[:4]] if told else []


def losses(history: History, inner: int) -> list[Text]:
    """Losses and learning rate, and beside them the curve of the training loss."""
    last, losses, evals, best = history.last, history.losses, history.eval_losses, history.best_eval
    facts = [
        ("loss", f"{losses[-1][1]:.4f}" if losses else NOTHING),
        ("eval loss", f"{evals[-1][1]:.4f} {direction(evals)}" if evals else NOTHING),
        ("best eval", f"{best[1]:.4f} at step {best[0]:,}" if best else NOTHING),
        ("learning rate", f"{last['lr']:.2e}" if last else NOTHING),
    ]
    lines = [fact_line(fact) for fact in facts]
    lines[0].stylize("bold", LABEL)
    if len(losses) < 2:
        return lines
    left = max(LABEL + 14, *(line.cell_len for line in lines)) + 2
    values = [loss for _, loss in losses]
    low, high, rows = curve(values, inner - left - 8, CURVE, log=steep(values))
    labels = [edge(high), "log" * steep(values), *[""] * (CURVE - 3), edge(low)]
    for line, label, row in zip(lines, labels, rows, strict=True):
        line.pad_right(left - line.cell_len)
        line.append(f"{label:>6} {'┤' if label not in ('', 'log') else '│'}", SOFT).append(row, ACCENT)
    return lines


def edge(loss: float) -> str:
    """In six cells at most."""
    return f"{loss:,.0f}" if loss >= 1000 else f"{loss:#.3g}".rstrip(".") if loss >= 0.1 else f"{loss:.4f}"


def direction(evals: Sequence[tuple[int, float]]) -> str:
    """How the newest eval loss lies to the one before."""
    if len(evals) < 2:
        return ""
    before, now = evals[-2][1], evals[-1][1]
    return "falling" if now < before else "rising" if now > before else "level"


def gpus(gpus: Sequence[dict[str, Any]], inner: int) -> list[Text]:
    """A line a card, one under the other; what does not fit goes from the right."""
    rows = [gpu_facts(gpu) for gpu in gpus]
    columns = [column for column in zip(*rows, strict=True) if any(text != NOTHING for text, _ in column)]
    widths = [max(cell_len(text) for text, _ in column) for column in columns]
    for gap, first in ((2, LABEL - 2), (2, 0), (1, 0)):
        taken = [max(width, first if not i else 0) + gap for i, width in enumerate(widths)]
        if sum(taken[:-1]) - gap <= inner:  # the name may go, the rest had better stay
            break
    lines = [Text() for _ in rows]
    for number, column in enumerate(columns):
        if sum(taken[: number + 1]) - gap > inner:
            break
        for line, (text, style) in zip(lines, column, strict=True):
            line.pad_right(sum(taken[:number]) - line.cell_len)
            line.append(text, style)
    return lines


def gpu_facts(gpu: dict[str, Any]) -> list[Fact]:
    """Its facts with their colours; what the card does not tell is a dash."""

    def told(key: str, pattern: str) -> str:
        return NOTHING if gpu[key] is None else pattern.format(gpu[key])

    judged = "" if gpu["normal"] is None else " normal" if gpu["normal"] else f" hot (limit {gpu['temperature_limit']})"
    return [
        (f"GPU {gpu['index']}", SOFT),
        (told("memory_gib", "{:4.1f}" + told("memory_total_gib", " of {:.1f}") + " GiB"), ""),
        (told("utilisation", "{:3} %"), ""),
        (told("temperature", "{} °C") + judged, BAD if judged.startswith(" hot") else ""),
        (told("power_w", "{:3.0f} W"), ""),
        (NOTHING if gpu["energy_wh"] is None else energy(gpu["energy_wh"]), ""),
        (plain(gpu["name"]), SOFT),
    ]


def facts(history: History) -> list[Fact]:
    """What is told by figures alone."""
    status, last, share = history.status, history.last or {}, history.supervised_share
    steps, epoch = history.steps, status.get("steps_per_epoch")
    passed, left = history.seconds, history.left
    now, peak = status.get("memory_gib"), history.metrics[-1]["memory_gib"] if history.metrics else None
    usual = f", {brief(status['usual'])} a step" if status.get("usual") else ""
    whose = "" if status.get("gpu") else " (process)"
    return [
        ("epoch", f"{history.step / epoch:.2f} of {round(steps / epoch, 2):g}" if epoch and steps else NOTHING),
        ("elapsed", duration(passed) if passed is not None else NOTHING),
        ("left", duration(left) if left is not None else NOTHING),
        ("gradient norm", f"{last['grad_norm']:.3g}" if last else NOTHING),
        ("speed", f"{history.speed:,.0f} tokens/s{usual}" if history.speed else NOTHING),
        ("supervised", f"{100 * share:.1f} % of the tokens" if share is not None else NOTHING),
        ("memory", f"{now:.1f} GiB, {max(now, peak or 0):.1f} at most{whose}" if now is not None else NOTHING),
    ]


def columns(facts: Sequence[Fact], inner: int) -> list[Text]:
    """The facts in as many columns as there is room for, read downwards."""
    count = max(1, (inner + 4) // COLUMN)
    rows, wide = -(-len(facts) // count), inner // count
    lines = []
    for row in range(rows):
        line = Text()
        for number, fact in enumerate(facts[row::rows]):
            line.pad_right(number * wide - line.cell_len)
            line.append_text(cropped(fact_line(fact), wide - 2 * (count > 1)))
        lines.append(line)
    return lines


def samples(history: History, inner: int) -> list[Text]:
    """The newest step's replies, a line each; of more than fit, others every few seconds while the run runs."""
    if not history.samples:
        return []
    step = history.samples[-1]["step"]
    newest = [sample for sample in history.samples if sample["step"] == step]
    turn = int(history.now / TURN) if history.state == "running" else 0
    first = turn * SAMPLES % len(newest) if len(newest) > SAMPLES else 0
    shown = (newest + newest)[first : first + min(SAMPLES, len(newest))]
    prompts = [cropped(Text(plain(said(sample["prompt"])), SOFT), (inner - LABEL) * 2 // 5) for sample in shown]
    wide = max(prompt.cell_len for prompt in prompts)
    lines = []
    which = f"{first + 1}–{first + SAMPLES} of {len(newest)}" if first + SAMPLES <= len(newest) else f"of {len(newest)}"
    names = ("samples", f"at step {step:,}", which if len(newest) > SAMPLES else "")
    for name, sample, prompt in zip(names, shown, prompts, strict=False):
        prompt.pad_right(wide - prompt.cell_len)
        reply = plain(sample["reply"]) or "(nothing)"
        line = fact_line((name, "")).append_text(prompt).append(" → ", SOFT)
        lines.append(line.append(reply if sample["stopped"] else f"{reply} …"))
    return lines


def curve(values: Sequence[float], width: int, height: int, log: bool = False) -> tuple[float, float, list[str]]:
    """The values smoothed, as a line of braille dots `width` by `height` cells; (lowest, highest, the rows)."""
    if log:
        low, high, rows = curve([math.log(value) for value in values], width, height)
        return math.exp(low), math.exp(high), rows
    across, up = 2 * width, 4 * height
    count = min(len(values), across)
    edges = [len(values) * i // count for i in range(count + 1)]
    means = [(float(i), sum(values[a:b]) / (b - a)) for i, (a, b) in enumerate(zip(edges, edges[1:], strict=False))]
    heights = [value for _, value in smoothed(means)]
    low, high = min(heights), max(heights)
    cells = [[0] * width for _ in range(height)]
    before = None
    for x in range(across):
        place = x * (count - 1) / (across - 1)
        left = int(place)
        value = heights[left] + (place - left) * (heights[min(left + 1, count - 1)] - heights[left])
        y = round((high - value) / (high - low) * (up - 1)) if high > low else up - 1
        drop = range(min(y, before + 1), max(y, before - 1) + 1) if before is not None else (y,)
        for dot in drop:
            cells[dot // 4][x // 2] |= DOTS[x % 2][dot % 4]
        before = y
    return low, high, ["".join(chr(BLANK + dots) if dots else " " for dots in row) for row in cells]


def fact_line(fact: Fact) -> Text:
    """A fact behind its name."""
    name, value = fact
    return Text.assemble((f"{name:<{LABEL}}", SOFT), value)


def energy(wh: float) -> str:
    """12.3 Wh, 312 Wh, 1.3 kWh."""
    return f"{wh / 1000:,.1f} kWh" if wh >= 1000 else f"{wh:.0f} Wh" if wh >= 100 else f"{wh:.1f} Wh"


def brief(seconds: float) -> str:
    """A step's time: 0.14 s, 4.1 s, 2 min 05 s."""
    return duration(seconds) if seconds >= 60 else f"{seconds:.1f} s" if seconds >= 1 else f"{seconds:.2g} s"


def cropped(text: Text, width: int) -> Text:
    """The text in `width` cells at most; a character of two cells is never halved."""
    if text.cell_len <= width:
        return text
    text.truncate(width - 1, overflow="crop")
    text.rstrip()  # of the blank in place of half a character
    return text.append("…")


def plain(text: str) -> str:
    """Text of data on one line, with nothing in it that steers a terminal or that it could not be sent."""
    return " ".join(visible(text.encode("utf-8", "replace").decode("utf-8")).split())


def wrapped(text: str, width: int) -> list[str]:
    """Lines of `width` cells at most, broken between words where that goes."""
    lines = [""]
    for word in text.split():
        for part in chop_cells(word, width):
            if lines[-1] and cell_len(lines[-1]) + 1 + cell_len(part) > width:
                lines.append("")
            lines[-1] += f" {part}" if lines[-1] else part
    return lines

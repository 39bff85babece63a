"""Figures in words, as every screen and page writes them."""

from __future__ import annotations

import re
import shlex


def duration(seconds: float) -> str:
    """12 s, 4 min 10 s, 2 h 05 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def step_line(
    place: tuple[int, int, int], loss: float, lr: float, grad_norm: float, tokens_per_second: float, left: float | None
) -> str:
    """The plain line of a step: consecutive ones stack as columns. place: step, of steps, steps of an epoch."""
    return (
        f"{_place('step', *place)}  loss {loss:7.4f}  lr {lr:.1e}  grad {grad_norm:8.3g}"
        f"  {tokens_per_second:>9,.0f} tok/s  left {'–' if left is None else duration(left)}"
    )


def eval_line(place: tuple[int, int, int], loss: float, remark: str) -> str:
    """The plain line of an evaluation."""
    return f"{_place('eval', *place)}  loss {loss:7.4f}  {remark}".rstrip()


def _place(kind: str, step: int, steps: int, epoch: int) -> str:
    last = f"{steps / epoch:.2f}"
    return f"{kind}  {step:>{len(str(steps))}}/{steps}  epoch {step / epoch:{len(last)}.2f}"


def broken(line: str, width: int) -> str:
    """The line broken between words where it is wider than a terminal; what follows a little to the right."""
    if len(line) * 2 <= width:  # no character takes more than two cells
        return line
    from rich.cells import cell_len

    rows = [""]
    for word in re.findall(r"\s*\S+", line):
        if rows[-1] and cell_len(rows[-1] + word) > width:
            rows.append("  " + word.lstrip())
        else:
            rows[-1] += word
    return "\n".join(rows)


def quoted(path: object) -> str:
    """A path as a POSIX shell takes it; letters beyond ASCII need no quotes."""
    text = str(path)
    return text if re.fullmatch(r"[\w@%+=:,./-]+", text) else shlex.quote(text)


def size(count: int) -> str:
    """Bytes in words: 35.2 KiB, 12.3 MiB, 1.4 GiB."""
    if count < 2**20:
        return f"{count / 2**10:.1f} KiB"
    return f"{count / 2**30:,.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"

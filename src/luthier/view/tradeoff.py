"""Two figures against each other as inline SVG: labelled points, joined in the order given or with their bounds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from luthier.html import Html, tag
from luthier.view.charts import BOTTOM, LEFT, RIGHT, TALL, TOP, WIDE, Point, shown

LETTER, LINE = 7.4, 12.0  # of the picture's units: a letter's width and a line's height where the letters are largest
DOT = 4.0
ROWS = 14  # lines up and down that a label may be moved away from its point
Box = tuple[float, float, float, float]  # left, top, right, bottom


@dataclass(frozen=True)
class Mark:
    """A point with its name. across, up: its bounds, None where it has none. plain: one that is not to stand out."""

    name: str
    at: Point
    across: tuple[float, float] | None = None
    up: tuple[float, float] | None = None
    plain: bool = False


def tradeoff(points: Sequence[Point], labels: Sequence[str], *, x: str, y: str) -> Html:
    """A figure of the points (x, y) that are finite, joined, each with its label. It needs `charts.STYLE`."""
    return _figure([Mark(label, at) for at, label in zip(points, labels, strict=True)], x, y, joined=True)


def scatter(marks: Sequence[Mark], *, x: str, y: str, log: bool = False) -> Html:
    """A figure of the points that are finite, each with its label and a line over its bounds.

    log: x is logarithmic; what is 0 or below there is left out. It needs `charts.STYLE`.
    """
    return _figure([mark for mark in marks if mark.at[0] > 0 or not log], x, y, log=log)


def _figure(marks: Sequence[Mark], x: str, y: str, *, log: bool = False, joined: bool = False) -> Html:
    marks = [mark for mark in marks if all(map(math.isfinite, mark.at))]
    said = tag("span", tag("b", y), f" against {x}{', log scale' if log else ''}")
    if not marks:
        return tag("figure", tag("figcaption", said), tag("p", "no values", class_="soft"), class_="chart")
    corners = [corner for mark in marks for corner in _corners(mark)]
    across = _decades([a for a, _ in corners]) if log else _even([a for a, _ in corners], LEFT, RIGHT)
    up = _even([b for _, b in corners], BOTTOM, TOP)
    places = [(across.place(mark.at[0]), up.place(mark.at[1])) for mark in marks]
    bars = [bar for mark, at in zip(marks, places, strict=True) for bar in _bars(mark, at, across, up)]
    drawn = _grid(across, up)
    if joined:
        drawn.append(tag("path", class_="line between c0", d="M" + "L".join(f"{a:.1f} {b:.1f}" for a, b in places)))
    drawn += [tag("path", class_="line raw c0", d=f"M{a:.1f} {b:.1f}L{c:.1f} {d:.1f}") for a, b, c, d in bars]
    drawn += [*map(_dot, marks, places), *_named(places, [mark.name for mark in marks], bars)]
    about = {"viewBox": f"0 0 {WIDE:g} {TALL:g}", "role": "img", "aria-label": f"{y} against {x}"}
    return tag("figure", tag("figcaption", said), tag("svg", *drawn, **about), class_="chart")


def _dot(mark: Mark, place: Point) -> Html:
    title = tag("title", f"{mark.name}: {shown(mark.at[0])}, {shown(mark.at[1])}")
    where = {"r": f"{DOT:g}", "cx": f"{place[0]:.1f}", "cy": f"{place[1]:.1f}"}
    return tag("circle", title, class_="plain" if mark.plain else "f0", **where)


# -- bounds and axes -------------------------------------------------------------------------------------------------


class _Axis(NamedTuple):
    """Ticks with what they are called, and the two ends of the axis with where they lie."""

    ticks: list[tuple[float, str]]
    start: float
    stop: float
    log: bool = False

    def place(self, value: float) -> float:
        low, high = self.ticks[0][0], self.ticks[-1][0]
        if self.log:
            low, high, value = map(math.log10, (low, high, max(value, low)))
        return self.start + (value - low) / (high - low) * (self.stop - self.start)


def _even(values: Sequence[float], start: float, stop: float) -> _Axis:
    """About five steps of 1, 2 or 5 times a power of ten; 0 is among them."""
    low, high = min(0.0, *values), max(0.0, *values)
    power = 10.0 ** math.floor(math.log10((high - low or 1.0) / 5))
    step = next(digit * power for digit in (1, 2, 5, 10) if digit * power >= (high - low) / 5 * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return _Axis([(n * step, _short(n * step)) for n in range(first, max(last, first + 1) + 1)], start, stop)


def _decades(values: Sequence[float]) -> _Axis:
    """Powers of ten around the values; where these are no more than three, 2 and 5 times them as well."""
    low, high = math.floor(math.log10(min(values))), math.floor(math.log10(max(values))) + 1
    ticks = [10.0**n for n in range(low, high + 1)]
    if len(ticks) <= 3:
        every = [digit * tick for tick in ticks for digit in (1, 2, 5)]
        first = max(i for i, tick in enumerate(every) if tick <= min(values))
        last = min(i for i, tick in enumerate(every) if tick > max(values))
        ticks = every[first : last + 1]
    return _Axis([(tick, _short(tick)) for tick in ticks], LEFT, RIGHT, log=True)


def _short(tick: float) -> str:
    """0.5, 2,000, 20 k, 3 M, 1 G"""
    units = ((1e9, 1e9, " G"), (1e6, 1e6, " M"), (1e4, 1e3, " k"))
    unit, name = next(((unit, name) for least, unit, name in units if abs(tick) >= least), (1, ""))
    return f"{shown(tick / unit)}{name}"


def _grid(across: _Axis, up: _Axis) -> list[Html]:
    rules = "".join(f"M{LEFT:g} {up.place(tick):.1f}H{RIGHT:g}" for tick, _ in up.ticks)
    rules += "".join(f"M{across.place(tick):.1f} {BOTTOM:g}v4" for tick, _ in across.ticks)
    beside = [tag("text", name, class_="y", x=f"{LEFT - 6:g}", y=f"{up.place(t) + 3.5:.1f}") for t, name in up.ticks]
    below = [
        tag("text", name, class_="x", x=f"{across.place(t):.1f}", y=f"{BOTTOM + 17:g}") for t, name in across.ticks
    ]
    return [tag("path", class_="grid", d=rules), *beside, *below]


def _corners(mark: Mark) -> list[Point]:
    (a, b), across, up = mark.at, mark.across or (), mark.up or ()
    return [(a, b), *((end, b) for end in across), *((a, end) for end in up)]


def _bars(mark: Mark, place: Point, across: _Axis, up: _Axis) -> list[Box]:
    """The lines over a mark's bounds, each as the box that it fills."""
    bars = []
    if mark.across:
        left, right = map(across.place, mark.across)
        bars.append((left, place[1], right, place[1]))
    if mark.up:
        low, high = map(up.place, mark.up)
        bars.append((place[0], high, place[0], low))
    return bars


# -- labels ----------------------------------------------------------------------------------------------------------


def _named(places: Sequence[Point], labels: Sequence[str], bars: Sequence[Box]) -> list[Html]:
    """Labels near their points, where they hide no point, no other label and few lines over bounds.

    One that stands away from its point is joined to it by a thin line.
    """
    hard: list[Box] = [(a - DOT, b - DOT, a + DOT, b + DOT) for a, b in places]
    parts = []
    for (a, b), label in zip(places, labels, strict=True):
        spots = list(_spots(a, b, LETTER * len(label)))
        cost = [
            i / 8 + _hits(box, bars) + 10 * _hits(box, hard) + 20 * _outside(box) for i, (*_, box) in enumerate(spots)
        ]
        x, y, side, box = spots[cost.index(min(cost))]
        hard.append(box)
        if abs(y - 3.5 - b) > 1.5 * LINE:
            parts.append(tag("path", class_="grid", d=f"M{a:.1f} {b:.1f}L{x:.1f} {y - 3.5:.1f}"))
        parts.append(tag("text", label, x=f"{x:.1f}", y=f"{y:.1f}", **({"class_": side} if side else {})))
    return parts


def _spots(a: float, b: float, width: float) -> list[tuple[float, float, str, Box]]:
    """Where a label may stand, the best first: its foot, the class that aligns it there, and the box that it fills."""
    sides = {"x": (a - width / 2, a + width / 2), "": (a + 7, a + 7 + width), "y": (a - 7 - width, a - 7)}
    feet = {"x": a, "": a + 7, "y": a - 7}
    near = [("x", -8.0), ("", -5.0), ("y", -5.0), ("x", 16.0), ("", 12.0), ("y", 12.0), ("", 3.5), ("y", 3.5)]
    far = [(side, 3.5 + sign * LINE * row) for row in range(2, ROWS) for sign in (-1, 1) for side in ("", "y")]
    return [
        (feet[side], b + down, side, (sides[side][0], b + down - LINE + 3, sides[side][1], b + down + 3))
        for side, down in near + far
    ]


def _hits(box: Box, others: Sequence[Box]) -> int:
    return sum(box[0] < c and a < box[2] and box[1] < d and b < box[3] for a, b, c, d in others)


def _outside(box: Box) -> bool:
    return box[0] < LEFT + 2 or box[2] > RIGHT + 14 or box[1] < TOP - 8 or box[3] > BOTTOM

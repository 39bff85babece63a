"""Line charts as inline SVG, in the page's own font and colours: no library, no script, a few kilobytes each.

A page (or a notebook's cell) that shows one needs `STYLE` once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

from luthier.html import Html, tag

Point = tuple[float, float]

WIDE, TALL = 440.0, 200.0  # of the viewBox, whose units are about pixels where two charts stand side by side
LEFT, RIGHT, TOP, BOTTOM = 44.0, 424.0, 10.0, 178.0  # of the lines' own field in it
ROW = 464.0  # by so much is a chart wider that takes the room of two
DECADE = 10  # times the least value: what spreads less is drawn on a linear scale
MOST = 400  # points drawn of a series, however long the run
STRIPS = 200  # places that say their values when pointed at, beside those with a dot
SMOOTHED_FROM = 20  # points; fewer are not smoothed
STEEP = 20  # times the least value: a greatest above it asks for a log scale
TINY = 1e-300  # nothing on a logarithmic axis
COLOURS = 4
MARKERS = ("M-3 0a3 3 0 1 0 6 0a3 3 0 1 0-6 0", "M-3-3h6v6h-6z", "M0-4L4 0L0 4L-4 0z", "M0-4L4 3H-4z")
"""A series is told from the next by colour, by its dashes and by these: not every reader sees every colour."""

STYLE = """
.chart { --c0: #0b6bb0; --c1: #c4500c; --c2: #1b7d50; --c3: #8546b0; margin: 0; container-type: inline-size;
  break-inside: avoid }
@media (prefers-color-scheme: dark) { .chart { --c0: #62b1f3; --c1: #f39a57; --c2: #63c792; --c3: #c89ced } }
[data-jp-theme-light="false"] .chart { --c0: #62b1f3; --c1: #f39a57; --c2: #63c792; --c3: #c89ced }
.chart figcaption { display: flex; flex-wrap: wrap; justify-content: space-between; gap: 0 1rem; font-size: .85rem;
  padding: 0 3.5% 0 10%; color: var(--soft, currentColor) }
.chart.wide figcaption { padding: 0 1.7% 0 4.9% }
.chart figcaption b { color: var(--ink, currentColor) }
.chart svg { display: block; width: 100%; height: auto; overflow: visible }
.chart .key { white-space: nowrap } .chart .key:not(:last-child) { margin-right: .9rem }
.chart .key svg { display: inline-block; width: 2rem; height: .7rem; margin-right: .3rem; vertical-align: -.05rem }
.chart text { fill: var(--soft, currentColor); font-size: 10px; font-variant-numeric: tabular-nums }
@container (max-width: 24rem) { .chart text { font-size: 13px } }
.chart .y { text-anchor: end } .chart .x { text-anchor: middle }
.chart .grid { fill: none; stroke: var(--line, #8884); stroke-width: 1 }
.chart .line { fill: none; stroke-width: 2; stroke-linejoin: round; stroke-linecap: round }
.chart .raw { stroke-width: 1; opacity: .4 } .chart .between { stroke-width: 1.25 }
.chart .strip { fill: currentColor; opacity: 0 } .chart .strip:hover { opacity: .1 }
.chart .c0 { stroke: var(--c0) } .chart .c1 { stroke: var(--c1) } .chart .c2 { stroke: var(--c2) }
.chart .c3 { stroke: var(--c3) }
.chart .d1 { stroke-dasharray: 6 4 } .chart .d2 { stroke-dasharray: 1 4 } .chart .d3 { stroke-dasharray: 8 4 1 4 }
.chart .f0 { fill: var(--c0) } .chart .f1 { fill: var(--c1) } .chart .f2 { fill: var(--c2) }
.chart .f3 { fill: var(--c3) }
"""


@dataclass(frozen=True)
class Series:
    """A named line: (x, y) points, x rising.

    style: line; smoothed (the points thin, their moving mean thick over them); dots, for the few and far between.
    """

    name: str
    points: Sequence[Point]
    style: Literal["line", "smoothed", "dots"] = "line"


def line_chart(
    series: Sequence[Series], *, x: str, y: str, log: bool = False, zero: bool = False, wide: bool = False
) -> Html:
    """A figure as wide as the room it is given. x, y: the axes' names. zero: y begins at 0. wide: in the room of two.

    log: y is logarithmic, if its values spread over a decade at least. Points that are not finite are left out, on a
    logarithmic axis those of 0 and below as well.
    """
    log = log and spread_over([value for one in series for _, value in one.points], DECADE)
    sound = [replace(one, points=[p for p in one.points if _sound(p, log)]) for one in series]
    drawn = [one for one in sound if one.points]
    keys = [tag("span", _key(one, number), one.name, class_="key") for number, one in enumerate(drawn)]
    title = tag("span", tag("b", y), f" by {x}{', log scale' if log else ''}")
    caption = tag("figcaption", title, tag("span", *(keys if len(keys) > 1 else [])))
    kind = "chart wide" if wide else "chart"
    if not drawn:
        return tag("figure", caption, tag("p", "no values", class_="soft"), class_=kind)
    more = ROW if wide else 0.0
    across = _whole_axis([p[0] for one in drawn for p in one.points], LEFT, RIGHT + more, most=12 if wide else 6)
    values = [p[1] for one in drawn for p in one.points]
    values += [0.0] if zero and any(values) else [0.0, 1.0] if zero else []
    up = _log_axis(values, BOTTOM, TOP) if log else _widened(_axis(values, BOTTOM, TOP, most=5))
    lines = [part for number, one in enumerate(drawn) for part in _drawn(one, number, across, up)]
    about = {"viewBox": f"0 0 {WIDE + more:g} {TALL:g}", "role": "img", "aria-label": f"{y} by {x}"}
    picture = tag("svg", *_grid(across, up), *lines, *_strips(drawn, across), **about)
    return tag("figure", caption, picture, class_=kind)


def sparkline(values: Sequence[float]) -> Html:
    """A curve as small as a word, for a table: 90 by 20 pixels, in the text's colour. It needs no style."""
    points = [(float(i), value) for i, value in enumerate(values) if math.isfinite(value)]
    if not points:
        return Html("")
    across = _axis([p[0] for p in points], 2, 86)
    up = _axis([p[1] for p in points], 18, 2)
    places = [(across.place(a), up.place(b)) for a, b in thinned(points, 90)]
    line = tag("path", d=_path(places), fill="none", stroke="currentColor", **{"stroke-linejoin": "round"})
    end = tag("circle", cx=f"{places[-1][0]:.1f}", cy=f"{places[-1][1]:.1f}", r="2", fill="currentColor")
    title = tag("title", f"{shown(points[0][1])} → {shown(points[-1][1])}")
    return tag("svg", title, line, end, viewBox="0 0 90 20", width="90", height="20", class_="spark", role="img")


# -- points ----------------------------------------------------------------------------------------------------------


def steep(values: Sequence[float]) -> bool:
    """Do they ask for a log scale? On a linear one the end of such a curve is a flat line."""
    return bool(values) and max(values) > STEEP * min(values) > 0


def spread_over(values: Sequence[float], times: float) -> bool:
    """Is the greatest value so many times the least above 0, at least?"""
    above = [value for value in values if TINY < value < math.inf]
    return bool(above) and max(above) >= times * min(above)


def smoothed(points: Sequence[Point], log: bool = False) -> list[Point]:
    """The moving mean over about a twentieth of all points (log: the geometric one, of values above 0).

    Around each point as many before as after it: nothing lags. At the end there are fewer after it, and the first
    stands alone, so that a steep beginning is not flattened.
    """
    sums = [0.0]
    for _, value in points:
        sums.append(sums[-1] + (math.log(value) if log else value))
    half, means = max(1, len(points) // 40), []
    for i, (place, _) in enumerate(points):
        reach = min(half, i)
        start, stop = i - reach, min(i + reach + 1, len(points))
        mean = (sums[stop] - sums[start]) / (stop - start)
        means.append((place, math.exp(mean) if log else mean))
    return means


def thinned(points: Sequence[Point], most: int = MOST) -> list[Point]:
    """At most so many of the points, in order: the first, the last, and each stretch's lowest and highest."""
    if len(points) <= most:
        return list(points)
    stretches, inner = (most - 2) // 2, len(points) - 2
    kept = {0, len(points) - 1}
    for i in range(stretches):
        stretch = range(1 + i * inner // stretches, 1 + (i + 1) * inner // stretches)
        kept |= {min(stretch, key=lambda n: points[n][1]), max(stretch, key=lambda n: points[n][1])}
    return [points[n] for n in sorted(kept)]


def _sound(point: Point, log: bool) -> bool:
    return all(map(math.isfinite, point)) and (point[1] > TINY or not log)


# -- axes ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Axis:
    """Values from low to high lie between `start` and `stop`, in the picture's units. step: from tick to tick."""

    low: float
    high: float
    start: float
    stop: float
    ticks: list[float]
    step: float | None

    def place(self, value: float) -> float:
        """step is None on a logarithmic axis."""
        low, high, value = (self.low, self.high, value) if self.step else map(math.log10, (self.low, self.high, value))
        return self.start + (value - low) / (high - low) * (self.stop - self.start)

    def said(self, tick: float) -> str:
        largest = max(map(abs, self.ticks)) if self.step else tick
        return _label(tick, self.step or tick, largest)


def _whole_axis(values: Sequence[float], start: float, stop: float, most: int) -> _Axis:
    """A linear axis of whole numbers, as steps are, that begins at a tick: at 0 where its first value is near."""
    low, high = min(values), max(values)
    step = max(1.0, _nice((high - low or 1.0) / most))
    first = math.floor(low / step + 1e-6)
    high = max(high, (first + 1) * step)
    return _Axis(
        first * step, high, start, stop, [n * step for n in range(first, math.floor(high / step + 1e-6) + 1)], step
    )


def _axis(values: Sequence[float], start: float, stop: float, most: int = 6) -> _Axis:
    """A linear axis from the least to the greatest, with at most about so many ticks; a single value has room about."""
    low, high = min(values), max(values)
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        room = abs(low) / 2 or 1.0
        low, high = low - room, high + room
    step = _nice((high - low) / most)
    first, last = math.ceil(low / step - 1e-6), math.floor(high / step + 1e-6)
    return _Axis(low, high, start, stop, [n * step for n in range(first, last + 1)], step)


def _widened(axis: _Axis) -> _Axis:
    """The axis out to the ticks around its values."""
    assert axis.step is not None
    first, last = math.floor(axis.low / axis.step + 1e-6), math.ceil(axis.high / axis.step - 1e-6)
    ticks = [n * axis.step for n in range(first, last + 1)]
    return replace(axis, low=ticks[0], high=ticks[-1], ticks=ticks)


def _log_axis(values: Sequence[float], start: float, stop: float) -> _Axis:
    """Ticks at 1, 2 and 5 of every decade up to two; at whole decades where there are more."""
    decades = range(math.floor(math.log10(min(values))), math.ceil(math.log10(max(values))) + 1)
    if len(decades) > 3:
        ticks = [10.0**n for n in decades[:: math.ceil(len(decades) / 6)]]
        ticks += [] if ticks[-1] >= max(values) else [10.0 ** decades[-1]]
    else:
        every = [digit * 10.0**n for n in [decades[0] - 1, *decades] for digit in (1, 2, 5)]
        low = max(tick for tick in every if tick <= min(values) * (1 + 1e-9))
        high = min(tick for tick in every if tick >= max(values) * (1 - 1e-9) and tick > low)
        ticks = [tick for tick in every if low <= tick <= high]
    return _Axis(ticks[0], ticks[-1], start, stop, ticks, None)


def _nice(step: float) -> float:
    """The next 1, 2 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(digit * power for digit in (1, 2, 5, 10) if digit * power >= step * (1 - 1e-9))


def _label(tick: float, step: float, largest: float) -> str:
    """As short as the room beside an axis is: 0.02, 1,500, 20 k, 3 M, 2e-5."""
    if abs(tick) < step / 2:
        return "0"
    if not 1e-3 <= largest < 1e9:
        digits = max(0, _magnitude(tick) - _magnitude(step))
        mantissa, exponent = f"{tick:.{digits}e}".split("e")
        return f"{mantissa}e{int(exponent)}"
    unit, name = next(((unit, name) for unit, name in ((1e6, " M"), (1e3, " k")) if largest >= 10 * unit), (1, ""))
    return f"{tick / unit:,.{max(0, -_magnitude(step / unit))}f}{name}"


def _magnitude(value: float) -> int:
    return math.floor(math.log10(abs(value)) + 1e-9)


def shown(value: float) -> str:
    """A value to four figures, for pointing at."""
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e9 else f"{value:.4g}"


# -- what is drawn ---------------------------------------------------------------------------------------------------


def _grid(across: _Axis, up: _Axis) -> list[Html]:
    rules = "".join(f"M{across.start:g} {up.place(tick):.1f}H{across.stop:g}" for tick in up.ticks)
    rules += "".join(f"M{across.place(tick):.1f} {BOTTOM:g}v4" for tick in across.ticks)
    named = [tag("text", up.said(t), class_="y", x=f"{LEFT - 6:g}", y=f"{up.place(t) + 3.5:.1f}") for t in up.ticks]
    named += [
        tag("text", across.said(t), class_="x", x=f"{across.place(t):.1f}", y=f"{BOTTOM + 17:g}") for t in across.ticks
    ]
    return [tag("path", class_="grid", d=rules), *named]


def _drawn(series: Series, number: int, across: _Axis, up: _Axis) -> list[Html]:
    def places(points: Sequence[Point]) -> list[Point]:
        return [(across.place(a), up.place(b)) for a, b in thinned(points)]

    at, colour = places(series.points), f"c{number % COLOURS} d{number % len(MARKERS)}"
    if len(at) == 1 or series.style == "dots":
        joined = [tag("path", class_=f"line between {colour}", d=_path(at))] if len(at) > 1 else []
        return [*joined, *(_marker(place, number) for place in at)]
    if series.style == "line" or len(series.points) < SMOOTHED_FROM:
        return [tag("path", class_=f"line {colour}", d=_path(at))]
    mean = places(smoothed(series.points, log=up.step is None))
    return [
        tag("path", class_=f"line raw c{number % COLOURS}", d=_path(at)),
        tag("path", class_=f"line {colour}", d=_path(mean)),
    ]


def _path(places: Sequence[Point]) -> str:
    return "M" + "L".join(f"{a:.1f} {b:.1f}" for a, b in places)


def _marker(place: Point, number: int) -> Html:
    shape, where = MARKERS[number % len(MARKERS)], f"translate({place[0]:.1f} {place[1]:.1f})"
    return tag("path", class_=f"f{number % COLOURS}", d=shape, transform=where)


def _key(series: Series, number: int) -> Html:
    """The line as the legend shows it."""
    parts = [tag("path", class_=f"line c{number % COLOURS} d{number % len(MARKERS)}", d="M1 5H31")]
    if series.style == "dots":
        parts.append(_marker((16, 5), number))
    return tag("svg", *parts, viewBox="0 0 32 10")


def _strips(series: Sequence[Series], across: _Axis) -> list[Html]:
    """Upright strips that nobody sees; one that is pointed at says every series' value there."""
    known = [dict(one.points) for one in series]
    dots, lines = set[float](), set[float]()
    for one in series:
        (dots if one.style == "dots" else lines).update(place for place, _ in thinned(one.points, STRIPS))
    chosen = sorted(dots | set(sorted(lines)[:: math.ceil(len(lines) / STRIPS) or 1]))
    edges = [across.start, *((across.place(a) + across.place(b)) / 2 for a, b in pairwise(chosen)), across.stop]
    parts = []
    for place, (start, stop) in zip(chosen, pairwise(edges), strict=True):
        said = [f"{one.name} {shown(at[place])}" for one, at in zip(series, known, strict=True) if place in at]
        rect = {"x": f"{start:.1f}", "y": f"{TOP:g}", "width": f"{stop - start:.1f}", "height": f"{BOTTOM - TOP:g}"}
        parts.append(tag("rect", tag("title", "\n".join([shown(place), *said])), class_="strip", **rect))
    return parts

"""Two figures against each other as inline SVG: one labelled point a model, joined in the order given."""

from __future__ import annotations

import math
from collections.abc import Sequence

from luthier.html import Html, tag
from luthier.view.charts import BOTTOM, LEFT, RIGHT, TOP, Point, frame, shown

APART, WIDTH = 7.0, 12.0  # of the picture's units: a label is not nearer to a point or label, upright and across


def tradeoff(points: Sequence[Point], labels: Sequence[str], *, x: str, y: str) -> Html:
    """A figure of the points (x, y) that are finite, each with its label beside it. It needs `charts.STYLE`."""
    sound = [(at, label) for at, label in zip(points, labels, strict=True) if all(map(math.isfinite, at))]
    caption = tag("figcaption", tag("span", tag("b", y), f" against {x}"))
    if not sound:
        return tag("figure", caption, tag("p", "no values", class_="soft"), class_="chart")
    about, grid, place = frame([at for at, _ in sound], x=x, y=y)
    places = [place(at) for at, _ in sound]
    line = tag("path", class_="line between c0", d="M" + "L".join(f"{a:.1f} {b:.1f}" for a, b in places))
    dots = [
        tag(
            "circle",
            tag("title", f"{label}: {shown(at[0])}, {shown(at[1])}"),
            class_="f0",
            r="4",
            cx=f"{a:.1f}",
            cy=f"{b:.1f}",
        )
        for (at, label), (a, b) in zip(sound, places, strict=True)
    ]
    return tag(
        "figure",
        caption,
        tag("svg", *grid, line, *dots, *_named(places, [n for _, n in sound]), **about),
        class_="chart",
    )


def _named(places: Sequence[Point], names: Sequence[str]) -> list[Html]:
    """Labels above their points, or beside and below them where that is outside of the picture or taken."""
    taken: list[Point] = list(places)
    parts = []
    for (a, b), name in zip(places, names, strict=True):
        reach = 8 + 2.5 * len(name)
        spots = [(a, b - 8), (a + reach, b + 4), (a - reach, b + 4), (a, b + 16), (a + reach, b - 10), (a, b - 22)]
        spot = next((one for one in spots if _inside(one) and _free(one, taken)), spots[1])
        taken.append((spot[0], spot[1] - 4))
        parts.append(tag("text", name, class_="x", x=f"{spot[0]:.1f}", y=f"{spot[1]:.1f}"))
    return parts


def _inside(spot: Point) -> bool:
    return LEFT + 4 < spot[0] < RIGHT - 4 and TOP + 6 < spot[1] < BOTTOM


def _free(spot: Point, taken: Sequence[Point]) -> bool:
    """Is the middle of a label there away from every point and every other label?"""
    return all(abs(spot[0] - a) > WIDTH or abs(spot[1] - 4 - b) > APART or (a, b) == spot for a, b in taken)

"""Line charts: values where the axes say, ticks that people read, nothing that is no number, and never much of it."""

from __future__ import annotations

import math
import random
import re
import time

import pytest

from luthier.view.charts import STYLE, Series, line_chart, smoothed, sparkline, thinned
from test_html import Read

# The field of a chart in its viewBox: left, right, top, bottom.
FIELD = (44.0, 424.0, 10.0, 178.0)


def labels(chart: str) -> tuple[list[str], list[str]]:
    """The ticks' labels of x and of y."""
    return tuple(re.findall(rf'<text class="{axis}"[^>]*>([^<]*)', chart) for axis in "xy")  # type: ignore[return-value]


def places(chart: str, kind: str) -> list[tuple[float, float]]:
    """The corners of the one line of this class."""
    (found,) = re.findall(rf'<path class="{kind}" d="M([^"]*)"', chart)
    return [(float(a), float(b)) for a, b in (pair.split(" ") for pair in found.split("L"))]


def told(chart: str) -> list[str]:
    """What the strips say when pointed at."""
    return re.findall(r"<rect[^>]*><title>(.*?)</title>", chart, re.S)


def one(points: list[tuple[float, float]], **options: bool) -> str:
    return line_chart([Series("a", points)], x="step", y="loss", **options)


def test_a_point_lies_where_the_axes_say() -> None:
    chart = one([(0, 0.0), (50, 1.0), (100, 4.0)])
    left, right, top, bottom = FIELD
    assert labels(chart) == (["0", "20", "40", "60", "80", "100"], ["0", "1", "2", "3", "4"])
    assert places(chart, "line c0 d0") == [
        (left, bottom),
        ((left + right) / 2, bottom - (bottom - top) / 4),
        (right, top),
    ]
    assert told(chart) == ["0\na 0", "50\na 1", "100\na 4"]
    assert "<b>loss</b> by step</span>" in chart


def test_a_logarithmic_axis() -> None:
    chart = one([(0, 100.0), (1, 10.0), (2, 0.1), (3, 0.0), (4, -1.0)], log=True)
    left, right, top, bottom = FIELD
    third = (bottom - top) / 3
    assert labels(chart)[1] == ["0.1", "1", "10", "100"]
    assert places(chart, "line c0 d0") == [(left, top), ((left + right) / 2, top + third), (right, bottom)]
    assert "by step, log scale" in chart
    assert labels(one([(0, 0.3), (1, 4.0)], log=True))[1] == ["0.2", "0.5", "1", "2", "5"]
    assert labels(one([(0, 1e-38), (1, 1e38)], log=True))[1][0] == "1e-38"


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.0, 1.0], ["0", "0.2", "0.4", "0.6", "0.8", "1.0"]),
        ([1.9e-4, 0.0], ["0", "5e-5", "1.0e-4", "1.5e-4", "2.0e-4"]),
        ([5900.0, 6100.0], ["5,900", "5,950", "6,000", "6,050", "6,100"]),
        ([0.0, 48_000.0], ["0", "10 k", "20 k", "30 k", "40 k", "50 k"]),
        ([11e6, 13e6], ["11.0 M", "11.5 M", "12.0 M", "12.5 M", "13.0 M"]),
        ([2.0, 2.0], ["1.0", "1.5", "2.0", "2.5", "3.0"]),
        ([0.0, 0.0], ["-1.0", "-0.5", "0", "0.5", "1.0"]),
        ([-3.0, 3.0], ["-4", "-2", "0", "2", "4"]),
        ([0.0, 3e38], ["0", "1e38", "2e38", "3e38"]),
        ([0.0, 3e-38], ["0", "1e-38", "2e-38", "3e-38"]),
    ],
)
def test_ticks(values: list[float], expected: list[str]) -> None:
    assert labels(one(list(enumerate(values))))[1] == expected


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        ([0, 1], ["0", "1"]),
        ([1, 2], ["1", "2"]),
        ([1, 2, 3], ["1", "2", "3"]),
        ([1, 7], ["1", "2", "3", "4", "5", "6", "7"]),
        ([1, 120], ["0", "20", "40", "60", "80", "100", "120"]),
        ([30, 60, 120], ["20", "40", "60", "80", "100", "120"]),
        ([5], ["5", "6"]),
    ],
)
def test_steps_are_whole_numbers_and_the_first_place_has_a_label(steps: list[float], expected: list[str]) -> None:
    chart = one([(step, float(step)) for step in steps])
    assert labels(chart)[0] == expected
    assert re.findall(r'<text class="x" x="([^"]*)"', chart)[0] == "44.0"


def test_what_spreads_over_less_than_a_decade_has_a_linear_scale() -> None:
    chart = one([(0, 2.2), (1, 4.9)], log=True)
    assert labels(chart)[1] == ["2", "3", "4", "5"]
    assert "log scale" not in chart
    assert "log scale" in one([(0, 0.5), (1, 5.0)], log=True)


def test_a_wide_chart_takes_the_room_of_two() -> None:
    chart = line_chart([Series("a", [(0, 0.0), (60, 1.0), (120, 4.0)])], x="step", y="loss", wide=True)
    assert 'viewBox="0 0 904 200"' in chart and '<figure class="chart wide">' in chart
    assert places(chart, "line c0 d0") == [(44.0, 178.0), (466.0, 136.0), (888.0, 10.0)]
    assert labels(chart)[0] == [str(n) for n in range(0, 121, 10)]
    x, width = map(float, re.findall(r'<rect class="strip" x="([^"]*)"[^>]* width="([^"]*)"', chart)[-1])
    assert x + width == 888.0


def test_an_axis_from_zero() -> None:
    assert labels(one([(0, 18.4), (1, 19.2)], zero=True))[1] == ["0", "5", "10", "15", "20"]
    assert labels(one([(0, 0.0), (1, 0.0)], zero=True))[1][0] == "0"


def test_one_point_is_a_dot_and_no_number_is_left_out() -> None:
    chart = one([(0, math.nan), (1, 2.0), (2, math.inf)])
    assert told(chart) == ["1\na 2"]
    assert chart.count("translate(") == 1
    assert "nan" not in chart and "inf" not in chart
    empty = one([(0, math.nan)])
    assert "no values" in empty and "<svg" not in empty


def test_series_are_told_apart_without_colours() -> None:
    points = [(float(i), float(i)) for i in range(3)]
    chart = line_chart([Series(f"n{i}", points, "dots") for i in range(4)], x="step", y="loss")
    lines = re.findall(r'class="line between (c\d) (d\d)"', chart)
    assert lines == [("c0", "d0"), ("c1", "d1"), ("c2", "d2"), ("c3", "d3")]
    assert len(set(re.findall(r'<path class="f\d" d="([^"]*)"', chart))) == 4
    assert re.findall(r"</svg>(n\d)</span>", chart) == ["n0", "n1", "n2", "n3"]
    assert told(chart)[1] == "1\nn0 1\nn1 1\nn2 1\nn3 1"
    assert 'class="key"' not in one(points)


def test_a_smoothed_series_is_drawn_twice() -> None:
    chart = line_chart([Series("a", [(i, float(i % 2)) for i in range(40)], "smoothed")], x="x", y="y")
    raw, mean = places(chart, "line raw c0"), places(chart, "line c0 d0")
    assert len(raw) == len(mean) == 40
    assert {y for _, y in raw} == {FIELD[2], FIELD[3]}
    assert max(abs(y - (FIELD[2] + FIELD[3]) / 2) for _, y in mean[1:]) < 30
    few = line_chart([Series("a", [(i, float(i)) for i in range(5)], "smoothed")], x="x", y="y")
    assert "raw" not in few


def test_the_moving_mean() -> None:
    points = [(i, float(i)) for i in range(80)]  # two on either side
    assert smoothed(points)[:3] == [(0, 0.0), (1, 1.0), (2, 2.0)]
    assert smoothed(points)[40] == (40, 40.0)
    assert smoothed(points)[-1] == (79, 78.0)
    assert smoothed([(0, 1.0), (1, 4.0), (2, 16.0)], log=True)[1][1] == pytest.approx(4.0)


def test_few_points_stand_for_many_and_extremes_stay() -> None:
    draw = random.Random(0)
    points = [(i, draw.random()) for i in range(100_000)]
    points[61_234], points[777] = (61_234, 9.0), (777, -9.0)
    few = thinned(points)
    assert len(few) <= 400
    assert {points[0], points[777], points[61_234], points[-1]} <= set(few)
    assert few == sorted(few)
    assert thinned(points[:400]) == points[:400]


def test_a_long_run_is_a_small_chart() -> None:
    draw = random.Random(0)
    began = time.process_time()
    chart = line_chart([Series("a", [(i, draw.random()) for i in range(100_000)], "smoothed")], x="step", y="loss")
    assert len(chart) < 60_000
    assert 100 <= len(told(chart)) <= 200
    assert time.process_time() - began < 5
    lines = [Series(f"{n}", [(4 * i + n, 1.0) for i in range(1000)]) for n in range(4)]
    strips = told(
        line_chart([*lines, Series("eval", [(i + 0.5, 2.0) for i in range(0, 4000, 100)], "dots")], x="x", y="y")
    )
    assert len(strips) <= 240
    assert sum("eval 2" in strip for strip in strips) == 40


def test_names_are_text() -> None:
    chart = line_chart([Series(f"<b>{i}", [(0, 1.0), (1, 2.0)]) for i in range(2)], x="<i>", y="<script>")
    read = Read(f"<style>{STYLE}</style>{chart}")
    assert read.open == []
    assert not {"i", "script"} & set(read.elements)
    assert read.text.count("<b>0") == 3  # the legend and two strips


def test_a_sparkline() -> None:
    line = sparkline([4.0, 2.0, math.nan, 1.0])
    assert 'd="M2.0 2.0L30.0 12.7L86.0 18.0"' in line
    assert "<title>4 → 1</title>" in line
    assert sparkline([]) == sparkline([math.nan]) == ""
    assert sparkline([3.0]).count("<circle") == 1
    assert len(sparkline([float(i) for i in range(100_000)])) < 2_000

"""A run's history as charts: for its report, for a notebook."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

from luthier.history import History
from luthier.html import Html
from luthier.view.charts import Series, line_chart, shown, steep

OF_RUN: tuple[tuple[str, str, Literal["line", "smoothed"]], ...] = (
    ("lr", "learning rate", "line"),
    ("grad_norm", "gradient norm", "smoothed"),
    ("tokens_per_second", "tokens a second", "smoothed"),
    ("memory_gib", "peak memory, GiB", "line"),
)
OF_GPUS = {
    "memory_gib": "GPU memory, GiB",
    "temperature": "GPU temperature, °C",
    "utilisation": "GPU utilisation, %",
    "power_w": "GPU power, W",
}


FLAT = 0.02  # of the greatest value: a line that keeps within it says nothing as a chart


def curves(history: History) -> list[Html]:
    """A chart for everything that a run measures and that changes; a page that shows them needs `charts.STYLE`."""
    return [
        loss_chart(history),
        *(line_chart(series, x="step", y=name, **how) for name, series, how in _measured(history) if not _flat(series)),
    ]


def loss_chart(history: History, wide: bool = False) -> Html:
    """Training and eval loss. wide: for the room of two charts."""
    losses = [Series("training loss", history.losses, "smoothed"), Series("eval loss", history.eval_losses, "dots")]
    log = steep([value for one in losses for _, value in one.points])
    return line_chart(losses, x="step", y="loss", log=log, wide=wide)


def constants(history: History) -> Iterator[tuple[str, str]]:
    """What a run measures and what stayed as it was, as (name, greatest value): it has no chart."""
    for name, series, _ in _measured(history):
        if _flat(series):
            values = [shown(max(value for _, value in one.points)) for one in series]
            several = [f"{one.name} {value}" for one, value in zip(series, values, strict=True)]
            yield name, values[0] if len(set(values)) == 1 else ", ".join(several)


def _measured(history: History) -> Iterator[tuple[str, list[Series], dict[str, Any]]]:
    """(name, a line or one for each GPU, how it is drawn) of all but the losses."""
    for key, name, style in OF_RUN:
        if points := history.series(key):
            log = key == "grad_norm" and steep([value for _, value in points])
            yield name, [Series(name, points, style)], {"log": log, "zero": not log}
    for key, name in OF_GPUS.items():
        if series := _of_gpus(history, key):
            yield name, series, {"zero": key != "temperature"}


def _flat(series: Sequence[Series]) -> bool:
    return all(
        max(values) - min(values) <= FLAT * max(map(abs, values))
        for values in ([value for _, value in one.points] for one in series)
    )


def _of_gpus(history: History, key: str) -> list[Series]:
    """A series for each GPU that tells this."""
    found: dict[int, list[tuple[float, float]]] = {}
    for line in history.metrics:
        for gpu in line["gpu"] or []:
            if gpu[key] is not None:
                found.setdefault(gpu["index"], []).append((line["step"], gpu[key]))
    return [Series(f"GPU {index}", points, "smoothed") for index, points in sorted(found.items())]

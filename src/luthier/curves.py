"""A run's history as charts: for its report, for a notebook."""

from __future__ import annotations

from typing import Literal

from luthier.charts import Series, line_chart, steep
from luthier.history import History
from luthier.html import Html

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


def curves(history: History) -> list[Html]:
    """A chart for everything that a run measures; a page that shows them needs `charts.STYLE`."""
    losses = [Series("training loss", history.losses, "smoothed"), Series("held-out loss", history.eval_losses, "dots")]
    wide = steep([value for one in losses for _, value in one.points])
    pictures = [line_chart(losses, x="step", y="loss", log=wide)]
    for key, name, style in OF_RUN:
        if points := history.series(key):
            log = key == "grad_norm"
            pictures.append(line_chart([Series(name, points, style)], x="step", y=name, log=log, zero=not log))
    for key, name in OF_GPUS.items():
        if series := _of_gpus(history, key):
            pictures.append(line_chart(series, x="step", y=name, zero=key != "temperature"))
    return pictures


def _of_gpus(history: History, key: str) -> list[Series]:
    """A series for each GPU that tells this."""
    found: dict[int, list[tuple[float, float]]] = {}
    for line in history.metrics:
        for gpu in line["gpu"] or []:
            if gpu[key] is not None:
                found.setdefault(gpu["index"], []).append((line["step"], gpu[key]))
    return [Series(f"GPU {index}", points, "smoothed") for index, points in sorted(found.items())]

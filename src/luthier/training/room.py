"""Is there room on the disk for what a run will write? Asked before step 1, not found out after a night."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from torch import nn

from luthier.errors import RunError
from luthier.folder import RunFolder
from luthier.methods import whole
from luthier.sections import TrainSection
from luthier.words import size

MOMENTS = {"adamw": 8.0, "adamw_8bit": 2 + 8 / 256, "paged_adamw_8bit": 2 + 8 / 256, "lion_8bit": 1 + 4 / 256}
"""Bytes that an optimizer keeps for each number that trains: fp32, or 8 bits with an fp32 scale for each 256."""
SMALL = 4096
"""Numbers below which bitsandbytes keeps a tensor's moments in fp32."""
GENERATORS = 35_000
"""Bytes of a process's random generators: 5 kB of torch's, 30 kB of Python's and numpy's, which are JSON."""
ENTRIES, ENTRY = 5, 80
"""A tensor's name is written that often in a checkpoint's files, each time with so many bytes of shape and place."""


class Sizes(NamedTuple):
    """Bytes. result: of the adapter (or whole model) with what lies beside it; checkpoint: of one, its result too."""

    result: int
    checkpoint: int


def check_room(
    folder: RunFolder,
    model: nn.Module,
    parameters: dict[str, nn.Parameter],
    write: Callable[[Path], None],
    section: TrainSection,
    kind: str,
    steps: int,
    steps_per_epoch: int,
) -> str:
    """Compare what the run's checkpoints and its result will take at most at one time with what the disk has.

    A new checkpoint is complete before the oldest is removed: keep + 1 of them, or all, and the adapter or model.
    `parameters` are those that train, by name; `write`, `kind`, `steps` are the loop's. Gives back the two in words.
    Errors: RunError.
    """
    each = sizes(folder, model, parameters, write, kind, section.optimizer)
    period = steps_per_epoch if section.save_every == "epoch" else section.save_every
    saves = -(-steps // period)  # the last step is always one
    most = saves if section.keep == "all" else min(saves, section.keep + 1)
    there = bytes_in(folder.checkpoints)
    needed = max(most * each.checkpoint - there, each.checkpoint) + each.result
    free = shutil.disk_usage(folder.path).free
    if needed <= free:
        return f"about {size(needed)} of disk ({size(each.checkpoint)} a checkpoint), {size(free)} free"
    count = f"{most} checkpoints of {size(each.checkpoint)}" if most > 1 else f"a checkpoint of {size(each.checkpoint)}"
    kept = f" ({section.keep} kept and a new one)" if most != saves else ""
    result = f"{'a model' if whole(kind) else 'an adapter'} of {size(each.result)}"
    present = f", {size(there)} of which are there" if there else ""
    ways = ["lower train.keep"] if most > 1 and section.keep != 1 else []
    ways += ["raise train.save_every"] if most == saves > 1 else []
    raise RunError(
        f"{folder.path}: the disk has {size(free)} free, and the run needs up to "
        f"{size(most * each.checkpoint + each.result)}{present}: {count}{kept} and {result}; "
        f"{', '.join([*ways, 'free some space, or train in a folder on another disk'])}"
    )


def sizes(
    folder: RunFolder,
    model: nn.Module,
    parameters: dict[str, nn.Parameter],
    write: Callable[[Path], None],
    kind: str,
    optimizer: str = "adamw",
) -> Sizes:
    """Measured on an adapter, which is written once and removed (so it is also known that it can be); a whole model is
    reckoned from its tensors, beside which its tokenizer is little."""
    trained = sum(value.nbytes for value in parameters.values())
    state = moments(parameters, optimizer) + GENERATORS + ENTRIES * sum(len(name) + ENTRY for name in parameters)
    if whole(kind):
        result = sum(value.nbytes for value in model.parameters())
        return Sizes(result, result + state)
    with tempfile.TemporaryDirectory(dir=folder.path, prefix=".adapter.") as trial:
        write(Path(trial))
        result = bytes_in(Path(trial))
    return Sizes(result, result + trained + state)  # state.safetensors has the weights as well, by the model's names


def moments(parameters: dict[str, nn.Parameter], optimizer: str) -> int:
    """Bytes that the optimizer will keep for these."""
    return int(
        sum(
            value.numel() * (MOMENTS["adamw"] if value.numel() < SMALL else MOMENTS[optimizer])
            for value in parameters.values()
        )
    )


def bytes_in(folder: Path) -> int:
    """Of all files below a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())

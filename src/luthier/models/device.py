"""`train.devices` → the device of a process."""

from __future__ import annotations

from collections.abc import Callable

import torch

from luthier.errors import RecipeError
from luthier.sections import Devices


def pick_device(devices: Devices, rank: int = 0) -> torch.device:
    """The device of `train.devices` for a process, or for all that comes after training (`rank` 0).

    Errors: RecipeError when any of the devices is not there: every process says the same.
    """
    if devices == "auto":
        devices = [0] if torch.cuda.is_available() else "cpu"
    indices = [device for device in devices if isinstance(device, int)]
    if not indices:
        return torch.device("cpu")
    if max(indices) >= (there := torch.cuda.device_count()):
        here = {0: "there is no GPU here", 1: "there is one GPU here, number 0"}
        raise RecipeError(
            f"train.devices: {indices}: {here.get(there, f'there are {there} GPUs here, counted from 0')}"
        )
    return torch.device("cuda", indices[rank])


def device_to_answer(devices: Devices, say: Callable[[str], None]) -> torch.device:
    """The first of `train.devices`; where they are not all there (the run may come from another machine), auto's."""
    try:
        return pick_device(devices)
    except RecipeError as error:
        device = pick_device("auto")
        say(f"{error}; taken instead: {device}")
        return device


def idle_gpus(devices: Devices) -> str | None:
    """A line about the GPUs that `auto` leaves alone, where there are any."""
    there = list(range(torch.cuda.device_count()))
    if devices != "auto" or len(there) < 2:
        return None
    both = "both" if len(there) == 2 else "all"
    return f"{len(there)} GPUs are here, the first is used; train.devices: {there} uses {both}"

"""Several processes train as one: which of them this is, and all that they tell each other.

The only file that knows torch.distributed and DDP. In a world of one nothing here touches either.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from luthier.errors import RecipeError, RunError
from luthier.models.device import pick_device
from luthier.sections import Devices
from luthier.training.launch import LostError, launched, rank

Shared = TypeVar("Shared")

TIMEOUT = timedelta(hours=2)
"""How long a process waits for the others: they may be reading data. It is no limit on noticing that one has died."""


@dataclass(frozen=True)
class World:
    """The processes that train one run; this one is `rank`, from 0, of `size`, and computes on `device`.

    Every method but `leads` is called by all of them, in the same order.
    """

    rank: int
    size: int
    device: torch.device

    @classmethod
    def alone(cls, device: torch.device) -> World:
        """The world of a run on one device."""
        return cls(0, 1, device)

    @property
    def leads(self) -> bool:
        """Whether this is the process that says and writes."""
        return self.rank == 0

    def total(self, values: Sequence[float]) -> list[float]:
        """Each value's sum over all processes, in float64 and in the order of the ranks: equal in all of them."""
        sums: list[float] = self._table(values).sum(0).tolist()
        return sums

    def agree(self, supervised: int, computed: int, passes: int, stop: int | None) -> tuple[int, int, int, int | None]:
        """Of a step: the supervised and the computed tokens of all processes, the most passes of any, the signal that
        stopped any."""
        tokens, all_, counts, stops = self._table([supervised, computed, passes, stop or 0]).T
        return int(tokens.sum()), int(all_.sum()), int(counts.max()), int(stops.max()) or None

    def _table(self, values: Sequence[float]) -> Tensor:
        """What each process brought: float64 [size, values], on the CPU: a GPU at work is not waited for."""
        table = torch.zeros(self.size, len(values), dtype=torch.float64)
        table[self.rank] = torch.tensor(values, dtype=torch.float64)
        if self.size > 1:
            dist.all_reduce(table)  # adds zeros only: nothing is rounded
        return table

    def gather(self, value: Shared) -> list[Shared]:
        """What each process brought, by rank; anything that can be pickled."""
        if self.size == 1:
            return [value]
        values = [value] * self.size
        dist.all_gather_object(values, value)
        return values

    def share(self, value: Shared) -> Shared:
        """What the first process brought, in all of them."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]

    def wait(self) -> None:
        """Until all processes have come here."""
        self._table([0])

    def wrap(self, module: nn.Module) -> nn.Module:
        """The module under DDP, which averages gradients: multiply the loss by `size`. What trains becomes rank 0's.

        Each step's last pass needs the gradient of every trainable parameter, in every process: of no rows as well.
        """
        if self.size == 1:
            return module
        for parameter in module.parameters():
            if parameter.requires_grad:
                dist.broadcast(parameter.detach(), src=0)
        shared = DistributedDataParallel(
            module,
            gradient_as_bucket_view=True,  # no second copy of the gradients
            init_sync=False,  # it would send the frozen base as well, which each process has from the same files
        )
        shared.broadcast_buffers = False  # constants; as an argument, torch 2.13 calls it deprecated, 2.11 has no other
        return shared

    def not_yet(self, module: nn.Module, more: bool) -> AbstractContextManager[None]:
        """Around a pass's forward and backward: while there is `more` in the step, gradients add up and stay here."""
        return module.no_sync() if more and isinstance(module, DistributedDataParallel) else nullcontext()


@contextmanager
def join(devices: Devices) -> Iterator[World]:
    """The world of this process for `train.devices`; they all leave it together. A world of one where nobody launched.

    Errors: RecipeError where torchrun's processes and the recipe's devices differ in number, or a device is not there;
    LostError when another process ends before its time.
    """
    size = int(os.environ["WORLD_SIZE"]) if launched() else 1
    wanted = len(devices) if isinstance(devices, list) else 1
    if size != wanted:
        raise RecipeError(
            f"train.devices: {_shown(devices)} is for {wanted} process{'es'[: 2 * (wanted > 1)]}, and {size} are here; "
            f"start them with --nproc-per-node {wanted}, or name {size} devices"
        )
    world = World(rank(), size, pick_device(devices, rank()))
    on_gpu = world.device.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(world.device)
    if size == 1:
        yield world
        return
    with lost():
        _meet("cpu:gloo,cuda:nccl" if on_gpu else "gloo")
        yield world
        world.wait()  # torchrun ends all when one ends: the first may still be writing
        dist.destroy_process_group()


def _meet(backends: str) -> None:
    """All processes find each other. Errors: RunError where another program took the port since it was found free."""
    try:
        dist.init_process_group(backends, timeout=TIMEOUT)
    except dist.DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        port = os.environ.get("MASTER_PORT")
        raise RunError(f"port {port}, where the processes meet, is in use by another program; start again") from error


@contextmanager
def lost() -> Iterator[None]:
    """What torch says when another process is gone → LostError. gloo's own errors are plain RuntimeErrors."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or "gloo" in str(error):
            raise LostError("another process of this run has ended, or cannot be reached any more") from error
        raise


def _shown(devices: Devices) -> str:
    return devices if isinstance(devices, str) else f"[{', '.join(map(str, devices))}]"

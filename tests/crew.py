"""What the processes of the tests of several processes do. `launch` sends these functions by name; torchrun runs the
file: `torchrun … crew.py OUT` writes what `exchange` gives to the file OUT.

torch is imported where it is needed: half of these do without, and start in a tenth of a second.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

from luthier.errors import RecipeError, RunError
from luthier.training.launch import LostError, heeded, launch, rank, tell_run

CPUS = ["cpu", "cpu"]
NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "OMP_NUM_THREADS")


def say_nothing(line):
    pass


# -- without torch ---------------------------------------------------------------------------------------------------


def introduce(folder, *, say):
    """Each says who it is and writes what it sees; the first gives back its own."""
    say(f"I am {rank()}")
    seen = {name: os.environ[name] for name in NAMES} | {"group": os.getpgid(0) == os.getpid()}
    (folder / f"{rank()}.json").write_text(json.dumps(seen))
    return seen


def fail(how, folder=None, *, say):
    if how == "both":
        raise RecipeError("recipe.yaml:3: train.lr: wrong in every process")
    if rank() == 0:
        if folder is not None:
            tell_run(folder)
        time.sleep(60)  # as NCCL's collectives do
    if folder is not None:
        time.sleep(0.5)
    if how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "bug":
        raise ZeroDivisionError("a bug")
    raise {
        "run": RunError("only here"),
        "file": OddError("x"),
        "missing": FileNotFoundError(2, "No such file", "rows"),
    }[how]


class OddError(OSError):
    """As huggingface_hub's errors: pickle cannot make it again."""

    def __init__(self, message, *, response=None):
        super().__init__(f"odd {message}")
        self.response = response


def finish_the_step(*, say):
    """A step of a second that a signal does not shorten, with its end said."""
    came = []
    for number in heeded():
        signal.signal(number, lambda number, frame: came.append(number))
    say(f"ready {os.getpid()}")
    while not came:
        time.sleep(0.02)
    time.sleep(1)
    say(f"saved after {signal.Signals(came[0]).name}, signals: {len(came)}")
    return came[0]


def part(*, say):
    """The first is still at work when a signal ends the second one."""
    came = []
    if rank() == 0:
        signal.signal(signal.SIGTERM, lambda number, frame: came.append(number))
    say(f"ready {os.getpid()}")
    while not came:
        time.sleep(0.02)
    time.sleep(0.3)
    raise LostError("another process of this run has ended")


def load(*, say):
    """Not yet at the point where a signal can be waited for."""
    say(f"ready {os.getpid()}")
    time.sleep(60)


# -- with torch ------------------------------------------------------------------------------------------------------


def exchange(*, say):
    """What the processes tell each other, and the gradients that they come to, from all of them: [a dict a rank]."""
    from luthier.training.distributed import join

    with join(CPUS) as world:
        me = world.rank
        told = {
            "leads": world.leads,
            "size": world.size,
            "total": world.total([1.5, 10**15 + me, -me]),
            "agree": [
                world.agree(10 + me, 20 + me, 3 - me, None),
                world.agree(0, 1, me, [signal.SIGTERM, signal.SIGINT][me]),
            ],
            "gather": world.gather({"rank": me}),
            "share": world.share(f"from {me}"),
            "gradients": [gradients(world, hands) for hands in (UNEQUAL, EMPTY)],
        }
        world.wait()
        return world.gather(told)


ROWS = 7
# (rows of a pass) of each rank: unequal numbers of rows and of passes; a rank with no rows at all
UNEQUAL = [[[0, 4], [2], [5, 6]], [[1, 3]]]
EMPTY = [[[0, 1], [2, 3, 4, 5, 6]], []]


def toy(seed=0):
    """Four supervised tokens a row at most; a frozen layer, as in a model with adapters."""
    import torch
    from torch import nn

    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5)).double()
    nn.init.zeros_(net[0].bias).requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(ROWS, 4, 6, dtype=torch.float64, generator=generator)
    targets = torch.randint(5, (ROWS, 4), generator=generator)
    for row in range(ROWS):
        targets[row, 1 + row % 4 :] = -100
    return net, x, targets


def summed(net, x, targets, rows):
    import torch

    return torch.nn.functional.cross_entropy(net(x[rows]).flatten(0, 1), targets[rows].flatten(), reduction="sum")


def gradients(world, hands):
    """Of two steps, as the loop computes them."""
    import torch

    net, x, targets = toy(seed=world.rank)  # the weights are rank 0's once wrapped
    shared, mine, found = world.wrap(net), hands[world.rank], []
    for _ in range(2):
        supervised, _, most, _ = world.agree(int((targets[sum(mine, [])] >= 0).sum()), 0, len(mine), None)
        for number in range(most):
            weight = 1 / supervised if number < len(mine) else 0.0
            with world.not_yet(shared, number < most - 1):
                loss = summed(shared, x, targets, mine[number] if number < len(mine) else [0]) * weight
                (loss * world.size).backward()
        found.append([value.grad.tolist() for value in net.parameters() if value.requires_grad])
        with torch.no_grad():
            for value in net.parameters():
                if value.requires_grad:
                    value -= value.grad
        net.zero_grad()
    return found


def train(ending, *, say):
    """Steps of a third of a second, until a signal came to any process, or the second one ends so."""
    from luthier.training.distributed import join

    came = []
    signal.signal(signal.SIGTERM, lambda number, frame: came.append(number))
    with join(CPUS) as world:
        say(f"ready {world.gather(os.getpid())}")
        for step in range(1, 1000):
            time.sleep(0.3)
            if rank() == 1 and ending == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if rank() == 1 and ending == "failed":
                raise RunError("no room on this device")
            if ending == "killed in backward":
                one_backward(world)
            stopped = world.agree(1, 1, 1, came[0] if came else None)[3]
            if stopped is not None:
                say(f"saved at step {step} after {signal.Signals(stopped).name}")
                return stopped
    raise AssertionError


def one_backward(world):
    net, x, targets = toy()
    loss = summed(world.wrap(net), x, targets, [0])
    if rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    loss.backward()


def main():
    if sys.argv[1] == "launch":  # a launcher to be signalled
        function, arguments = globals()[sys.argv[2]], tuple(sys.argv[3:])
        stopped = launch(function, arguments, 2, lambda line: print(line, flush=True))
        sys.exit(128 + stopped)
    told = exchange(say=say_nothing)
    if rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps(told))


if __name__ == "__main__":
    import crew  # what is sent by name has this name, not __main__

    crew.main()

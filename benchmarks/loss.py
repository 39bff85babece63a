"""What the chunked loss takes against full logits: python benchmarks/loss.py (ten minutes on one core).

2,000 supervised places × 151,936 words (Qwen's) × 512 in bf16, forward and backward to the hidden states, and for a
head that trains to its weight. Each measurement is a process of its own; the ways take
turns, medians are printed.
"""

from __future__ import annotations

import multiprocessing
import resource
import statistics
import time
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from luthier.engine import frozen_head, loss
from luthier.engine.loss import Head, summed_cross_entropy

PLACES, WORDS, WIDTH = 2_000, 151_936, 512
REPETITIONS = 3


class Way(NamedTuple):
    trains: bool
    chunk: int | None
    """Places at once; None: full fp32 logits."""

    def __str__(self) -> str:
        return f"{'trained' if self.trains else 'frozen '}  {f'chunk {self.chunk}' if self.chunk else 'full logits'}"


WAYS = [*(Way(False, n) for n in (None, 32, 64, 128, 256, 512)), *(Way(True, n) for n in (None, 32, 128, 512))]


def main() -> None:
    print(f"{PLACES} × {WORDS} × {WIDTH}, bf16, {torch.get_num_threads()} threads")
    measured: dict[Way, list[tuple[float, float]]] = {way: [] for way in WAYS}
    for repetition in range(REPETITIONS):
        for way, results in measured.items():
            # Memory that one way gave back would be there for the next: a new process has none.
            with multiprocessing.get_context("spawn").Pool(1) as process:
                results.append(process.apply(measure, (way,)))
            print(
                f"{repetition + 1}/{REPETITIONS}  {way}: {results[-1][0]:.2f} s, {results[-1][1]:.0f} MiB", flush=True
            )
    print("medians")
    for way, results in measured.items():
        seconds, mebibytes = (statistics.median(numbers) for numbers in zip(*results, strict=True))
        print(f"{way}: {seconds:6.2f} s {mebibytes:6.0f} MiB")


def measure(way: Way) -> tuple[float, float]:
    """Processor seconds (the machine may be busy), and MiB at most over what the hidden states and the weight take."""
    torch.manual_seed(0)
    module = nn.Linear(WIDTH, WORDS, bias=False, dtype=torch.bfloat16).requires_grad_(way.trains)
    hidden = torch.randn(PLACES, WIDTH, dtype=torch.bfloat16, requires_grad=True)
    targets = torch.randint(WORDS, (PLACES,))
    before = peak()
    summed(hidden[:32], targets[:32], module, way).backward()  # a process's first products are slower
    hidden.grad = module.weight.grad = None
    start = time.process_time()
    summed(hidden, targets, module, way).backward()
    return time.process_time() - start, peak() - before


def summed(hidden: torch.Tensor, targets: torch.Tensor, module: nn.Linear, way: Way) -> torch.Tensor:
    if way.chunk is None:
        return F.cross_entropy(module(hidden).float(), targets, reduction="sum")
    loss.CHUNK["cpu"] = frozen_head.LOGITS["cpu"] = way.chunk * WORDS
    return summed_cross_entropy(hidden, targets, Head(module))


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()

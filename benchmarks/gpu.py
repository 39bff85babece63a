"""The engine on a CUDA card: compared with float64, timed beside the usual ways: python benchmarks/gpu.py --out FILE

Needs torch, transformers, PEFT and accelerate, `src` on PYTHONPATH, nothing from the network; bitsandbytes and TRL are
used where they are. Random weights and random ids in rows of the usual lengths: neither changes speed. All ways train
the same adapters on the same rows, and take turns. `--dry`: the same on the CPU with tiny models, in seconds. Whatever
fails is a line, and the rest goes on; the file is written after each part.

Useful work of rows of t tokens, s of them taught: Σ 4·P·t + 4·H·s + 6·L·d·t² (P parameters of the decoder's matrices, H
of the head's, L layers of width d). Utilisation counts a token as often as it was computed, against this card's own
rate of the model's own matrix products; the effective rate counts every token of every row.
"""

from __future__ import annotations

import argparse
import copy
import gc
import importlib.util
import json
import os
import platform
import statistics
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import gpuways
import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from gpuways import LADDER, TOKENS, Cell, Rows, Way, adapted, draw, engine, gradients_of, now, of_engine, trained
from torch import Tensor
from transformers import LlamaConfig, PretrainedConfig, Qwen2Config

from luthier.engine.cuda_attention import attend_cuda, why

QWEN = {"vocab_size": 151_936, "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28,
        "num_attention_heads": 12, "num_key_value_heads": 2, "tie_word_embeddings": True}  # fmt: skip
LLAMA = {"vocab_size": 32_000, "hidden_size": 4096, "intermediate_size": 11_008, "num_hidden_layers": 32,
         "num_attention_heads": 32, "num_key_value_heads": 32, "tie_word_embeddings": False}  # fmt: skip
TINY = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.1}  # fmt: skip
REPETITIONS, STEPS = 3, 3  # of all ways in turn; at a time, the first of which warms up
MINUTES = 8.5  # after them no part is begun
PLAIN = ((0, 1, -1), (1, 200, -1), (200, 333, -1), (333, 700, -1))
TREE = ((0, 150, -1), (150, 300, 0), (300, 420, 0), (420, 500, 2), (500, 690, 2), (690, 700, -1))


# -- what is useful ----------------------------------------------------------------------------------------------------


def matrices(config: PretrainedConfig) -> tuple[list[tuple[int, int]], tuple[int, int]]:
    """[out, in] of a layer's seven matrices, and of the head."""
    d, f, heads = config.hidden_size, config.intermediate_size, config.num_attention_heads
    k = d // heads * config.num_key_value_heads
    return [(d, d), (k, d), (k, d), (d, d), (f, d), (f, d), (d, f)], (config.vocab_size, d)


def work(config: PretrainedConfig, stretches: Sequence[tuple[int, int]], taught: int) -> float:
    """Operations. stretches: (tokens before it in its row, its own tokens) of all that is computed."""
    layer, (words, d) = matrices(config)
    decoder, layers = config.num_hidden_layers * sum(a * b for a, b in layer), config.num_hidden_layers
    pairs = sum((before + own) ** 2 - before**2 for before, own in stretches)
    return 4.0 * decoder * sum(own for _, own in stretches) + 4.0 * words * d * taught + 6.0 * layers * d * pairs


def work_of_engine(cell: Cell, model: Any, rows: Rows, on: int) -> float:
    with engine(model, on) as gradients:
        parts = gradients.cut(rows, np.arange(len(rows)), TOKENS)  # type: ignore[arg-type]
    stretches, taught = [], 0
    for part in parts:
        befores: list[int] = []
        for start, stop, parent in part.segments:
            before = 0 if parent < 0 else befores[parent] + part.segments[parent][1] - part.segments[parent][0]
            befores.append(before)
            stretches.append((before, stop - start))
        taught += len(part.places)
    return work(cell.config, stretches, taught)


def matrix_rate(cell: Cell, rows: Rows, device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of the model's own products, forward and to the inputs, one shape after the other."""
    layer, head = matrices(cell.config)
    few = [torch.randn(shape, device=device, dtype=dtype) for _ in range(4) for shape in layer]
    weights = few * max(1, cell.config.num_hidden_layers // 4) + [torch.randn(head, device=device, dtype=dtype)]
    tokens = [int(rows.lengths.sum())] * (len(weights) - 1) + [int(rows.supervised.sum())]
    sizes = {(t, weight.shape[1]) for t, weight in zip(tokens, weights, strict=True)}
    inputs = {size: torch.randn(size, device=device, dtype=dtype) for size in sizes}
    rates = []
    for _ in range(5):
        began, done = now(), 0.0
        for t, weight in zip(tokens, weights, strict=True):
            F.linear(inputs[t, weight.shape[1]], weight) @ weight
            done += 4.0 * t * weight.numel()
        rates.append(done / (now() - began))
    return statistics.median(rates)


# -- parts -------------------------------------------------------------------------------------------------------------


def relative(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    """The largest difference of norms, each by the reference's, or by a thousandth of the largest reference."""
    floor = max(float(value.norm()) for value in theirs) * 1e-3
    pairs = zip(ours, theirs, strict=True)
    return max(float((a.double() - b.double()).norm()) / max(float(b.norm()), floor, 1e-12) for a, b in pairs)


def attention_by_definition(
    q: Tensor, k: Tensor, v: Tensor, segments: Any, window: int | None, softcap: float | None
) -> Tensor:
    """In float64: [1, H, L, E] → [1, L, H, E]."""
    allowed = torch.zeros(q.shape[2], q.shape[2], dtype=torch.bool)
    for number, (start, stop, _) in enumerate(segments):
        chain, above = [], number
        while above >= 0:
            chain, above = [*range(*segments[above][:2]), *chain], segments[above][2]
        for place in range(start, stop):
            seen = chain[: len(chain) - (stop - place - 1)]
            allowed[place, seen[-window:] if window else seen] = True
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = q @ k.mT * q.shape[-1] ** -0.5
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    return (scores.masked_fill(~allowed.to(q.device), -torch.inf).softmax(-1) @ v).transpose(1, 2)


def check_attention(device: torch.device) -> dict[str, Any]:
    """Results and gradients of each kernel against float64."""
    found: dict[str, Any] = {}
    for name, segments, window, softcap, dtype, bound in (
        ("flash", PLAIN, None, None, torch.bfloat16, 2e-2),
        ("flash, window", PLAIN, 50, None, torch.bfloat16, 2e-2),
        ("flex, shared prefixes", TREE, None, None, torch.bfloat16, 2e-2),
        ("flex, shared prefixes, fp32", TREE, None, None, torch.float32, 1e-4),
        ("flex, shared prefixes, window", TREE, 50, None, torch.bfloat16, 2e-2),
        ("flex, soft cap", TREE, None, 5.0, torch.bfloat16, 2e-2),
    ):
        torch.manual_seed(0)
        given = [torch.randn(1, 700, n, 64, device=device, dtype=dtype).transpose(1, 2) for n in (6, 2, 2)]
        ours = [x.detach().requires_grad_() for x in given]
        exact = [x.detach().double().requires_grad_() for x in given]
        began = now()
        out = attend_cuda(*ours, segments, None, window, softcap)  # type: ignore[arg-type]
        if out is None:
            found[name] = "not available"
            continue
        upstream = torch.randn_like(out)
        results = [out, *torch.autograd.grad(out, ours, upstream)]
        seconds = now() - began
        reference = attention_by_definition(*exact, segments, window, softcap)  # type: ignore[arg-type]
        expected = [reference, *torch.autograd.grad(reference, exact, upstream.double())]
        found[name] = {"difference": relative(results, expected), "bound": bound, "seconds with compiling": seconds}
    return found | {"unavailable": why()}


def check_engine(device: torch.device, dry: bool) -> dict[str, Any]:
    """Loss and gradients of tiny models, dropout on, each rung added, against the padded twin in float64."""
    found: dict[str, Any] = {}
    rows = draw("alpaca", TINY["vocab_size"])
    rows = Rows(rows.rows[:6])
    bounds = [(torch.float32, 1e-5, 1e-5), (torch.bfloat16, 2e-3, 1e-1)]
    for config in [Qwen2Config(**TINY), LlamaConfig(**TINY)][: 1 if dry else 2]:
        for dtype, of_loss, of_gradient in bounds[: 1 if dry else 2]:
            model = adapted(config, dtype, device, nf4=False, drop=0.1)
            expected = gradients_of(copy.deepcopy(model).double(), rows, 0, "plain")
            for name, on in LADDER.items():
                got = gradients_of(model, rows, on, "engine")
                loss, gradient = relative(got[:1], expected[:1]), relative(got[1:], expected[1:])
                key = f"{config.model_type} {str(dtype)[6:]} {name}"
                found[key] = {"loss": loss, "difference": gradient, "bound": of_gradient, "loss bound": of_loss}
    return found


def host_waits(model: Any, rows: Rows) -> list[str]:
    """Where a step, forward and backward, waits for the card: the places in the source, none if all is well."""
    with engine(model, LADDER["+ fused layers"]) as gradients:
        gradients.of_step(rows, np.arange(len(rows)), 0, TOKENS, None)  # type: ignore[arg-type]
        torch.cuda.synchronize()
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                gradients.of_step(rows, np.arange(len(rows)), 0, TOKENS, None)  # type: ignore[arg-type]
            finally:
                torch.cuda.set_sync_debug_mode("default")
    model.zero_grad()
    return sorted({f"{one.filename}:{one.lineno}" for one in said if "synchroniz" in str(one.message)})


def measure(cell: Cell, device: torch.device, dry: bool, ends: float) -> dict[str, Any]:
    """All ways on one cell, in turn."""
    model, rows = adapted(cell.config, torch.bfloat16, device, cell.nf4), draw(cell.rows, cell.config.vocab_size)
    rows = Rows(rows.rows[: 2 * cell.at_once]) if dry else rows
    useful = work(cell.config, [(0, int(t)) for t in rows.lengths], int(rows.supervised.sum()))
    ways: dict[str, Way] = {"tutorial script": gpuways.of_trainer(model, rows, cell.at_once)}
    if all(importlib.util.find_spec(name) for name in ("trl", "datasets")):
        ways |= {f"TRL, {kind}": gpuways.of_trainer(model, rows, cell.at_once, kind) for kind in ("padded", "packed")}
    computed = dict.fromkeys(ways, useful)
    for name, on in LADDER.items():
        ways[name], computed[name] = of_engine(model, rows, on), work_of_engine(cell, model, rows, on)
    most = LADDER["+ fused layers"]
    ways["all, recomputed"] = of_engine(model, rows, most, recompute=True)
    computed["all, recomputed"] = computed["+ fused layers"]
    rate = matrix_rate(cell, rows, device, torch.bfloat16)
    measured = taken(model, ways, *((1, 2) if dry else (REPETITIONS, STEPS)), ends)
    tokens = int(rows.lengths.sum())
    for name, found in measured.items():
        if "seconds" in found:
            seconds = found["median"] = statistics.median(found["seconds"])
            found |= {"tokens/s": tokens / seconds, "utilisation": computed[name] / seconds / rate}
            found["effective"] = useful / seconds
    waits = host_waits(model, rows) if device.type == "cuda" else []
    facts = {"rows": len(rows), "tokens": tokens, "taught": int(rows.supervised.sum()), "matrix rate": rate}
    return {**facts, "ways": measured, "host waits": waits, "unavailable": why()}


def taken(model: Any, ways: dict[str, Way], repetitions: int, steps: int, ends: float) -> dict[str, Any]:
    """Of each way: seconds a step, the most memory, the first step's loss; or what went wrong."""
    start = {name: value.detach().clone() for name, value in trained(model).items()}
    found: dict[str, Any] = {name: {"seconds": []} for name in ways}
    for repetition in range(repetitions):
        for name, way in ways.items():
            if "error" in found[name] or (repetition and time.monotonic() > ends):
                continue
            begin_again(model, start)
            try:
                if torch.cuda.is_available():
                    torch.cuda.reset_peak_memory_stats()
                seconds, loss = way(steps)
                found[name]["seconds"] += seconds[1:]
                found[name]["loss"] = loss
                if torch.cuda.is_available():
                    found[name]["peak GiB"] = torch.cuda.max_memory_allocated() / 2**30
            except Exception as error:  # one way that fails is a line
                found[name] = {"error": said(error), "where": traceback.format_exc().splitlines()[-8:]}
            model.zero_grad()
            if torch.cuda.is_available():
                gc.collect()
                torch.cuda.empty_cache()
    return found


def begin_again(model: Any, start: dict[str, Tensor]) -> None:
    """The adapters as they were, in their format (TRL changes it), and no autocast of accelerate's around the model."""
    for name, value in trained(model).items():
        value.data = start[name].clone()
    for name in ("forward", "_original_forward"):
        vars(model).pop(name, None)


def said(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:160]}"


def print_checks(found: dict[str, Any]) -> None:
    for name, one in found.items():
        if isinstance(one, dict) and "difference" in one:
            good = one["difference"] <= one["bound"] and one.get("loss", 0.0) <= one.get("loss bound", 1.0)
            loss = f", loss {one['loss']:.0e}" if "loss" in one else ""
            print(f"  {'ok   ' if good else 'WRONG'} {name}: {one['difference']:.0e}{loss} (bound {one['bound']:.0e})")
        elif one:
            print(f"  {name}: {one}")


def print_cell(found: dict[str, Any]) -> None:
    print(f"  {found['rows']} rows, {found['tokens']:,} tokens, {found['taught']:,} taught; "
          f"matrix products {found['matrix rate'] / 1e12:,.1f} T/s")  # fmt: skip
    script = found["ways"]["tutorial script"].get("median")
    for name, one in found["ways"].items():
        if "error" in one:
            print(f"  {name:18} {one['error']}")
            continue
        times = f"{script / one['median']:5.1f} ×" if script else ""
        rates = f"{one['tokens/s']:9,.0f} tokens/s {one['utilisation']:6.1%} {one['effective'] / 1e12:6.1f} T/s"
        peak = f"{one['peak GiB']:5.1f} GiB" if "peak GiB" in one else ""
        print(f"  {name:18} {one['median']:7.3f} s {rates} {peak} {times}  loss {one['loss']:.4f}")
    print(f"  waits for the card: {', '.join(found['host waits']) or 'none'}")
    for what, reason in found["unavailable"].items():
        print(f"  not available: {what}: {reason}")


def main(given: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0])  # type: ignore[union-attr]
    parser.add_argument("--out", type=Path, default=Path("gpu.json"), help="where the figures go, as JSON")
    parser.add_argument("--dry", action="store_true", help="tiny models on the CPU, in seconds")
    asked = parser.parse_args(given)
    if not asked.dry:
        os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # of several cards transformers' Trainer would take all
        if not torch.cuda.is_available():
            raise SystemExit("no CUDA device here; --dry runs it on the CPU with tiny models")
        torch._dynamo.config.recompile_limit = 64  # more models in one process than any run has
    device = torch.device("cpu" if asked.dry else "cuda")
    ends = time.monotonic() + 60 * MINUTES
    result: dict[str, Any] = {"machine": machine(device), "parts": {}}
    print(", ".join(f"{name} {value}" for name, value in result["machine"].items()), flush=True)
    for name, run, show in parts_of(device, asked.dry, ends):
        print(name, flush=True)
        began = time.monotonic()
        try:
            if began > ends:
                raise TimeoutError(f"not begun: {MINUTES} minutes are over")
            found = run()
            show(found)
        except Exception as error:  # the rest goes on
            found = {"error": said(error), "where": traceback.format_exc().splitlines()[-12:]}
            print(f"  FAILED {found['error']}")
        gc.collect()
        result["parts"][name] = {**found, "took": time.monotonic() - began}
        asked.out.parent.mkdir(parents=True, exist_ok=True)
        asked.out.write_text(json.dumps(result, indent=1), encoding="utf-8")
    return result


def parts_of(device: torch.device, dry: bool, ends: float) -> list[tuple[str, Any, Callable[[Any], None]]]:
    """(name, what is done, how it is shown)"""
    qwen = Qwen2Config(**(TINY if dry else QWEN))
    llama = LlamaConfig(**(TINY if dry else LLAMA))
    cells = [
        Cell(f"{name}, {rows}, {'NF4' if nf4 else 'bf16'}", config, rows, 2 if dry else at_once, nf4)
        for nf4 in (False, True)
        for name, config, rows, at_once in (("Qwen2 1.5B", qwen, "huanhuan", 10), ("Llama-2 7B", llama, "alpaca", 4))
        if (not nf4 or importlib.util.find_spec("bitsandbytes")) and (not dry or nf4 == (config is llama))
    ]
    return [
        ("attention against float64", lambda: check_attention(device), print_checks),
        ("engine against the padded twin in float64", lambda: check_engine(device, dry), print_checks),
        *((cell.name, lambda cell=cell: measure(cell, device, dry, ends), print_cell) for cell in cells),
    ]


def machine(device: torch.device) -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("torch", "triton", "transformers", "peft", "accelerate", "bitsandbytes", "trl"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "absent"
    return found | {"device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"}


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    main()

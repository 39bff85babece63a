"""What `luthier plan` prints: the parts of a plan in aligned lines."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from luthier.plan import Plan
from luthier.words import size


def lines(plan: Plan, structure: bool = False) -> Iterator[str]:
    """The whole plan; with `structure` the model's tree first."""
    if structure:
        yield from plan.structure
        yield ""
    yield f"model: {plan.model}"
    yield f"trains: {plan.trains}"
    yield ""
    yield f"memory on {plan.device}, at the peak of a step; the largest pass has {_pass(plan)}"
    yield from _table(_memory(plan))
    yield from _verdict(plan)
    yield ""
    yield from _steps(plan)
    yield "disk"
    yield from _table((name, size(count), "") for name, count in plan.disk.items())
    for line in plan.unknown:
        yield f"not known: {line}"


def _pass(plan: Plan) -> str:
    tokens, rows = plan.largest
    return f"{tokens:,} tokens of {rows:,} row{'s'[: rows != 1]}"


def _memory(plan: Plan) -> Iterator[tuple[str, str, str]]:
    found, section = plan.memory, plan.section
    yield "weights", size(found.weights), plan.quantized.kind if plan.quantized else ""
    if found.adapter:
        yield "adapter", size(found.adapter), ""
    yield "gradients", size(found.gradients), ""
    paged = ", which may move to the CPU's" if section.optimizer.startswith("paged") and plan.device == "cuda" else ""
    yield "optimizer", size(found.optimizer), f"{section.optimizer}{paged}"
    if found.table:
        yield "dropout", size(found.table), "one table of masks for all layers"
    if found.libraries:
        yield "libraries", size(found.libraries), "code and kernels that a first step brings in"
    if (work := found.rehearsal) is None:
        yield "activations", "?", "not known, see below"
    else:
        again = "layers compute again in the backward pass" if section.activation_checkpointing else "every layer's"
        yield "activations", size(work.kept), again
        counted = {"loss chunk": work.forward, "backward": work.backward}
        for name, count in counted.items():
            larger = count == max(counted.values())
            yield name, size(count), "" if larger else "at another time: not in the sum"
        if work.holes:
            yield "allocator", size(work.holes), "holes of the C library's heap; a guess"
    yield "together", size(found.weights + found.increase), f"of {size(plan.free)} that are free"
    if found.proof:
        yield "proof", size(found.proof), "logits of a few rows before step 1, then given back; instead of the pass"


def _verdict(plan: Plan) -> Iterator[str]:
    if plan.memory.rehearsal is None or plan.memory.most <= plan.free:
        return
    yield f"it does not fit: {size(plan.memory.most - plan.free)} too much; {' or '.join(_knobs(plan))}"


def _knobs(plan: Plan) -> Iterator[str]:
    """What would lower it, the cheapest first."""
    section, found = plan.section, plan.memory
    if not section.activation_checkpointing:
        yield "set train.activation_checkpointing: true"
    tokens, rows = plan.largest
    if rows > 1:
        yield f"lower train.tokens_per_pass (below {tokens:,})"
    if found.adapter and plan.quantized is None:
        yield "set model.quantize: nf4 or int8"
    elif found.adapter and plan.quantized is not None and plan.quantized.kind == "int8":
        yield "set model.quantize: nf4"
    if section.optimizer == "adamw" and 10 * found.optimizer > found.most:
        yield "set train.optimizer: adamw_8bit"
    if not found.adapter:
        yield "set method.kind: lora"
    if rows == 1:
        yield "lower data.max_length"
    yield "take a larger device"


def _steps(plan: Plan) -> Iterator[str]:
    if plan.steps is None:
        yield f"steps: not known without the data; {plan.section.epochs:g} epochs of rows by {plan.section.batch}"
        return
    epoch = f", {plan.steps_per_epoch:,} an epoch" if plan.steps_per_epoch else ""
    tokens = f"; {plan.tokens:,} tokens" if plan.tokens else ""
    yield f"steps: {plan.steps:,}{epoch}{tokens}"


def _table(rows: Iterable[tuple[str, str, str]]) -> Iterator[str]:
    listed = list(rows)
    names, sizes = (max(len(row[column]) for row in listed) for column in (0, 1))
    for name, count, note in listed:
        yield f"  {name:{names}}  {count:>{sizes}}  {note}".rstrip()

"""What a recipe would take, before anything is loaded: memory, steps, tokens and disk, from config.json alone.

What training would refuse by the recipe and the configuration is refused here with the same words. What cannot be known
without weights, tokenizer or data is assumed, and said.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from luthier import hub
from luthier.data.batches import Order, order_of, total_steps
from luthier.data.encode import Encoder, Example
from luthier.data.pack import Pass, padded_passes, passes
from luthier.data.prepare import prepare
from luthier.engine.attention import CannotPackError
from luthier.engine.dropout import TABLE_BITS, WIDEST, of_base
from luthier.engine.forward import Route, adopt, base_of, rotary_border
from luthier.engine.memory import free_memory
from luthier.engine.proof import rows_to_prove
from luthier.engine.soft import virtual_of
from luthier.errors import HubError
from luthier.methods import METHODS, whole
from luthier.models import quantize
from luthier.models.adapters import attach, saved_bytes
from luthier.models.load import (
    TOKENIZER_FILES,
    check_architecture,
    choose_dtype,
    footprint,
    load_tokenizer,
    pick_device,
    read_config,
)
from luthier.models.weights import DTYPES, name_of, open_weights
from luthier.recipe import load_recipe
from luthier.rehearsal import Rehearsal, bare_model, rehearse
from luthier.sections import EngineSection, Quantization, Recipe, TrainSection
from luthier.structure import structure
from luthier.training.budget import SHARE, TOKENS_PER_PASS
from luthier.training.optim import peak_lr
from luthier.training.room import ENTRIES, ENTRY, GENERATORS
from luthier.training.start import SHARE as PROOF_SHARE
from luthier.training.start import autocast_dtype
from luthier.workbench import check_vocabulary, check_window, held, with_precision

if TYPE_CHECKING:
    from luthier.data.prepare import Data

Say = Callable[[str], None]

MOMENTS_IN_8_BITS = {"adamw_8bit": 2, "paged_adamw_8bit": 2, "lion_8bit": 1}
"""What these optimizers remember of each number that trains; the others, AdamW's two, in the number's own format."""
IN_8_BITS, BLOCK = 4096, 256
"""bitsandbytes keeps smaller tensors' moments in fp32; so many share a scale of 4 bytes."""
MOST_STEPS = 10_000
"""Steps among which the largest is looked for."""
LOOKED_AT = 20
"""Of these, those with the most tokens: where beginnings are shared, the largest pass shows when they are cut."""
LIBRARIES = {"cpu": 30 << 20}
"""What a first step takes beside tensors: code that is first used, kernels made for these shapes (measured: 30 MiB with
8 tokens, of 100 M parameters). A GPU's own fixed costs are its driver's and unknown here."""
LOGITS = 12
"""Bytes of the proof's reference for each logit: three fp32 (proof.py)."""


@dataclass(frozen=True)
class Memory:
    """Bytes. weights: of the base as loaded; adapter: what trains beside them (0 where they train themselves).

    table: of the dropout's keep-flags; libraries: what they take for themselves; rehearsal: of the largest pass, None
    where it could not be computed; proof: what the reference's logits take before step 1, then given back.
    """

    weights: int
    adapter: int
    gradients: int
    optimizer: int
    table: int
    libraries: int
    rehearsal: Rehearsal | None = None
    proof: int = 0

    @property
    def increase(self) -> int:
        """Over the process that has loaded the base model, at the peak of a step."""
        pass_ = self.rehearsal
        work = pass_.kept + max(pass_.forward, pass_.backward) + pass_.holes if pass_ else 0
        return self.adapter + self.gradients + self.optimizer + self.table + self.libraries + work

    @property
    def most(self) -> int:
        return self.weights + max(self.increase, self.adapter + self.proof)


@dataclass(frozen=True)
class Plan:
    """All that is known of a run beforehand.

    largest: tokens and rows of the largest pass; tokens: of the whole run; disk: bytes by what they are for; unknown:
    what was assumed instead, a sentence each.
    """

    model: str
    trains: str
    structure: list[str]
    device: str
    section: TrainSection
    quantized: Quantization | None
    memory: Memory
    free: int
    largest: tuple[int, int]
    steps: int | None
    steps_per_epoch: int | None
    tokens: int | None
    disk: dict[str, int]
    unknown: list[str]


@dataclass(frozen=True)
class Bare:
    """What a model without weights is made from, again and again: a rehearsal uses one up."""

    recipe: Recipe
    path: Path
    dtype: torch.dtype
    device: str
    vendor_code: bool = False

    @property
    def quantized(self) -> Quantization | None:
        return quantize.quantization(self.recipe.model.quantize)

    def model(self, say: Say = lambda _: None) -> Any:
        """The adapted model; says its footprint first and the share that trains last. Errors: ModelError."""
        model = bare_model(self.path, self.dtype, vendor_code=self.vendor_code, quantized=self.quantized)
        say(f"{type(model).__name__}, {footprint(model)}")
        tokenizer = load_tokenizer(self.path) if self.recipe.method.init else None
        adapted = attach(model, self.recipe.method, self.recipe.train.seed, say=say, tokenizer=tokenizer)
        if not self.recipe.train.base_dropout:
            of_base(adapted).set_to(0.0)  # for good: this model is of no other use
        return adapted

    def section(self, model: Any) -> TrainSection:
        """The train section with its precision decided."""
        return with_precision(self.recipe.train, self.dtype, model.dtype, self.device, lambda _: None)


def plan(recipe: str | Path, overrides: Sequence[str] = (), *, say: Say = print) -> Plan:
    """Plan a recipe's run on this machine. Errors: RecipeError, ModelError, DataError, HubError, as of training."""
    chosen = load_recipe(recipe, overrides, check_files=False)
    quantize.check_extras(chosen)
    path = hub.model_path(chosen.model.name, chosen.model.revision, Path.cwd(), say, weights=False)
    native = check_architecture(path, read_config(path), chosen.model.trust_vendor_code)
    device, unknown = pick_device(chosen.train.devices), list[str]()
    dtype, why = choose_dtype(held(chosen, device).dtype, _stored(path, unknown), device)
    say(f"{chosen.model.name}: weights in {name_of(dtype)}: {why}")
    bare = Bare(chosen, path, dtype, device.type, not native)
    model = bare.model()  # what the configuration alone refuses is refused before the data is read
    peak_lr(chosen.train, chosen.method.kind, model)
    data = _data(chosen, path, unknown, say)
    if data is not None:
        check_vocabulary(model, data, path)
        check_window(model, data, path, virtual_of(model).tokens)
    return planned(bare, data, free_memory(device), unknown)


def planned(bare: Bare, data: Data | None, free: int, unknown: Sequence[str] = ()) -> Plan:
    """The plan of what is settled already. `free`: bytes that the device has. Errors: ModelError, RecipeError."""
    said: list[str] = []
    model, recipe = bare.model(said.append), bare.recipe
    section = bare.section(model)
    order = order_of(data.train_sources, recipe.data.seed, section.batch) if data else None
    steps = total_steps(section, order) if order else section.steps
    known, noted = _without_pass(model, bare), list(unknown)
    parts = _Passes(bare, data, order, model)
    if parts.route == "plain":
        noted.append("this model's attention takes no packed rows: they are padded")
    part = parts.largest(TOKENS_PER_PASS[bare.device] if section.tokens_per_pass == "auto" else section.tokens_per_pass)
    found = _rehearsed(bare, part, parts.route, noted)
    if section.tokens_per_pass == "auto" and found is not None:
        smaller = parts.largest(_affordable(found, part, free - known.weights))
        if smaller.ids.size < part.ids.size:
            part = smaller
            found = _rehearsed(bare, part, parts.route, noted)
    return Plan(
        model=said[0],
        trains=said[-1],
        structure=structure(model),
        device=bare.device,
        section=section,
        quantized=bare.quantized,
        memory=replace(known, rehearsal=found, proof=parts.proof_bytes(free)),
        free=free,
        largest=(part.ids.size, len(part.rows)),
        steps=steps,
        steps_per_epoch=order.steps_per_epoch if order else None,
        tokens=_tokens(data, order, steps) if data and order and steps else None,
        disk=_disk(bare, model, known, steps, order),
        unknown=noted,
    )


def memory(bare: Bare, part: Pass, route: Route = "engine") -> Memory:
    """Memory of a step whose largest pass is `part`.

    Errors: whatever a model raises that cannot be computed with without its numbers.
    """
    model = bare.model()
    section = bare.section(model)
    known, autocast = _without_pass(model, bare), autocast_dtype(model, section)
    if route != "plain":
        adopt(model)
    found = rehearse(
        model,
        part,
        route,
        device=bare.device,
        autocast=autocast,
        quantized=bare.quantized,
        checkpointing=section.activation_checkpointing,
        seed=section.seed if bare.recipe.method.dropout > 0 else None,
        engine=bare.recipe.engine.model_copy(update={"compile": False}),
    )
    return replace(known, rehearsal=found)


def optimizer_bytes(parameters: Sequence[nn.Parameter], optimizer: str) -> int:
    """What the optimizer remembers of these parameters."""
    moments = MOMENTS_IN_8_BITS.get(optimizer)
    if moments is None:
        return sum(2 * parameter.nbytes for parameter in parameters)
    counts = [parameter.numel() for parameter in parameters]
    return moments * sum(n + 4 * math.ceil(n / BLOCK) if n >= IN_8_BITS else 4 * n for n in counts)


def _without_pass(model: Any, bare: Bare) -> Memory:
    """All that a pass has no part in."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    full = whole(bare.recipe.method.kind)
    size_of_trained = sum(parameter.nbytes for parameter in trained)
    return Memory(
        weights=quantize.bytes_of([p for p in model.parameters() if full or not p.requires_grad]),
        adapter=0 if full else size_of_trained,
        gradients=size_of_trained,
        optimizer=optimizer_bytes(trained, bare.recipe.train.optimizer),
        table=4 * ((1 << TABLE_BITS) + WIDEST) if bare.recipe.method.dropout > 0 else 0,
        libraries=LIBRARIES.get(bare.device, 0),
    )


def _rehearsed(bare: Bare, part: Pass, route: Route, noted: list[str]) -> Rehearsal | None:
    try:
        return memory(bare, part, route).rehearsal
    except Exception as error:  # a model may look at its numbers, of which there are none
        said = (str(error).strip() or type(error).__name__).partition("\n")[0]
        noted.append(f"what a pass takes: this model cannot be computed with without its numbers ({said})")
        return None


def _affordable(found: Rehearsal, part: Pass, free: int) -> int:
    """Tokens of a pass that training would settle on (budget.py), from what one of another size takes."""
    a_token = (found.kept + found.backward) / part.ids.size
    return max(1, int(SHARE * max(free, 0) / a_token))


# -- what goes through the model ---------------------------------------------------------------------------------------


class _Passes:
    """The passes of a run: of its own rows, or of rows of data.max_length where there are none to read."""

    def __init__(self, bare: Bare, data: Data | None, order: Order | None, model: Any) -> None:
        self.bare, self.order, self.route = bare, order, _route(model, bare.recipe.engine)
        section = bare.recipe.data
        self.examples: Any = data.train if data else _Assumed(section.max_length)
        self.border, self.words = rotary_border(model), int(base_of(model).config.get_text_config().vocab_size)
        self.virtual = virtual_of(model).tokens * virtual_of(model).columns

    def rows(self) -> list[np.ndarray]:
        """Those of the steps with the most tokens, the most first."""
        if self.order is None:
            return [np.arange(self.bare.recipe.train.batch)]
        every = (self.order.rows(step) for step in range(min(self.order.steps_per_epoch, MOST_STEPS)))
        return heapq.nlargest(LOOKED_AT, every, key=lambda rows: int(self.examples.lengths[rows].sum()))

    def largest(self, tokens: int) -> Pass:
        """The largest pass of at most `tokens`, if no row is longer."""
        steps = self.rows()
        if self.order is None:
            steps = [steps[0][: max(1, tokens // self.bare.recipe.data.max_length)]]
        if self.route == "plain":
            cut = padded_passes(self.examples, steps[0], tokens, 0, self.border, self.virtual)
        else:
            shared = self.order is not None and self.route == "engine" and self.bare.recipe.engine.shared_prefixes
            tokens = max(1, tokens - self.virtual)
            cut = [p for rows in steps for p in passes(self.examples, rows, tokens, self.border, shared)]
        return max(cut, key=lambda part: part.ids.size)

    def proof_bytes(self, free: int) -> int:
        """Of the reference's logits, where the proof would compute them: else only two rows' loss is compared."""
        drawn = self.rows()[0] if self.order is None else self.order.rows(0)
        places = rows_to_prove(self.examples, drawn, int(PROOF_SHARE * self.examples.lengths[drawn].sum()))
        needed = len(places) * (int(self.examples.lengths[places].max()) + self.virtual) * self.words * LOGITS
        return needed if needed <= free / 2 else 0


class _Assumed:
    """Rows of one length, as many as are asked for, every token taught. All alike: they are never said to share one."""

    def __init__(self, length: int) -> None:
        self.lengths = np.broadcast_to(np.int64(length), 1 << 20)
        self.row = Example(np.zeros(length, np.int64), np.ones(length, bool))

    def __getitem__(self, _: int) -> Example:
        return self.row


def _route(model: Any, engine: EngineSection) -> Route:
    try:
        adopt(model)
    except CannotPackError:
        return "plain"
    return "plain" if not engine.packed else "engine" if engine.chunked_loss else "own_logits"


# -- what the recipe names ---------------------------------------------------------------------------------------------


def _stored(path: Path, unknown: list[str]) -> torch.dtype | str:
    """The format of the weights: of the files where they are there, else as config.json says."""
    if any((path / name).is_file() for name in ("model.safetensors", "pytorch_model.bin")):
        return open_weights(path).dtype
    config = read_config(path)
    said = str(config.get("dtype") or config.get("torch_dtype") or "").removeprefix("torch.")
    known = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES.values()}
    if said not in known:
        unknown.append("the format of the weights, which config.json does not say: fp32 is assumed")
    return known.get(said, torch.float32)


def _data(recipe: Recipe, path: Path, unknown: list[str], say: Say) -> Data | None:
    """The rows of the recipe; None, with the reason in `unknown`, where tokenizer or data are not there."""
    assumed = f"rows of data.max_length ({recipe.data.max_length:,} tokens) are assumed"
    if not any((path / name).is_file() for name in TOKENIZER_FILES):
        unknown.append(f"the data: {path} holds no tokenizer; {assumed}")
        return None
    sources = [recipe.data.train] if isinstance(recipe.data.train, str) else recipe.data.train
    for source in [*sources, *([recipe.data.eval] if isinstance(recipe.data.eval, str) else [])]:
        name = source if isinstance(source, str) else source.path
        if not name.startswith(("hf:", "modelscope:")) and not Path(name).exists():
            unknown.append(f"the data: there is no {name}; {assumed}")
            return None
    try:
        return prepare(recipe.data, Encoder(load_tokenizer(path), recipe.data, date.today()), say)
    except HubError as error:
        unknown.append(f"the data: {error}; {assumed}")
        return None


def _tokens(data: Data, order: Order, steps: int) -> int:
    """Of the whole run: an epoch's rows are drawn by weight, so whole epochs are exact."""
    epochs = steps // order.steps_per_epoch
    lengths = data.train.lengths
    an_epoch = sum(int(lengths[order.rows(step)].sum()) for step in range(order.steps_per_epoch)) if epochs else 0
    last = range(epochs * order.steps_per_epoch, steps)
    return epochs * an_epoch + sum(int(lengths[order.rows(step)].sum()) for step in last)


def _disk(bare: Bare, model: Any, known: Memory, steps: int | None, order: Order | None) -> dict[str, int]:
    """Bytes: what one result, one checkpoint, all that are kept, and a merged model take (room.py measures it)."""
    section, full = bare.recipe.train, whole(bare.recipe.method.kind)
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    beside = sum(file.stat().st_size for file in bare.path.glob("token*"))
    result = (known.weights if full else saved_bytes(model)) + beside
    state = known.optimizer + GENERATORS + ENTRIES * sum(len(name) + ENTRY for name in names)
    checkpoint = result + state + (0 if full else known.adapter)
    period = section.save_every if isinstance(section.save_every, int) else order.steps_per_epoch if order else None
    saves = math.ceil(steps / period) if steps and period else None
    most = saves if section.keep == "all" else min(saves or section.keep + 1, section.keep + 1)
    disk = {"model" if full else "adapter": result, "a checkpoint": checkpoint}
    if most is not None:
        disk[f"checkpoints at most, {most}"] = most * checkpoint
    if not full and METHODS[bare.recipe.method.kind].merges:
        base = [p for name, p in model.named_parameters() if "default" not in name.split(".")]  # PEFT's, of an adapter
        numbers = sum(quantize.numbers(parameter) for parameter in base)
        width = DTYPES.get(bare.recipe.merge.dtype, bare.dtype).itemsize
        disk["merged model"] = numbers * width
    return disk

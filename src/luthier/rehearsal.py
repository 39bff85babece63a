"""A model without its numbers, carried through a pass of training: what the pass would hold in memory.

The engine's own forward and backward run over tensors that have a shape and a format and no memory. Every storage is
followed from its birth to its end, so nothing here knows a family: what autograd keeps, what activation checkpointing
computes again, how large a chunk of the loss or a dequantised weight is, all comes out as it would in the run itself.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lycoris_utils import LycorisLayer
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from luthier.data.pack import Pass, behind
from luthier.engine import dropout, frozen_head, loss
from luthier.engine.forward import DevicePass, Route, SummedLoss, base_of, on_device
from luthier.engine.rungs import rungs, without_layers
from luthier.engine.soft import virtual_of
from luthier.errors import ModelError
from luthier.models import families, quantize
from luthier.models.load import read_config
from luthier.sections import EngineSection, Quantization
from luthier.training.start import recompute_activations

ROUNDS = 2
"""Steps of one pass that are rehearsed: the second finds the heap as the first left it."""
PIECE = {"cpu": 1 << 20, "cuda": 1 << 62}
"""Elements of a dropout mask at once. On the CPU eight times what it takes, 4 MiB: a rehearsal is slow by the piece."""
ALIGNED = 64
"""Bytes to which torch aligns a tensor on the CPU."""
LOOKED_AT = 1 << 16
"""Bytes of a block after which the heap is looked at: to look takes longer than to take a small one."""
BLOCK = {"absmax": 64, "second": 256}
"""Numbers that share a scale in NF4, and scales that share one under double quantisation."""


@dataclass(frozen=True)
class Rehearsal:
    """Bytes, beyond weights, gradients and the dropout's table.

    kept: by the forward pass for the backward pass; forward, backward: what either needs at most beside that; holes:
    of the C library's heap, room that is free but in pieces too small to be used again (CPU with glibc; else 0).
    """

    kept: int
    forward: int
    backward: int
    holes: int


def bare_model(
    path: Path, dtype: torch.dtype, *, vendor_code: bool = False, quantized: Quantization | None = None
) -> PreTrainedModel:
    """The model of a folder's config.json on torch's meta device; its files of weights need not be there.

    Errors: ModelError where transformers cannot build it.
    """
    families.register()
    try:
        config = AutoConfig.from_pretrained(path.absolute(), local_files_only=True, trust_remote_code=vendor_code)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=vendor_code)
    except Exception as error:  # a configuration is checked by whatever its fields are typed with
        said = (str(error).strip() or type(error).__name__).partition("\n")[0].rstrip(". :")
        raise ModelError(f"{path}: a model of its config.json cannot be built ({said})") from error
    families.settle(model, read_config(path))
    if quantized is not None:
        for module in model.modules():
            if type(module) is nn.Linear and module is not model.get_output_embeddings():
                _quantise(module, quantized, dtype)
    return model


def rehearse(
    model: Any,
    part: Pass,
    route: Route,
    *,
    device: str = "cpu",
    autocast: torch.dtype | None = None,
    quantized: Quantization | None = None,
    checkpointing: bool = False,
    seed: int | None = None,
    engine: EngineSection = EngineSection(),  # noqa: B008 - it is frozen
) -> Rehearsal:
    """Carry an adapted bare model through forward and backward of a pass. `model` is of no other use afterwards.

    `device`: "cpu" or "cuda", whose chunks of the loss are other ones; `seed`: of the dropout, None for none;
    `engine`: what the layers and the attention are.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    _materialise(model, mode)
    if quantized is not None:
        target = torch.device("cpu")  # what computes: a GPU's fp16 is as wide as the CPU's bf16
        quantize.settle(model, quantize.arithmetic(quantized, target))
    if checkpointing:
        recompute_activations(model)
    model.train()
    for module in model.modules():
        if isinstance(module, LycorisLayer):
            module.training = False  # LoHa, LoKr: else they would look at a number that is drawn, though nothing drops
    part = behind(part, virtual_of(model))
    given = _faked(on_device(part, torch.device("cpu"), seed, fast_attention=engine.fast_attention), mode)
    layers = without_layers(engine) if route == "plain" else engine
    layers = layers.model_copy(update={"fp32_products": layers.fp32_products and device == "cpu"})
    with (
        rungs(model, layers),
        mode,
        _pieces_of(device),
        dropout.keyed(model, seed) if seed is not None else nullcontext(),
    ):
        if seed is not None:
            with torch.no_grad():
                SummedLoss(model, route)(given)  # makes the dropout's table
        known = [*model.parameters(), *model.buffers(), *_tables(model)]
        heap = _Heap() if device == "cpu" else None
        watch = _Watch(known, heap)
        with watch:
            for _ in range(ROUNDS):
                model.zero_grad()
                start = watch.peak = watch.live
                with torch.autocast("cpu", autocast, enabled=autocast is not None):
                    value = SummedLoss(model, route)(given)
                kept, forward = watch.live - start, watch.peak - watch.live
                watch.peak = watch.live
                torch.autograd.backward(value)
                del value
                gradients = watch.live - start
                backward = max(0, watch.peak - start - kept - gradients)
    most = start + gradients + kept + max(forward, backward)
    return Rehearsal(kept, forward, backward, max(0, heap.high - most) if heap is not None else 0)


# -- tensors without memory --------------------------------------------------------------------------------------------


def _quantise(module: nn.Linear, asked: Quantization, dtype: torch.dtype) -> None:
    """Put in the weight's place what bitsandbytes would hold, in size and format."""
    rows, columns = module.weight.shape
    if asked.kind == "int8":
        weight: Any = nn.Parameter(torch.empty(rows, columns, dtype=torch.int8, device="meta"), requires_grad=False)
        weight.SCB = torch.empty(rows, device="meta")
    else:
        count = rows * columns
        packed = torch.empty((count + 1) // 2, 1, dtype=torch.uint8, device="meta")
        weight = nn.Parameter(packed, requires_grad=False)
        weight.quant_state = _state(count, (rows, columns), asked.double_quant, dtype)
    module.weight = weight
    if module.bias is not None:
        module.bias.requires_grad_(False)


def _state(count: int, shape: tuple[int, int], nested: bool, dtype: torch.dtype) -> Any:
    from bitsandbytes.functional import QuantState

    blocks = -(-count // BLOCK["absmax"])
    second = None
    if nested:
        scales = torch.empty(-(-blocks // BLOCK["second"]), device="meta")
        second = QuantState(
            scales, code=torch.empty(256, device="meta"), blocksize=BLOCK["second"], dtype=torch.float32
        )
    return QuantState(
        torch.empty(blocks, dtype=torch.uint8 if nested else torch.float32, device="meta"),
        shape=torch.Size(shape),
        code=torch.empty(16, device="meta"),
        blocksize=BLOCK["absmax"],
        quant_type="nf4",
        dtype=dtype,
        offset=torch.empty((), device="meta") if nested else None,
        state2=second,
    )


def _materialise(model: nn.Module, mode: FakeTensorMode) -> None:
    """Every tensor of the meta device becomes one of the fake CPU, which autocast and attention's kernels know."""
    twins: dict[int, Any] = {}

    def twin(tensor: Any) -> Any:
        if id(tensor) not in twins:
            new: Any = torch.empty_like(tensor, device="cpu")
            if isinstance(tensor, nn.Parameter):
                new = nn.Parameter(new, requires_grad=tensor.requires_grad)
            for name in ("SCB", "quant_state"):
                if hasattr(tensor, name):
                    setattr(new, name, _moved(getattr(tensor, name), twin))
            twins[id(tensor)] = new
        return twins[id(tensor)]

    with mode:
        for module in model.modules():
            for held in (module._parameters, module._buffers, vars(module)):
                for name, value in list(held.items()):
                    if isinstance(value, Tensor) and value.device.type == "meta":
                        held[name] = twin(value)


def _moved(value: Any, twin: Any) -> Any:
    """A scale, or bitsandbytes' state of a weight with all its scales."""
    if isinstance(value, Tensor):
        return twin(value)
    for name in ("absmax", "code", "offset", "state2"):
        part = getattr(value, name)
        if part is not None:
            setattr(value, name, _moved(part, twin))
    return value


def _faked(given: DevicePass, mode: FakeTensorMode) -> DevicePass:
    tensors = {
        field.name: mode.from_tensor(getattr(given, field.name))
        for field in fields(given)
        if isinstance(getattr(given, field.name), Tensor)
    }
    keys = given.layout.keys
    layout = given.layout if keys is None else replace(given.layout, keys=mode.from_tensor(keys))
    return replace(given, **tensors, layout=layout)


@contextmanager
def _pieces_of(device: str) -> Iterator[None]:
    """The loss in the chunks of that device, though the tensors claim to be on the CPU; masks in pieces as in PIECE."""
    before = loss.CHUNK["cpu"], frozen_head.LOGITS["cpu"], dropout.PIECE
    loss.CHUNK["cpu"], frozen_head.LOGITS["cpu"] = loss.CHUNK[device], frozen_head.LOGITS[device]
    dropout.PIECE = PIECE[device]
    try:
        yield
    finally:
        loss.CHUNK["cpu"], frozen_head.LOGITS["cpu"], dropout.PIECE = before


def _tables(model: nn.Module) -> list[Tensor]:
    drops = {id(part.table): part for part in model.modules() if isinstance(part, dropout.KeyedDropout)}
    cpu, base = torch.device("cpu"), base_of(model)
    fused = [part.table(part.p, dtype, cpu, False) for part in drops.values() for dtype in {base.dtype, part.dtype}]
    return [*fused, *(part.table(part.p, part.dtype, cpu) for part in drops.values())]


# -- who watches -------------------------------------------------------------------------------------------------------


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of all storages that were made inside and are still held. live, peak: bytes."""

    def __init__(self, known: Iterable[Tensor], heap: _Heap | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.known = [tensor.untyped_storage() for tensor in known]
        self.there = {storage._cdata for storage in self.known}
        self.live, self.peak, self.heap = 0, 0, heap

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in self.there:
                self._born(tensor.untyped_storage())
        return result

    def _born(self, storage: Any) -> None:
        size = storage.nbytes()
        self.there.add(storage._cdata)
        self.live += size
        self.peak = max(self.peak, self.live)
        block = self.heap.take(size) if self.heap is not None else None
        weakref.finalize(storage, self._gone, storage._cdata, size, block).atexit = False

    def _gone(self, key: int, size: int, block: Any) -> None:
        self.there.discard(key)
        self.live -= size
        if self.heap is not None:
            self.heap.give_back(block)


class _Heap:
    """The C library's heap, asked for the very blocks that torch would ask it for; no byte of them is touched.

    glibc takes blocks below 32 MiB from one heap, where a freed block is too short for the next of its size that must
    be aligned, and small blocks beside it pin the rest: of 512 hidden columns and 2,048 tokens 130 MiB are in use and
    500 MiB are taken (measured). No formula tells that, so the same library is asked. high: bytes taken at most.
    """

    def __init__(self) -> None:
        self.high = 0
        try:
            self.library: Any = ctypes.CDLL(None)
            self.library.mallinfo2.restype = _MallInfo
        except (AttributeError, OSError):  # another C library
            self.library = None
            return
        self.library.free.argtypes = [ctypes.c_void_p]
        self.before = self._taken()

    def take(self, size: int) -> Any:
        block = ctypes.c_void_p()
        if self.library is None or not size or self.library.posix_memalign(ctypes.byref(block), ALIGNED, size):
            return None  # there is not so much to address: what is counted is then what is live
        if size >= LOOKED_AT:
            self.high = max(self.high, self._taken() - self.before)
        return block

    def give_back(self, block: Any) -> None:
        if block is not None:
            self.library.free(block)

    def _taken(self) -> int:
        info = self.library.mallinfo2()
        return int(info.arena + info.hblkhd)


class _MallInfo(ctypes.Structure):
    """mallinfo2(3). arena: the heap's bytes; hblkhd: those of blocks that are mapped one by one."""

    _fields_ = [
        ("arena", ctypes.c_size_t),
        *((name, ctypes.c_size_t) for name in ("ordblks", "smblks", "hblks")),
        ("hblkhd", ctypes.c_size_t),
        *((name, ctypes.c_size_t) for name in ("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")),
    ]

"""The same rows of a run either way: padded through transformers and PEFT, as a user would, and through the engine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from luthier.data.pack import Pass, behind, pack, pad, passes
from luthier.engine import dropout
from luthier.engine.forward import DevicePass, SummedLoss, base_of, inputs_of, on_device, rotary_border
from luthier.engine.memory import is_full
from luthier.engine.soft import virtual_of
from luthier.errors import ModelError
from luthier.sections import EngineSection

if TYPE_CHECKING:
    from luthier.data.examples import Examples

NOT_ONE = -100
"""transformers' label of what is not taught."""

Way = Literal["reference", "engine", "own_logits"]


@dataclass(frozen=True)
class Bench:
    """Computes the same rows either way."""

    model: Any
    examples: Examples
    pad_id: int
    device: torch.device
    autocast: torch.dtype | None
    seed: int | None
    scale: float
    engine: EngineSection

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        return {name: value for name, value in self.model.named_parameters() if value.requires_grad}

    def places(self, rows: np.ndarray) -> int:
        """Of these rows padded, virtual tokens included."""
        return len(rows) * (int(self.examples.lengths[rows].max()) + virtual_of(self.model).tokens)

    def first(self, rows: np.ndarray) -> tuple[float, bool]:
        """The reference for the first time, and whether torch's random numbers moved on by it.

        Errors: ModelError where the model does not take what it is given.
        """
        before = _random_states(self.device)
        try:
            loss = self.value("reference", rows)
        except TypeError as error:
            name = type(base_of(self.model)).__name__
            raise ModelError(f"{name} does not take what a transformers model is given in training: {error}") from error
        after = _random_states(self.device)
        return loss, any(not torch.equal(*pair) for pair in zip(before, after, strict=True))

    def logits_bytes(self, rows: np.ndarray) -> int:
        """Of the reference: the logits, their copy in fp32, its softmax and the gradient are three fp32 in all."""
        return self.places(rows) * int(base_of(self.model).config.get_text_config().vocab_size) * 12

    def leak(self, rows: np.ndarray) -> float:
        """How far the hidden states of a row move, by their spread, when the ids of its neighbours in the pass do."""
        part = pack(self.examples, [int(rows[0]), int(rows[-1]), int(rows[0])])
        start, stop, _ = part.segments[1]
        virtual = virtual_of(self.model)
        moved_by = virtual.tokens if virtual.columns else 0
        places = np.arange(part.ids.size)
        others = np.where((places < start) | (places >= stop), part.ids.max() - part.ids, part.ids)
        states = []
        for each in (part, replace(part, ids=others)):
            pass_ = self._on_device(each)
            dropout.set_keys(self.model, pass_.layout.keys)
            with torch.no_grad(), torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None):
                hidden = base_of(self.model).get_decoder()(**inputs_of(self.model, pass_)).last_hidden_state
            states.append(hidden[0, start + moved_by : stop + moved_by].float())
        moved: Tensor = (states[0] - states[1]).abs().max() / states[0].std()
        return moved.item()

    def loss(self, way: Way, rows: np.ndarray) -> Tensor:
        """Mean over the supervised tokens of these rows."""
        total = torch.zeros((), device=self.device)
        for part in self.passes(way, rows):
            given = part if way != "reference" else pad(self.examples, part.rows, self.pad_id)
            on = self._on_device(given)
            with torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None):
                total = total + (
                    reference_loss(self.model, on) if way == "reference" else SummedLoss(self.model, way)(on)
                )
        return total / int(self.examples.supervised[rows].sum())

    def shares(self, rows: np.ndarray) -> bool:
        """Is anything of these rows' beginnings computed once for several?"""
        return any(segment.parent >= 0 for part in self.passes("engine", rows) for segment in part.segments)

    def passes(self, way: Way, rows: np.ndarray) -> list[Pass]:
        """All of them in one pass, or in two where rotary frequencies differ."""
        shared = way == "engine" and self.engine.shared_prefixes
        return passes(self.examples, rows, int(self.examples.lengths[rows].sum()), rotary_border(self.model), shared)

    def _on_device(self, part: Pass) -> DevicePass:
        given = behind(part, virtual_of(self.model))
        return on_device(given, self.device, self.seed, fast_attention=self.engine.fast_attention)

    def value(self, way: Way, rows: np.ndarray) -> float:
        with torch.no_grad():
            return self.loss(way, rows).item()

    def gradients(self, way: Way, rows: np.ndarray) -> tuple[float, dict[str, Tensor]]:
        """The loss, and every gradient on the CPU, so that the device holds one set at a time.

        Where fp16 overflows at the loss scale, without one: nothing is trained here.
        """
        loss, found = self._gradients(way, rows, self.scale)
        if self.scale > 1 and not all(bool(value.isfinite().all()) for value in found.values()):
            return self._gradients(way, rows, 1.0)
        return loss, found

    def _gradients(self, way: Way, rows: np.ndarray, scale: float) -> tuple[float, dict[str, Tensor]]:
        loss = self.loss(way, rows)
        torch.autograd.backward(loss * scale)
        found = {}
        for name, parameter in self.parameters.items():
            value = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            found[name] = value.cpu() / scale
            parameter.grad = None
        return loss.item(), found

    def gradients_if_room(self, way: Way, rows: np.ndarray) -> tuple[float, dict[str, Tensor]] | None:
        try:
            return self.gradients(way, rows)
        except RuntimeError as error:
            if not is_full(error):
                raise
            self.model.zero_grad()
            return None


def reference_loss(model: Any, pass_: DevicePass) -> Tensor:
    """Summed loss of a padded pass by transformers itself (through PEFT where there is an adapter): a scalar.

    PEFT puts virtual tokens before the rows itself, and counts positions: it gets the rows without either.
    """
    dropout.set_keys(model, pass_.layout.keys)
    labels = torch.full_like(pass_.ids, NOT_ONE).flatten()
    labels[pass_.supervised + 1] = pass_.targets  # labels name the token itself, targets the next one
    labels = labels.view_as(pass_.ids)
    virtual = virtual_of(model)
    if not virtual.tokens:
        loss: Tensor = model(**inputs_of(model, pass_), labels=labels).loss
        return loss * len(pass_.targets)
    start = virtual.tokens if virtual.columns else 0
    ids, mask, labels = (x[:, start:] for x in (pass_.ids, pass_.mask, labels))
    with _keeping_activations(model):
        loss = model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=not virtual.columns).loss
    return loss * len(pass_.targets)


@contextmanager
def _keeping_activations(model: Any) -> Iterator[None]:
    """Inside, nothing is computed again in the backward pass: PEFT's prefix is a cache, which transformers would leave
    out without an error."""
    held = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
    for module in held:
        module.gradient_checkpointing = False
    try:
        yield
    finally:
        for module in held:
            module.gradient_checkpointing = True


def _random_states(device: torch.device) -> list[Tensor]:
    """Of torch's generators that a model on this device may draw from."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]

"""Bottleneck adapters (Houlsby et al. 2019, arXiv:1902.00751), for any family: y + up(gelu(down(y))).

y is what a block adds to the residual stream, before a norm that stands behind the block (Gemma 2): "houlsby" adapts
attention and feed-forward, "pfeiffer" the feed-forward alone (Pfeiffer et al. 2021, arXiv:2005.00247). The adapter
stands around the linear layer that ends the block, so nothing is hooked, and a quantised layer below it computes as
ever. `up` begins with zeros: before step 1 the model is the base, to the last bit.

It cannot be merged: there is a non-linearity in it, and no linear layer computes that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import PeftType
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from luthier.models import ownmethods

KIND = "bottleneck"
LINEAR = (nn.Linear, Conv1D)
"""Conv1D is one, stored transposed (GPT-2)."""


@dataclass
class BottleneckConfig(PeftConfig):  # type: ignore[misc]
    """adapter_config.json. size: width of the narrow layer; dropout: share of y that the narrow layer does not see;
    placement: what target_modules came from, for readers."""

    size: int = 64
    dropout: float = 0.0
    placement: str = "pfeiffer"
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None  # PEFT asks every configuration for these four
    modules_to_save: list[str] | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType["BOTTLENECK"]


def config_of(model: PreTrainedModel, method: Any) -> BottleneckConfig:
    """For a model as it was loaded; `get_peft_model(model, config)` attaches the adapters.

    method: size, placement ("houlsby", "pfeiffer"), dropout. Errors: ModelError where blocks end in no linear layer
    (experts).
    """
    ends = list(block_ends(model))
    names = [name for end in ends for name in (end if method.placement == "houlsby" else end[1:])]
    return BottleneckConfig(
        task_type="CAUSAL_LM",
        size=method.size,
        dropout=method.dropout,
        placement=method.placement,
        target_modules=ownmethods.shortest(model, names),
    )


def block_ends(model: PreTrainedModel) -> Iterator[tuple[str, str]]:
    """For each decoder layer the names of the linear layers that end its attention and its feed-forward.

    Two tokens go through: of the linear layers whose result is the very tensor that a child of the decoder layer gives
    back (or that are such a child, as OPT's), the first one called ends the attention, the last one the feed-forward.
    Neither names nor the order in a class tell it: Phi-3 makes o_proj before qkv_proj. The layers give back zeros
    meanwhile: whose tensor it is counts, and so it costs nothing on quantised weights and needs none on "meta".
    """
    called: dict[str, Tensor] = {}
    given: dict[str, list[Tensor]] = {}

    def linear(name: str, width: int, x: Tensor) -> Tensor:
        called[name] = x.new_zeros(*x.shape[:-1], width)
        return called[name]

    def child(name: str, module: nn.Module, args: Any, out: Any) -> None:
        given.setdefault(name, []).append(out[0] if isinstance(out, tuple) else out)

    layers = ownmethods.decoder_layers(model, KIND)
    inside = {f"{name}.{part}": module for name, layer in layers.items() for part, module in layer.named_modules()}
    linears: dict[str, Any] = {name: module for name, module in inside.items() if isinstance(module, LINEAR)}
    before = {module: vars(module).get("forward") for module in linears.values()}
    hooks = [
        module.register_forward_hook(partial(child, name))
        for name, layer in layers.items()
        for module in layer.children()
    ]
    try:
        for name, module in linears.items():
            module.forward = partial(linear, name, _width(module))
        _two_tokens(model)
    except TypeError as error:  # it takes other arguments than a decoder with positions does
        raise ownmethods.refused(model, KIND, f"{type(model).__name__} cannot be tried on two tokens") from error
    finally:
        for hook in hooks:
            hook.remove()
        for module, own in before.items():
            vars(module).pop("forward", None)
            if own is not None:
                module.forward = own
    for name in layers:
        results = {id(out) for out in given.get(name, [])}
        ends = [part for part, out in called.items() if part.startswith(f"{name}.") and id(out) in results]
        if len(ends) < 2:
            block = type(layers[name]).__name__
            raise ownmethods.refused(model, KIND, f"attention and feed-forward of {block} must each end in one layer")
        yield ends[0], ends[-1]


def _two_tokens(model: Any) -> None:
    trains = {module: module.training for module in model.modules()}
    device = next(model.parameters()).device
    ids, places = torch.zeros(1, 2, dtype=torch.long, device=device), torch.arange(2, device=device)[None]
    mask = torch.ones(1, 1, 2, 2, dtype=torch.bool, device=device)  # its own would look at numbers: none on "meta"
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            model.eval()(input_ids=ids, attention_mask=mask, position_ids=places, use_cache=False)
    finally:
        for module, training in trains.items():
            module.training = training


def _width(layer: Any) -> int:
    """Columns that a linear layer gives back."""
    width: int = layer.nf if isinstance(layer, Conv1D) else layer.out_features
    return width


class Bottleneck(nn.Module, BaseTunerLayer):  # type: ignore[misc]
    """A linear layer and, behind it, a bottleneck for each adapter. x: [..., in]; result: [..., out], in the base's
    dtype; the adapter computes in its own (fp32)."""

    adapter_layer_names = ("bottleneck_down", "bottleneck_up")
    other_param_names = ("bottleneck_dropout",)
    get_base_layer: Callable[[], Any]  # BaseTunerLayer's, which has no types
    set_adapter: Callable[..., None]
    active_adapters: list[str]
    disable_adapters: bool
    _move_adapter_to_device_of_base_layer: Callable[[str], None]

    def __init__(self, base_layer: nn.Module, adapter: str, config: BottleneckConfig) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.bottleneck_down, self.bottleneck_up = nn.ModuleDict(), nn.ModuleDict()
        self.bottleneck_dropout = nn.ModuleDict()
        self.merged_adapters: list[str] = []
        self._disable_adapters, self._active_adapter = False, adapter
        self.cast_input_dtype_enabled = True
        self.update_layer(adapter, config)

    def update_layer(self, adapter: str, config: BottleneckConfig) -> None:
        base = self.get_base_layer()
        width = _width(base)
        down, up = nn.Linear(width, config.size), nn.Linear(config.size, width)
        nn.init.zeros_(up.weight)
        nn.init.zeros_(up.bias)
        self.bottleneck_down[adapter], self.bottleneck_up[adapter] = down, up
        self.bottleneck_dropout[adapter] = nn.Dropout(config.dropout) if config.dropout else nn.Identity()
        self._move_adapter_to_device_of_base_layer(adapter)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    @property
    def luthier_dropout(self) -> tuple[nn.ModuleDict, nn.ModuleDict]:
        """For engine/dropout.py: the dropout of each adapter, which may be replaced, and the layers that read it."""
        return self.bottleneck_dropout, self.bottleneck_down

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y: Tensor = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return y
        for adapter in self.active_adapters:
            if adapter in self.bottleneck_down:
                down, up = self.bottleneck_down[adapter], self.bottleneck_up[adapter]
                seen = self.bottleneck_dropout[adapter](y).to(down.weight.dtype)
                y = y + up(F.gelu(down(seen))).to(y.dtype)
        return y


class BottleneckModel(BaseTuner):  # type: ignore[misc]
    """PEFT's tuner: where the adapters go is in the configuration."""

    prefix = "bottleneck_"
    tuner_layer_cls = Bottleneck
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012 - as in BaseTuner

    def _create_and_replace(
        self, config: BottleneckConfig, adapter: str, target: Any, name: str, parent: Any, current_key: str
    ) -> None:
        if isinstance(target, Bottleneck):
            target.update_layer(adapter, config)
            return
        new = Bottleneck(target, adapter, config)
        if adapter not in self.active_adapters:
            new.requires_grad_(False)
        self._replace_module(parent, name, new, target)


ownmethods.register(KIND, BottleneckConfig, BottleneckModel)

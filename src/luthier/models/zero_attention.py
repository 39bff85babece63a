"""LLaMA-Adapter (Zhang et al. 2023, arXiv:2303.16199), for any family: prompts that a layer's attention also looks at.

In the last layers every token attends to P learned vectors as well, by a softmax of their own, and what they say is
added to the attention's result times a gate that begins at zero: before step 1 the model is the base, to the last bit.
The prompts' keys and values come from the layer's own projections (and its norm of the keys). They stand nowhere in the
row: so they have no rotary position, no window hides them, and Yuan2's filter, which is over neighbours, is left out.
Gemma 2's soft cap is over their scores too.

It acts inside the attention that Luthier registers (engine/attention.py: `luthier_beside`), packed or not, with a cache
or without: attaching sets the model's attention to that. It cannot be merged: no weight of the base computes it.

Shapes: B rows, H query heads, K key heads, L places, E head size, P prompts, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import PeftType
from torch import Tensor, nn
from transformers import PreTrainedModel

from luthier.engine import attention
from luthier.errors import ModelError
from luthier.models import ownmethods

KIND = "llama_adapter"
VIRTUAL_TOKENS = 20
"""P where the recipe does not say: twice the paper's. Of the quickstart's held-out rows 48 to 50 % come right with
20, and 46 % with 10."""
LEFT_OUT = 1 / 16
"""Share of the layers, the first ones, without prompts where the recipe does not say: the paper's 2 of 32. With the
upper 2 alone of the quickstart's 4 layers 4 % came right."""
KNOWN = frozenset({"q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "out_proj", "q_norm", "k_norm", "lf_gate"})
"""What an attention may consist of. One with other parts makes its keys in a way that is not known here."""


@dataclass
class ZeroAttentionConfig(PeftConfig):  # type: ignore[misc]
    """adapter_config.json. virtual_tokens: P; target_modules: the attentions that have prompts."""

    virtual_tokens: int = VIRTUAL_TOKENS
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None  # PEFT asks every configuration for these four
    modules_to_save: list[str] | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType["ZERO_ATTENTION"]


def config_of(model: PreTrainedModel, method: Any) -> ZeroAttentionConfig:
    """For a model as it was loaded; `get_peft_model(model, config)` attaches the prompts.

    method: virtual_tokens (None: 20) and layers, the last so many (None: all but a sixteenth, rounded down). Errors:
    ModelError where the model has fewer layers, or an attention that takes none.
    """
    layers = ownmethods.decoder_layers(model, KIND)
    count = len(layers) - int(len(layers) * LEFT_OUT) if method.layers is None else method.layers
    if count > len(layers):
        raise ModelError(f"method.layers: {count} are more than the model has ({len(layers)}); lower it")
    names = [_attention_in(model, name, layer) for name, layer in list(layers.items())[-count:]]
    return ZeroAttentionConfig(
        task_type="CAUSAL_LM",
        virtual_tokens=VIRTUAL_TOKENS if method.virtual_tokens is None else method.virtual_tokens,
        target_modules=ownmethods.shortest(model, names),
    )


def _attention_in(model: PreTrainedModel, layer_name: str, layer: nn.Module) -> str:
    if not model._can_set_attn_implementation():
        raise ownmethods.refused(model, KIND, f"{type(model).__name__} has an attention of its own")
    for name, module in layer.named_children():
        parts = set(module._modules)
        if {"k_proj", "v_proj"} <= parts or "qkv_proj" in parts:
            if unknown := sorted(parts - KNOWN):
                raise ownmethods.refused(model, KIND, f"{type(module).__name__} has a {unknown[0]}, not known here")
            return f"{layer_name}.{name}"
    raise ownmethods.refused(model, KIND, f"{layer_name} has no attention with projections of keys and values")


class ZeroAttention(nn.Module, BaseTunerLayer):  # type: ignore[misc]
    """An attention and what stands beside it. prompt: [1, P, D]; gate: [1, 1], one a layer as in PEFT's
    AdaptionPrompt (a matrix, so that the proof before step 1 stirs it: at zero, prompts have no gradient)."""

    adapter_layer_names = ("zero_attention_prompt", "zero_attention_gate")
    get_base_layer: Callable[[], Any]  # BaseTunerLayer's, which has no types
    set_adapter: Callable[..., None]
    active_adapters: list[str]
    disable_adapters: bool
    _move_adapter_to_device_of_base_layer: Callable[[str, torch.device], None]

    def __init__(self, base_layer: nn.Module, adapter: str, config: ZeroAttentionConfig) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.zero_attention_prompt, self.zero_attention_gate = nn.ParameterDict(), nn.ParameterDict()
        self.merged_adapters: list[str] = []
        self._disable_adapters, self._active_adapter = False, adapter
        base_layer.__dict__["luthier_beside"] = self.beside  # not as a child: the base would contain what contains it
        self.update_layer(adapter, config)

    def update_layer(self, adapter: str, config: ZeroAttentionConfig) -> None:
        base = self.get_base_layer()
        width = (base.qkv_proj if hasattr(base, "qkv_proj") else base.k_proj).in_features
        self.zero_attention_prompt[adapter] = nn.Parameter(torch.randn(1, config.virtual_tokens, width))
        self.zero_attention_gate[adapter] = nn.Parameter(torch.zeros(1, 1))
        self._move_adapter_to_device_of_base_layer(adapter, next(base.parameters()).device)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.base_layer(*args, **kwargs)

    def beside(self, query: Tensor, scaling: float | None) -> Tensor:
        """What is added to the attention's result [B, L, H, E]: of that shape, or one zero where nothing is active.

        query: [B, H, L, E], as the attention itself has it, rotated.
        """
        out = query.new_zeros(())
        if self.disable_adapters:
            return out
        module = self.get_base_layer()
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        cap = getattr(module, "attn_logit_softcapping", None)
        for adapter in self.active_adapters:
            if adapter not in self.zero_attention_prompt:
                continue
            key, value = keys_and_values(module, self.zero_attention_prompt[adapter].to(query.dtype))
            key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
            scores = query @ key.transpose(-1, -2) * scale  # [B, H, L, P]
            if cap is not None:
                scores = cap * torch.tanh(scores / cap)
            weights = self.zero_attention_gate[adapter] * F.softmax(scores, dim=-1, dtype=torch.float32)
            out = out + (weights.to(value.dtype) @ value).transpose(1, 2)
        return out


def keys_and_values(module: Any, prompt: Tensor) -> tuple[Tensor, Tensor]:
    """prompt: [1, P, D] → keys and values of an attention of transformers' or of Yuan2's: [1, K, P, E] each."""
    size = module.head_dim
    if hasattr(module, "qkv_proj"):  # Phi-3: the rows of query, key and value
        joined = module.qkv_proj(prompt)
        width = module.config.num_key_value_heads * size
        key, value = joined[..., -2 * width : -width], joined[..., -width:]
    else:
        value = module.v_proj(prompt)
        if hasattr(module, "lf_gate"):  # Yuan2: each head's query and key are a slice of q_proj and k_proj put together
            both = torch.cat((module.q_proj(prompt), module.k_proj(prompt)), dim=-1)
            key = both.view(*both.shape[:-1], -1, 2, size)[..., 1, :].flatten(-2)
        else:
            key = module.k_proj(prompt)
    norm = getattr(module, "k_norm", None)
    if norm is not None and norm.weight.shape == key.shape[-1:]:  # OLMo 2: over all heads at once
        key, norm = norm(key), None
    key, value = (x.view(*x.shape[:-1], -1, size) for x in (key, value))
    if norm is not None:
        key = norm(key)
    return key.transpose(1, 2), value.transpose(1, 2)


class ZeroAttentionModel(BaseTuner):  # type: ignore[misc]
    """PEFT's tuner: which attentions have prompts is in the configuration."""

    prefix = "zero_attention_"
    tuner_layer_cls = ZeroAttention
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012 - as in BaseTuner

    def _create_and_replace(
        self, config: ZeroAttentionConfig, adapter: str, target: Any, name: str, parent: Any, current_key: str
    ) -> None:
        if isinstance(target, ZeroAttention):
            target.update_layer(adapter, config)
            return
        new = ZeroAttention(target, adapter, config)
        if adapter not in self.active_adapters:
            new.requires_grad_(False)
        self._replace_module(parent, name, new, target)

    def _replace_module(self, parent: Any, name: str, new: nn.Module, old: nn.Module) -> None:
        """BaseTuner's wants a weight, which an attention has not. `new` is the attention itself where PEFT unloads."""
        setattr(parent, name, new)
        if not isinstance(new, ZeroAttention):
            new.__dict__.pop("luthier_beside", None)

    def _post_injection_hook(self, model: Any, config: ZeroAttentionConfig, adapter: str) -> None:
        """From here on, for training, answers and whatever else: no other attention asks what stands beside it."""
        model.set_attn_implementation(attention.register())


ownmethods.register("zero_attention", ZeroAttentionConfig, ZeroAttentionModel)

"""Soft prompts as the engine takes them: PEFT's own parameters, never PEFT's own forward.

PEFT's forward drops positions (prompt and P-tuning) and makes a cache of keys and values (prefix tuning), with which
activations cannot be computed again in the backward pass. Here virtual tokens are the first segment of a pass, and a
prefix travels in its Layout: `data.pack.behind` makes room for either.

Shapes: V virtual tokens, D width of the embeddings, K key heads, E head size.
"""

from __future__ import annotations

from typing import Any

from peft import PeftModel, PeftType
from torch import Tensor

from luthier.data.pack import Virtual

COLUMNS = frozenset({PeftType.PROMPT_TUNING, PeftType.P_TUNING})
"""Whose virtual tokens stand in the rows, embedded."""


def virtual_of(model: Any) -> Virtual:
    """The virtual tokens before a model's rows; none where the method has none or the adapter is switched off."""
    if not isinstance(model, PeftModel) or model._adapters_disabled:  # PEFT tells it nowhere else
        return Virtual()
    config: Any = model.active_peft_config
    if not config.is_prompt_learning:
        return Virtual()
    return Virtual(config.num_virtual_tokens, config.peft_type in COLUMNS)


def prompts_of(model: Any) -> Tensor:
    """The embeddings of the virtual tokens, with a gradient: [1, V, D], as PEFT makes them."""
    prompts: Tensor = model.get_prompt(1)
    return prompts


def prefix_of(model: Any) -> tuple[tuple[Tensor, Tensor], ...]:
    """Keys and values of each layer, with a gradient: [1, K, V, E] each, in the base's number format.

    From PEFT's encoder itself: the cache that PEFT makes of it keeps of a windowed layer's only the last ones.
    """
    config, encoder = model.active_peft_config, model.prompt_encoder[model.active_adapter]
    weight = encoder.embedding.weight
    tokens = model.prompt_tokens[model.active_adapter].to(weight.device)
    flat = weight if config.inference_mode else encoder(tokens)  # a saved encoder is its own result
    heads, size = config.num_attention_heads, config.token_dim // config.num_attention_heads
    layers = flat.to(model.get_base_model().dtype).view(-1, config.num_layers, 2, heads, size).permute(1, 2, 3, 0, 4)
    return tuple((key.unsqueeze(0), value.unsqueeze(0)) for key, value in layers)

"""Soft prompts: virtual tokens before every row, trained while the model stays as it is. PEFT's parameters and folders.

They live or die by where they start. A prompt starts from the embeddings of real tokens; a prefix from the keys and
values that real tokens have in this model, never from PEFT's random normal ones, which are far from any that its
attention has seen. P-tuning's encoder starts with tokens as large as embeddings, and with weights larger than PEFT's.

Shapes: B rows, L places, V virtual tokens, D width of the embeddings, K key heads, E head size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from peft import PeftConfig, PeftModel, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model
from peft.tuners.cartridge.utils import initialize_kv_prefix_from_past_key_values
from peft.utils import TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING as CACHES
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerFast

from luthier.data.subwords import Subwords
from luthier.engine.soft import prefix_of, prompts_of, virtual_of
from luthier.errors import ModelError, RecipeError
from luthier.models.load import Say, window_of
from luthier.models.yuan2 import YuanConfig
from luthier.sections import MethodSection

VIRTUAL_TOKENS = {"prompt": 50, "p_tuning": 50, "prefix": 20}
"""Where the recipe does not say; a small model needs more of them (Lester et al. 2021, figure 3a). Of the quickstart's
held-out rows a prompt of 20, 50 and 100 gets 34, 47 and 46 % right; a prefix, which has keys and values in every layer,
gets 48 % with 20 and 46 % with 50."""
SAMPLED = 4096
"""Tokens whose embeddings tell the size of all: a rate that depends on it stays the same to three digits."""
KEYS_AND_VALUES = frozenset({"full_attention", "sliding_attention", "hybrid"})
"""Kinds of layers that a prefix can be given to; a hybrid one has a state of its own besides (Yuan's filter)."""
CONFIGS = {"prompt": PromptTuningConfig, "p_tuning": PromptEncoderConfig, "prefix": PrefixTuningConfig}


def attach(
    model: PreTrainedModel,
    method: MethodSection,
    seed: int,
    *,
    say: Say,
    tokenizer: PreTrainedTokenizerFast | None = None,
) -> PeftModel:
    """A model of which only the soft prompt trains, in fp32, and a line about what it starts from.

    It starts from method.init, a text (which needs the `tokenizer`), else from real tokens drawn by `seed`. Too few are
    repeated.
    Errors: RecipeError for a text that is empty or longer than the virtual tokens; ModelError for more virtual tokens
    than the model reads, and for a prefix where attention has no keys and values to put it before.
    """
    text = None if method.init is None else _ids(method.init, tokenizer)
    usual = len(text) if text is not None and method.kind == "prefix" else VIRTUAL_TOKENS[method.kind]
    count = method.virtual_tokens or usual
    _check(model, method.kind, count, None if text is None else len(text))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        adapted = get_peft_model(model, _config(model, method.kind, count))
        ids, origin = _start(model, text, tokenizer, count)
        if method.kind == "p_tuning":
            _begin(adapted.prompt_encoder["default"], embedding_size(model))
    places = adapted.prompt_tokens["default"]  # PEFT keeps them on the CPU, and a GPU would be waited for each pass
    adapted.prompt_tokens["default"] = places.to(adapted.prompt_encoder["default"].embedding.weight.device)
    if method.kind == "p_tuning":
        origin = "a random encoder"
    elif next(model.parameters()).device.type != "meta":
        _fill(adapted, method.kind, ids)
    said = "virtual tokens" if method.kind != "prefix" else "virtual tokens' keys and values in every layer"
    say(f"{method.kind}: {count} {said}, from {origin}")
    return adapted


def _ids(text: str, tokenizer: PreTrainedTokenizerFast | None) -> list[int]:
    """The ids of method.init, none of them special: as a row's contents are encoded."""
    assert tokenizer is not None, "method.init needs the tokenizer"
    ids: list[int] = np.frombuffer(Subwords(tokenizer).ids([text], head=True)[0], np.int32).tolist()
    if not ids:
        raise RecipeError("method.init is empty: give a text, or leave it out")
    return ids


def _check(model: PreTrainedModel, kind: str, count: int, text: int | None) -> None:
    window = window_of(model)
    if window is not None and count >= window:
        raise ModelError(f"method.virtual_tokens: {count:,}, but this model reads {window:,} tokens, rows included")
    if text is not None and text > count:
        raise RecipeError(
            f"method.init has {text} tokens, and method.virtual_tokens is {count}: shorten the text, or set "
            f"method.virtual_tokens: {text}"
        )
    if kind != "prefix":
        return
    config = model.config.get_text_config()
    others = sorted(set(_layer_types(config)) - KEYS_AND_VALUES)
    reasons = {
        f"has layers of {', '.join(others)}": bool(others),
        "shares keys and values between layers": bool(getattr(config, "num_kv_shared_layers", 0)),
        "compresses its keys and values": hasattr(config, "kv_lora_rank"),
        "has no attention": not hasattr(config, "num_attention_heads"),
        "has an attention of its own": not model._can_set_attn_implementation(),
    }
    if what := next((reason for reason, holds in reasons.items() if holds), None):
        raise ModelError(f"prefix: this {config.model_type} model {what}; set method.kind: prompt")


def _layer_types(config: Any) -> list[str]:
    return list(getattr(config, "layer_types", None) or ())


def _config(model: PreTrainedModel, kind: str, count: int) -> PeftConfig:
    config = model.config.get_text_config()
    width = model.get_input_embeddings().embedding_dim  # OPT-350m: less than the hidden size
    sizes: dict[str, Any] = {"token_dim": width}
    if kind == "p_tuning":
        sizes["encoder_hidden_size"] = width
    if kind == "prefix":
        heads = config.num_attention_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // heads
        kept = getattr(config, "num_key_value_heads", None) or heads
        sizes = {"token_dim": kept * size, "num_attention_heads": kept}
    return CONFIGS[kind](task_type="CAUSAL_LM", num_virtual_tokens=count, **sizes)


def _start(
    model: PreTrainedModel,
    text: list[int] | None,
    tokenizer: PreTrainedTokenizerFast | None,
    count: int,
) -> tuple[Tensor, str]:
    """The ids that `count` virtual tokens start from, int64 [V], and what they are."""
    if text:
        chosen, origin = text, "the text of method.init"
    else:
        known = min(model.get_input_embeddings().num_embeddings, len(tokenizer) if tokenizer is not None else 1 << 30)
        special = set() if tokenizer is None else {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
        real = torch.tensor([number for number in range(known) if number not in special])
        chosen = real[torch.randint(len(real), (count,))].tolist()
        origin = "random tokens of the vocabulary"
    ids = torch.tensor(chosen).repeat(-(-count // len(chosen)))[:count]
    return ids, origin


def _fill(adapted: PeftModel, kind: str, ids: Tensor) -> None:
    """Put in what the ids are in the base: embeddings, or each layer's keys and values."""
    base = adapted.get_base_model()
    with torch.no_grad():
        if kind == "prompt":
            embedded = base.get_input_embeddings()(ids.to(base.device))
            adapted.prompt_encoder["default"].embedding.weight.copy_(embedded)
            return
        training = base.training
        try:
            cache = base.eval()(
                input_ids=ids[None].to(base.device), past_key_values=_cache(base.config)
            ).past_key_values
        finally:
            base.train(training)
    pairs = [(layer.keys, layer.values) for layer in cache.layers]
    try:
        initialize_kv_prefix_from_past_key_values(adapted, past_key_values=pairs)
    except ValueError:
        kind = base.config.model_type
        raise ModelError(
            f"prefix: this {kind} model's keys and values are of unlike sizes; set method.kind: prompt"
        ) from None


def _begin(encoder: Any, size: float) -> None:
    """Draw P-tuning's encoder anew, as He et al. 2015: what it makes has the embeddings' root mean square, `size`.

    PyTorch's own start, which PEFT leaves it with, has weights of 1/√6 of these: what goes through a layer, forward and
    back, is so much smaller. Of the quickstart's held-out rows 25 % came right after it, 50 % after this one.
    """
    with torch.no_grad():
        for layer in (part for part in encoder.mlp_head if isinstance(part, torch.nn.Linear)):
            drawn = torch.empty(layer.weight.shape)  # on the CPU, so that a seed gives the same on every device
            layer.weight.copy_(torch.nn.init.kaiming_normal_(drawn, nonlinearity="relu"))
            layer.bias.zero_()
        made = encoder(torch.arange(encoder.total_virtual_tokens, device=layer.weight.device))
        layer.weight.mul_(size / made.square().mean().sqrt())


def embedding_size(model: Any) -> float:
    """The root mean square of what the model's embedding gives for SAMPLED tokens, evenly drawn; nan on "meta"."""
    embedding = model.get_input_embeddings()
    device = embedding.weight.device
    if device.type == "meta":
        return math.nan
    ids = torch.arange(0, embedding.num_embeddings, max(1, embedding.num_embeddings // SAMPLED), device=device)
    with torch.no_grad():
        return float(embedding(ids).float().square().mean().sqrt())


def _cache(config: Any) -> DynamicCache:
    """An empty one that keeps all keys, those behind a layer's window too; with states where layers have some."""
    return DynamicCache(config=config) if "hybrid" in _layer_types(config.get_text_config()) else DynamicCache()


# -- answering -----------------------------------------------------------------------------------------------------


class Begun(NamedTuple):
    """How an answer begins. given: what the base's own `generate` takes; width: of what it gives back, [B, width +
    drawn], the columns that are not drawn."""

    given: dict[str, Any]
    width: int


def begun(model: Any, ids: Tensor, mask: Tensor) -> Begun:
    """Prompts, padded on the left, with the virtual tokens before each: as training has them, and no pad between.

    ids, mask: int64 [B, L]. (PEFT puts them before the padding: a filter or a window would see pads in between.)
    """
    virtual = virtual_of(model)
    if not virtual.tokens:
        return Begun({"input_ids": ids, "attention_mask": mask}, ids.shape[1])
    base, rows, count = model.get_base_model(), len(ids), virtual.tokens
    ones = mask.new_ones(rows, count)
    if virtual.columns:
        embedded = base.get_input_embeddings()(ids)
        prompts = prompts_of(model).to(embedded.dtype).expand(rows, -1, -1)
        order = torch.cat((mask.new_full((rows, count), 1), 2 * mask), dim=1).argsort(dim=1, stable=True)
        both = torch.cat((prompts, embedded), dim=1)
        joined = both.gather(1, order[..., None].expand_as(both))
        return Begun({"inputs_embeds": joined, "attention_mask": torch.cat((mask, ones), dim=1).sort(dim=1).values}, 0)
    cache = _cache(base.config)
    for number, (key, value) in enumerate(prefix_of(model)):
        cache.update(key.expand(rows, -1, -1, -1), value.expand(rows, -1, -1, -1), number)
    return Begun(
        {
            "input_ids": torch.cat((ids[:, :1].expand(-1, count), ids), dim=1),  # those of the prefix are not looked at
            "attention_mask": torch.cat((ones, mask), dim=1),
            "past_key_values": cache,
        },
        count + ids.shape[1],
    )


def alone(model: Any) -> bool:
    """Must prompts of unlike lengths be answered apart? Behind a prefix a window would count the pads in between."""
    virtual = virtual_of(model)
    config = model.config.get_text_config()
    kinds = _layer_types(config)
    windowed = "sliding_attention" in kinds if kinds else getattr(config, "sliding_window", None) is not None
    return virtual.tokens > 0 and not virtual.columns and windowed


def _yuan_cache(past: Sequence[Tensor]) -> DynamicCache:
    """For PEFT's own forward: a prefix as Yuan's cache, which has the filters' states besides; there are none yet.

    past: [2, B, K, V, E] of each layer, as PEFT makes them.
    """
    cache = DynamicCache(config=YuanConfig(num_hidden_layers=len(past)))
    for number, (key, value) in enumerate(past):
        cache.update(key, value, number)
    return cache


CACHES[YuanConfig.model_type] = _yuan_cache

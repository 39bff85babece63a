"""ChatGLM3 (and ChatGLM2) as its vendor publishes it, computed by transformers' GLM: other names, q, k and v in one.

From loading on it is a plain GLM model: fine-tuned whole or merged, it becomes a folder that plain transformers opens.
Names, order and sizes are those of the vendor's modeling_chatglm.py, whose outputs the tests hold it against.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GlmConfig, GlmForCausalLM, PreTrainedModel
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightRenaming

from luthier.errors import ModelError
from luthier.models.weights import Stored, Weights

OPENED_BY: str | None = None

SIZES = {
    "padded_vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_attention_heads": "num_attention_heads",
    "multi_query_group_num": "num_key_value_heads",
    "kv_channels": "head_dim",
    "seq_length": "max_position_embeddings",
    "layernorm_epsilon": "rms_norm_eps",
    "add_qkv_bias": "attention_bias",
}
"""What a model needs of the vendor's config.json → GLM's key for it."""
COMPUTED = {
    "rmsnorm": (True, True),
    "post_layer_norm": (True, True),
    "apply_residual_connection_post_layernorm": (False, False),
    "multi_query_attention": (False, True),
    "original_rope": (True, True),
    "add_bias_linear": (False, False),
    "rope_ratio": (1, 1),
    "pre_seq_len": (None, None),
    "quantization_bit": (0, 0),
    "vision_config": (None, None),
}
"""The vendor's keys that change the computation: what its code takes where one is absent, and ChatGLM3's own."""
REMEDIES = {
    "rope_ratio": "take ChatGLM3-6B itself, or for GLM-4 the folder whose name ends in -hf",
    "pre_seq_len": "take the model that it was tuned from",
    "quantization_bit": "take the model's unquantised weights",
}
NAMES = {
    "transformer.embedding.word_embeddings.": "model.embed_tokens.",
    "transformer.encoder.layers.": "model.layers.",
    "transformer.encoder.final_layernorm.": "model.norm.",
    "transformer.output_layer.": "lm_head.",
    ".self_attention.dense.": ".self_attn.o_proj.",
    ".mlp.dense_h_to_4h.": ".mlp.gate_up_proj.",
    ".mlp.dense_4h_to_h.": ".mlp.down_proj.",
}
"""Parts of the vendor's names of tensors → GLM's."""
FUSED, PROJECTIONS = (
    ".self_attention.query_key_value.",
    (".self_attn.q_proj.", ".self_attn.k_proj.", ".self_attn.v_proj."),
)
"""The vendor's one projection → GLM's three, in the order of its rows."""
UNUSED = "transformer.rotary_pos_emb.inv_freq"
"""Stored by the vendor; its own code computes the frequencies anew."""


class ChatGLMConfig(GlmConfig):  # type: ignore[misc]
    """GLM's configuration, read from the vendor's config.json."""

    model_type = "chatglm"

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        return super().from_dict(_as_glm(config_dict), **kwargs)


class ChatGLMForCausalLM(GlmForCausalLM):  # type: ignore[misc]
    """GLM while it loads: by this name transformers knows that the tensors have the vendor's."""

    config_class = ChatGLMConfig
    _keys_to_ignore_on_load_unexpected = (re.escape(UNUSED),)


class SplitRows(ConversionOps):  # type: ignore[misc]
    """[q + k + v rows, …] → the three. (transformers' own Split is not in all of its versions that we run on.)"""

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
    ) -> dict[str, Tensor]:
        (held,) = input_dict.values()
        parts = (held[0] if isinstance(held, list) else held).split(_rows(kwargs["config"]))
        return {name: part.contiguous() for name, part in zip(target_patterns, parts, strict=True)}


def register() -> None:
    """Let transformers' Auto classes open the vendor's folders, quantised if asked for. May be called again."""
    AutoConfig.register(ChatGLMConfig.model_type, ChatGLMConfig, exist_ok=True)
    AutoModelForCausalLM.register(ChatGLMConfig, ChatGLMForCausalLM, exist_ok=True)
    renamings = [WeightRenaming(re.escape(theirs), ours) for theirs, ours in NAMES.items()]
    splits = [
        WeightConverter([FUSED + kind], [name + kind for name in PROJECTIONS], [SplitRows()])
        for kind in ("weight", "bias")
    ]
    register_checkpoint_conversion_mapping(ChatGLMForCausalLM.__name__, [*renamings, *splits], overwrite=True)


def check(path: Path, config: dict[str, Any]) -> None:
    """Errors: ModelError for another generation of ChatGLM, or a config.json that lacks what a model needs."""
    if "inner_hidden_size" in config or config.get("position_encoding_2d"):
        raise ModelError(f"{path}: the first ChatGLM-6B is an architecture of its own; take ChatGLM3 or ChatGLM2")
    if missing := [key for key in SIZES if config.get(key) is None]:
        raise ModelError(f"{path / 'config.json'}: it lacks {', '.join(missing)}; take the vendor's own file")
    for key, (absent, known) in COMPUTED.items():
        given = config.get(key)
        if (absent if given is None else given) != known:
            shown = f"with {key}" if isinstance(given, dict) else f"with {key} {absent if given is None else given}"
            remedy = f"; {REMEDIES[key]}" if key in REMEDIES else ""
            raise ModelError(f"{path}: a ChatGLM {shown}, which is not computed as ChatGLM3 is{remedy}")


def settle(model: PreTrainedModel) -> None:
    """Make a loaded model a plain GLM: it would save itself under the vendor's names and under no class's name."""
    model.__class__, model.config.__class__ = GlmForCausalLM, GlmConfig
    model.config.architectures = [GlmForCausalLM.__name__]
    model._weight_conversions = None


def as_model(weights: Weights, config: dict[str, Any]) -> Weights:
    """The vendor's tensors by GLM's names, q, k and v apart; each is read when it is asked for.

    Errors: ModelError where a projection has other rows than config.json says.
    """
    rows = rows_of(config)
    tensors: dict[str, Stored] = {}
    for name, stored in weights.tensors.items():
        if FUSED in name:
            if stored.shape[0] != sum(rows):
                raise ModelError(
                    f"{weights.folder}: {name} has {stored.shape[0]} rows, and config.json says {sum(rows)}"
                )
            parts = zip(PROJECTIONS, _parts(stored, rows), strict=True)
            tensors |= {glm_name(name.replace(FUSED, projection)): part for projection, part in parts}
        elif name != UNUSED:
            tensors[glm_name(name)] = stored
    return Weights(weights.folder, tensors)


def saved_config(config: dict[str, Any]) -> dict[str, Any]:
    """config.json of the plain GLM folder that a vendor's becomes."""
    saved: dict[str, Any] = _plain(config).to_diff_dict()
    return saved


def glm_name(name: str) -> str:
    """GLM's name of a vendor's tensor; query_key_value has none."""
    for theirs, ours in NAMES.items():
        name = name.replace(theirs, ours)
    return name


def vendor_name(name: str) -> str:
    """The vendor's name of a GLM tensor; q_proj, k_proj and v_proj are all called query_key_value."""
    for ours in PROJECTIONS:
        name = name.replace(ours, FUSED)
    for theirs, ours in NAMES.items():
        name = name.replace(ours, theirs)
    return name


def rows_of(config: dict[str, Any]) -> tuple[int, int, int]:
    """Rows of query, key and value in the vendor's query_key_value."""
    return _rows(_plain(config))


def _plain(config: dict[str, Any]) -> Any:
    return GlmConfig.from_dict(_as_glm(config))


def _as_glm(config: dict[str, Any]) -> dict[str, Any]:
    """The vendor's config.json in GLM's words."""
    return {
        **{ours: config[theirs] for theirs, ours in SIZES.items()},
        "architectures": [GlmForCausalLM.__name__],
        "attention_dropout": config.get("attention_dropout", 0.0),
        "dtype": config.get("torch_dtype"),
        "eos_token_id": config.get("eos_token_id", 2),
        "pad_token_id": config.get("pad_token_id", 0),
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.5},
        "tie_word_embeddings": False,
    }


def _rows(config: Any) -> tuple[int, int, int]:
    groups = config.num_key_value_heads * config.head_dim
    return config.num_attention_heads * config.head_dim, groups, groups


def _parts(stored: Stored, rows: tuple[int, ...]) -> Iterator[Stored]:
    start = 0
    for count in rows:
        yield Stored((count, *stored.shape[1:]), stored.dtype, partial(_read_rows, stored, start, start + count))
        start += count


def _read_rows(stored: Stored, start: int, stop: int) -> Tensor:
    return stored.read()[start:stop].clone()  # else a part would keep the memory of all three

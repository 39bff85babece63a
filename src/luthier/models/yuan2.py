"""Yuan2 as its vendor publishes it: a Llama whose query and key read a filter over the current and the previous token.

Parameters keep the vendor's names, shapes and meaning: q_proj and k_proj together are one projection that is cut per
head, the MLP's activation is on up_proj. So nothing is converted, an adapter fits the vendor's model, and what is saved
is the vendor's layout again. There is no dropout, whatever `dropout` in config.json says: the vendor's code has none
either. Nor is there use_loss_mask, which is about the vendor's own loss; and a row with an end token inside is attended
to as a whole, also where reset_attention_mask is on.

Shapes: B rows, L places, D hidden size, C channels of a convolution's input, H heads, E head size.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, GenerationMixin, PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.models.llama.modeling_llama import (
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
    eager_attention_forward,
)
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from luthier.engine.attention import Layout
from luthier.errors import ModelError
from luthier.models.weights import Weights

OPENED_BY: str | None = (
    "it is in Yuan2's own layout, which plain transformers does not know: Luthier opens it, "
    "and so does the vendor's code, once its .py files are copied into the folder"
)
PLAIN: dict[str, tuple[Any, ...]] = {
    "causal_mask": (True,),
    "use_shareqk": (False,),  # no filter at all
    "use_moe": (False,),
    "moe_config": (None, {}),
    "attention_bias": (False,),
    "mlp_bias": (False,),
}
"""Keys of config.json that decide what is computed, and the values that are computed here; absent is fine."""


# -- the folder ---------------------------------------------------------------------------------------------------


def register() -> None:
    """Let AutoConfig and AutoModelForCausalLM open folders of model_type "yuan". May be called again."""
    AutoConfig.register(YuanConfig.model_type, YuanConfig, exist_ok=True)
    AutoModelForCausalLM.register(YuanConfig, YuanForCausalLM, exist_ok=True)


def check(path: Path, config: dict[str, Any]) -> None:
    """Errors: ModelError where config.json is that of a Yuan that is computed in another way (shared query and key,
    experts, attention narrower than the hidden state)."""
    width = config.get("hidden_size", YuanConfig.hidden_size)
    heads = config.get("num_attention_heads", YuanConfig.num_attention_heads)
    plain = PLAIN | {"attention_projection_size": (None, width), "num_key_value_heads": (None, heads)}
    for key, known in plain.items():
        if key in config and config[key] not in known:
            said = json.dumps(config[key])[:40]
            raise ModelError(f"{path}: {key} {said} makes it another Yuan than Yuan2-2B, the one known here")
    if heads < 1 or width % (2 * heads):
        raise ModelError(f"{path}: config.json: hidden_size {width} cannot be cut into {heads} heads of even size")


def settle(model: PreTrainedModel) -> None:
    """Nothing to do: the model saves itself in the vendor's layout."""


def as_model(weights: Weights, config: dict[str, Any]) -> Weights:
    """The tensors as they are stored."""
    return weights


def saved_config(config: dict[str, Any]) -> dict[str, Any]:
    """config.json as it is, auto_map included: with the vendor's .py files beside it, the vendor's code opens it."""
    return config


# -- the model ----------------------------------------------------------------------------------------------------


class YuanConfig(PreTrainedConfig):  # type: ignore[misc]
    """The vendor's config.json; keys that are not named here are kept and saved again."""

    model_type = "yuan"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]
    number_of_conv_states: ClassVar[int] = 2
    """Of each layer, in the cache: the last input of either convolution."""
    drops_nothing: ClassVar[bool] = True
    """The vendor's files say dropout 0.1, which the vendor's code does not use."""

    vocab_size: int = 135_040
    hidden_size: int = 2048
    intermediate_size: int = 8192
    num_hidden_layers: int = 24
    num_attention_heads: int = 32
    hidden_act: str = "silu"
    max_position_embeddings: int = 8192
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    rope_parameters: dict[str, Any] | None = None
    tie_word_embeddings: bool = True
    use_cache: bool = True
    pad_token_id: int | None = 77_185
    bos_token_id: int | None = 77_185
    eos_token_id: int | list[int] | None = 77_185

    @property
    def layer_types(self) -> list[str]:
        """What transformers' cache keeps for each layer: keys and values, and the convolutions' states beside them."""
        return ["hybrid"] * self.num_hidden_layers


class PairConv(nn.Conv2d):
    """A convolution over each token and the one before it. weight: [out, C, 2, 1], the previous one's numbers first.

    As one product: what comes before a token is not always its neighbour, and on a GPU convolutions round to TF32.
    """

    def __init__(self, channels: int, out: int) -> None:
        super().__init__(channels, out, (2, 1))

    def forward(self, current: Tensor, previous: Tensor) -> Tensor:  # type: ignore[override]
        """current, previous: [B, L, C]; result: [B, L, out]."""
        pairs = torch.stack((previous, current), dim=-1).flatten(-2)  # [B, L, C · 2], as weight's [C, 2, 1] lie
        return F.linear(pairs, self.weight.flatten(1), self.bias)


class LocalizedFilter(nn.Module):
    """norm(x + conv2(conv1(x))): what query and key are made of (Wu et al. 2023, arXiv:2311.15786)."""

    def __init__(self, config: YuanConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.conv1 = PairConv(config.hidden_size, config.hidden_size // 2)
        self.conv2 = PairConv(config.hidden_size // 2, config.hidden_size)
        self.output_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, x: Tensor, starts: Tensor, previous: Tensor | None, cache: Any) -> Tensor:
        """x, result: [B, L, D]; starts: bool [B or 1, L], tokens that nothing comes before; previous: int64 [L], the
        place of what comes before each, where that is not always its neighbour (shared prefixes)."""
        y = self.conv1(x, self.before(x, starts, previous, cache, 0))
        z = self.conv2(y, self.before(y, starts, previous, cache, 1))
        filtered: Tensor = self.output_layernorm(z + x)
        return filtered

    def before(self, x: Tensor, starts: Tensor, previous: Tensor | None, cache: Any, state: int) -> Tensor:
        """What comes before each token: [B, L, C], zero at starts. So y before a start is zero too, not conv1's bias.

        The cache gives back x behind the last token of the earlier call, and keeps x's last one for the next.
        """
        if previous is not None:
            return x.index_select(1, previous).masked_fill(starts[..., None], 0)
        known = x
        if cache is not None:
            kept = cache.update_conv_state(x.transpose(1, 2), self.layer_idx, state_idx=state, conv_kernel_size=1)
            known = kept.transpose(1, 2)
        shifted = F.pad(known, (0, 0, 1, 0))[:, -x.shape[1] - 1 : -1]
        return shifted.masked_fill(starts[..., None], 0)


class YuanAttention(nn.Module):
    """Attention whose query and key come from the filtered states, its value from the states themselves."""

    def __init__(self, config: YuanConfig, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.num_key_value_groups = 1
        self.is_causal = True
        self.lf_gate = LocalizedFilter(config, layer_idx)
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
            nn.Linear(config.hidden_size, config.hidden_size, bias=False) for _ in range(4)
        )

    def forward(
        self,
        hidden_states: Tensor,  # [B, L, D]
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None,
        past_key_values: Any,
        starts: Tensor,
        previous: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        places = hidden_states.shape[:2]
        filtered = self.lf_gate(hidden_states, starts, previous, past_key_values)
        both = torch.cat((self.q_proj(filtered), self.k_proj(filtered)), dim=-1)
        query, key = both.view(*places, -1, 2, self.head_dim).permute(3, 0, 2, 1, 4)  # [B, H, L, E] each
        value = self.v_proj(hidden_states).view(*places, -1, self.head_dim).transpose(1, 2)
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        out, weights = attend(self, query, key, value, attention_mask, scaling=self.scaling, dropout=0.0, **kwargs)
        return self.o_proj(out.reshape(*places, -1)), weights


class YuanMLP(nn.Module):
    """down(gate · act(up)): the activation is on the other of the two than in Llama."""

    def __init__(self, config: YuanConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(self.gate_proj(x) * self.act_fn(self.up_proj(x)))
        return out


class YuanDecoderLayer(GradientCheckpointingLayer):  # type: ignore[misc]
    """Attention and feed-forward, each behind a norm and added to what came in: [B, L, D] → [B, L, D]."""

    def __init__(self, config: YuanConfig, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = YuanAttention(config, layer_idx)
        self.mlp = YuanMLP(config)
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, hidden_states: Tensor, past_key_values: Any = None, **kwargs: Any) -> Tensor:
        # By this name past_key_values is taken out of a call that activation checkpointing repeats.
        attended, _ = self.self_attn(self.input_layernorm(hidden_states), past_key_values=past_key_values, **kwargs)
        hidden_states = hidden_states + attended
        out: Tensor = hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))
        return out


class YuanPreTrainedModel(PreTrainedModel):  # type: ignore[misc]
    """What transformers asks of the family."""

    config_class = YuanConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["YuanDecoderLayer"]
    _skip_keys_device_placement: ClassVar[list[str]] = ["past_key_values"]
    _supports_sdpa = True
    _supports_attention_backend = True
    _can_record_outputs: ClassVar[dict[str, type]] = {"hidden_states": YuanDecoderLayer, "attentions": YuanAttention}
    _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = [r"rotary_emb\.inv_freq"]  # stored by early vendor code


class YuanModel(YuanPreTrainedModel):
    """The decoder. A token's predecessor follows from the call alone: layout, attention_mask and position_ids."""

    def __init__(self, config: YuanConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)  # pad is the end token: it is learned
        self.layers = nn.ModuleList([YuanDecoderLayer(config, number) for number in range(config.num_hidden_layers)])
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults  # type: ignore[untyped-decorator]
    @capture_outputs  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        layout: Layout | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """As in Llama. A packed pass comes with its `layout`."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("exactly one of input_ids and inputs_embeds must be given")
        states = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            seen = 0 if past_key_values is None else past_key_values.get_seq_length()
            position_ids = torch.arange(seen, seen + states.shape[1], device=states.device)[None]
        mask = create_causal_mask(self.config, states, attention_mask, past_key_values, position_ids)
        starts, previous = _starts(position_ids, attention_mask, layout), _previous(layout, states.device)
        rotary = self.rotary_emb(states, position_ids=position_ids)
        for layer in self.layers:
            states = layer(
                states,
                past_key_values=past_key_values,
                attention_mask=mask,
                position_embeddings=rotary,
                position_ids=position_ids,
                starts=starts,
                previous=previous,
                layout=layout,
                **kwargs,
            )
        return BaseModelOutputWithPast(last_hidden_state=self.norm(states), past_key_values=past_key_values)


def _starts(positions: Tensor, mask: Tensor | None, layout: Layout | None) -> Tensor:
    """bool [B or 1, L]: tokens that no token of their row comes before.

    positions: [B or 1, L]. mask: [B, earlier + L] where rows are padded, true on real tokens; one of four dimensions
    says nothing here. After a pad comes a start: what the filter makes of a pad goes nowhere.
    """
    starts = positions == 0
    if layout is not None and layout.segments:
        roots = [segment.start for segment in layout.segments if segment.parent < 0]
        starts = starts.index_fill(1, _moved(torch.tensor(roots), starts.device), 1)
    if mask is not None and mask.ndim == 2:
        starts = starts | ~F.pad(mask.bool(), (1, 0))[:, -positions.shape[1] - 1 : -1]
    return starts


def _previous(layout: Layout | None, device: torch.device) -> Tensor | None:
    """int64 [L]: the place of the token before each, in a pass with shared prefixes. Where none is, any place."""
    if layout is None or all(segment.parent < 0 for segment in layout.segments):
        return None
    previous = torch.arange(-1, layout.segments[-1].stop - 1).clamp_(min=0)
    for start, _, parent in layout.segments:
        if parent >= 0:
            previous[start] = layout.segments[parent].stop - 1
    return _moved(previous, device)


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    """To where the model is; a GPU is not waited for."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


class YuanForCausalLM(YuanPreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """The decoder and its head, which is the embedding."""

    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: YuanConfig) -> None:
        super().__init__(config)
        self.model = YuanModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """As in Llama."""
        outputs = self.model(
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache=use_cache, **kwargs
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        rest = {name: value for name, value in outputs.items() if name != "last_hidden_state"}
        return CausalLMOutputWithPast(loss=loss, logits=logits, **rest)

"""LLaMA-Adapter, family by family, against the base, rows by themselves, PEFT's own for Llama, and by hand."""

from __future__ import annotations

import copy
import json
from types import SimpleNamespace

import pytest
import torch
from peft import AdaptionPromptConfig, get_peft_model
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    FalconConfig,
    FalconForCausalLM,
    HunYuanDenseV1Config,
    HunYuanDenseV1ForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
)
from transformers.masking_utils import sdpa_mask

import owned
from luthier.engine import attention
from luthier.engine.forward import adopt
from luthier.errors import ModelError
from luthier.models import zero_attention
from luthier.models.load import load_model
from luthier.quiet import quiet
from luthier.sections import ModelSection
from owned import FAMILIES, MOST
from rows import ROTARY, SIZE, tiny, trained
from tiny import tiny_llama

METHOD = {"virtual_tokens": 5, "layers": 2}


@pytest.fixture(autouse=True)
def _quiet() -> None:
    quiet()


@pytest.mark.parametrize("family", MOST)
def test_before_step_1_it_is_the_base(family):
    owned.check_first_step(zero_attention, family, **METHOD)


@pytest.mark.parametrize("family", MOST)
def test_a_packed_pass_is_its_rows_also_with_checkpointing(family):
    owned.check_packing(zero_attention, family, **METHOD)


@pytest.mark.parametrize("family", MOST)
def test_it_trains_and_can_be_switched_off(family):
    owned.check_training(zero_attention, family, 0.1, **METHOD)


@pytest.mark.parametrize("family", MOST)
def test_it_is_saved_and_loaded_as_peft_does_it(family, tmp_path):
    owned.check_saving(zero_attention, family, tmp_path, **METHOD)


@pytest.mark.parametrize("family", MOST)
def test_answers_with_a_cache_are_those_of_whole_passes(family):
    owned.check_answers(zero_attention, family, **METHOD)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "yuan"])
def test_keys_and_values_are_made_as_the_layer_makes_them(family):
    """What it hands to attention where nothing is turned, every token being at position 0."""
    assert_keys(tiny(family))


def test_a_norm_over_all_heads_at_once():
    assert_keys(Olmo2ForCausalLM(Olmo2Config(**{**SIZE, **ROTARY})))


def assert_keys(model):
    seen = {}

    def look(module, query, key, value, *args, **kwargs):
        seen.update(module=module, key=key, value=value)
        return attention.attend(module, query, key, value, *args, **kwargs)

    AttentionInterface.register("look", look)
    AttentionMaskInterface.register("look", sdpa_mask)
    for module in model.modules():
        if module._parameters.get("weight") is not None and module.weight.ndim == 1:
            torch.nn.init.normal_(module.weight)
    model.eval().set_attn_implementation("look")
    last = list(model.get_decoder().layers)[-1].self_attn
    last.register_forward_pre_hook(
        lambda module, args, kwargs: seen.update(x=[*args, kwargs.get("hidden_states")][0]), with_kwargs=True
    )
    ids = torch.tensor([[3, 9, 27, 20]])
    with torch.no_grad():
        model(input_ids=ids, position_ids=torch.zeros_like(ids), use_cache=False)
        key, value = zero_attention.keys_and_values(last, seen["x"])
    assert seen["module"] is last
    torch.testing.assert_close(key, seen["key"], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(value, seen["value"], rtol=1e-6, atol=1e-6)


def test_yuans_prompts_have_no_neighbours():
    """Key and value of a prompt are the same whatever stands beside it: no filter; its key is cut per head."""
    layer = tiny("yuan").model.layers[1].self_attn
    prompt = torch.randn(1, 3, 32)
    key, value = zero_attention.keys_and_values(layer, prompt)
    assert key.shape == value.shape == (1, 4, 3, 8)
    one = zero_attention.keys_and_values(layer, prompt[:, 1:2])
    torch.testing.assert_close(key[:, :, 1:2], one[0])
    torch.testing.assert_close(value[:, :, 1:2], one[1])
    both = torch.cat((layer.q_proj.weight, layer.k_proj.weight)) @ prompt[0].t()  # [64, 3]: 16 rows a head
    torch.testing.assert_close(key[0, 2], both[2 * 16 + 8 : 3 * 16].t())


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_it_is_pefts_adaption_prompt(family):
    """The same numbers under PEFT's names: the same logits, the same gradients (in fp64: those of gates are sums of
    much that cancels, and fp32 leaves 1.5e-5 of one)."""
    model = owned.stirred(owned.attached(zero_attention, tiny(family), **METHOD), 0.5).double()
    config = AdaptionPromptConfig(adapter_len=5, adapter_layers=2, task_type="CAUSAL_LM")
    theirs = get_peft_model(tiny(family), config).train().double()
    names = {
        name: name.replace("zero_attention_prompt.default", "adaption_prompt").replace(
            "zero_attention_gate.default", "adaption_gate"
        )
        for name in trained(model)
    }
    parameters = dict(theirs.named_parameters())
    for name, value in trained(model).items():
        parameters[names[name]].data.copy_(value.view_as(parameters[names[name]]))
    torch.testing.assert_close(owned.logits(model), owned.logits(theirs), rtol=1e-6, atol=1e-6)
    expected = owned.separate(theirs)
    wanted = dict(zip(names, torch.autograd.grad(expected, [parameters[name] for name in names.values()]), strict=True))
    loss = owned.packed(model)
    found = owned.gradients(model, loss)
    owned.assert_same((loss, {name: value.view_as(wanted[name]) for name, value in found.items()}), (expected, wanted))


@pytest.mark.parametrize("cap", [None, 2.0])
def test_grouped_heads_and_soft_caps(cap):
    """By hand, head by head, two query heads to one key head."""
    model = owned.stirred(owned.attached(zero_attention, tiny("gemma2"), **METHOD), 0.5)
    wrapper = model.base_model.model.model.layers[1].self_attn
    base = wrapper.base_layer
    base.attn_logit_softcapping = cap
    prompt, gate = wrapper.zero_attention_prompt["default"], wrapper.zero_attention_gate["default"]
    query = torch.randn(2, 4, 3, 8)
    found = wrapper.beside(query, 0.5)
    assert found.shape == (2, 3, 4, 8)
    for head in range(4):
        rows = slice(head // 2 * 8, head // 2 * 8 + 8)
        key, value = prompt[0] @ base.k_proj.weight[rows].t(), prompt[0] @ base.v_proj.weight[rows].t()
        scores = 0.5 * query[:, head] @ key.t()
        scores = scores if cap is None else cap * torch.tanh(scores / cap)
        torch.testing.assert_close(found[:, :, head], gate * scores.softmax(-1) @ value)


def test_the_last_layers_get_prompts(tmp_path):
    base = Olmo2ForCausalLM(Olmo2Config(**{**SIZE, **ROTARY, "num_hidden_layers": 17}))
    method = SimpleNamespace(virtual_tokens=None, layers=None)
    config = zero_attention.config_of(base, method)
    assert config.target_modules == [f"model.layers.{number}.self_attn" for number in range(1, 17)]
    assert config.virtual_tokens == 20
    assert zero_attention.config_of(tiny("llama"), method).target_modules == ["self_attn"]
    method.layers = 1
    assert zero_attention.config_of(tiny("llama"), method).target_modules == ["model.layers.1.self_attn"]
    method.layers = 3
    with pytest.raises(ModelError, match=r"^method\.layers: 3 are more than the model has \(2\); lower it$"):
        zero_attention.config_of(tiny("llama"), method)
    model = owned.attached(zero_attention, tiny("llama"), virtual_tokens=None, layers=1)
    assert {name: value.shape for name, value in trained(model).items()} == {
        "base_model.model.model.layers.1.self_attn.zero_attention_prompt.default": (1, 20, 32),
        "base_model.model.model.layers.1.self_attn.zero_attention_gate.default": (1, 1),
    }
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (saved["peft_type"], saved["virtual_tokens"]) == ("ZERO_ATTENTION", 20)
    with pytest.raises(NotImplementedError):
        model.merge_and_unload()


def test_unloaded_it_is_the_base_and_a_copy_has_prompts_of_its_own():
    model = owned.stirred(owned.attached(zero_attention, tiny("qwen3"), **METHOD)).eval()
    changed = owned.logits(model)
    twin = copy.deepcopy(model)
    owned.stirred(twin)
    assert (owned.logits(twin) - changed).abs().max() > 0.01
    assert torch.equal(owned.logits(model), changed)
    base = tiny("qwen3")
    expected = owned.logits(base.eval())
    assert (changed - expected).abs().max() > 0.01
    assert torch.equal(owned.logits(model.base_model.unload()), expected)


def test_attaching_sets_the_attention():
    """A folder opened in transformers' own attention would answer as the base, and nobody would know."""
    base = tiny("llama")
    method = SimpleNamespace(**METHOD)
    model = owned.stirred(get_peft_model(base, zero_attention.config_of(base, method)))
    assert base.config._attn_implementation == "luthier"
    with model.disable_adapter():
        expected = owned.logits(model)
    assert (owned.logits(model) - expected).abs().max() > 0.01


def test_a_bf16_base_keeps_its_format_and_the_prompts_their_own():
    model = owned.stirred(owned.attached(zero_attention, tiny("qwen2").bfloat16(), **METHOD))
    assert {value.dtype for value in trained(model).values()} == {torch.float32}
    assert owned.logits(model).dtype == torch.bfloat16
    exact = owned.stirred(owned.attached(zero_attention, tiny("qwen2"), **METHOD))
    assert owned.packed(model).item() == pytest.approx(owned.packed(exact).item(), rel=3e-2)


def test_attentions_that_are_not_known_are_refused():
    method = SimpleNamespace(virtual_tokens=None, layers=None)
    after = HunYuanDenseV1ForCausalLM(
        HunYuanDenseV1Config(**{**SIZE, **ROTARY})
    )  # it norms its keys after turning them
    with pytest.raises(ModelError, match="HunYuanDenseV1Attention has a key_layernorm, not known here; take lora"):
        zero_attention.config_of(after, method)
    own = FalconForCausalLM(FalconConfig(vocab_size=61, hidden_size=32, num_hidden_layers=2, num_attention_heads=4))
    with pytest.raises(ModelError, match="FalconForCausalLM has an attention of its own; take lora"):
        zero_attention.config_of(own, method)


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_on_a_quantised_base(kind, tmp_path):
    pytest.importorskip("bitsandbytes")
    section = ModelSection(name="tiny", dtype="fp32", quantize=kind)
    base = load_model(tiny_llama(tmp_path), section, owned.CPU, say=lambda line: None)
    adopt(base)
    expected = owned.logits(base)
    model = owned.attached(zero_attention, base, **METHOD)
    assert torch.equal(owned.logits(model), expected)
    owned.stirred(model)
    loss, wanted = owned.packed(model), owned.separate(model)
    owned.assert_same((loss, owned.gradients(model, loss)), (wanted, owned.gradients(model, wanted)))

"""Bottleneck adapters, family by family, against the base, rows by themselves and what the papers write."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from peft import PeftModel, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel, MixtralConfig, MixtralForCausalLM

import owned
from luthier.engine import dropout
from luthier.engine.layers import fused_layers
from luthier.errors import ModelError
from luthier.models import bottleneck
from luthier.models.load import load_model
from luthier.quiet import quiet
from luthier.sections import ModelSection
from owned import FAMILIES, MOST
from rows import ROTARY, SIZE, tiny, trained
from tiny import tiny_llama

METHOD = {"size": 6, "placement": "houlsby", "dropout": 0.0}


@pytest.fixture(autouse=True)
def _quiet() -> None:
    quiet()


@pytest.mark.parametrize("family", MOST)
def test_before_step_1_it_is_the_base(family):
    owned.check_first_step(bottleneck, family, **METHOD)


@pytest.mark.parametrize("family", MOST)
def test_a_packed_pass_is_its_rows_also_with_checkpointing(family):
    owned.check_packing(bottleneck, family, **METHOD)


@pytest.mark.parametrize("family", MOST)
def test_it_trains_and_can_be_switched_off(family):
    owned.check_training(bottleneck, family, 0.01, **METHOD)


@pytest.mark.parametrize("family", MOST)
def test_it_is_saved_and_loaded_as_peft_does_it(family, tmp_path):
    owned.check_saving(bottleneck, family, tmp_path, **METHOD)


@pytest.mark.parametrize("family", MOST)
def test_answers_with_a_cache_are_those_of_whole_passes(family):
    owned.check_answers(bottleneck, family, **METHOD)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_layers_that_end_the_blocks_are_found(family):
    attention, feed_forward = ("out_proj", "fc2") if family == "opt" else ("o_proj", "down_proj")
    model = tiny(family)
    ends = list(bottleneck.block_ends(model))
    assert [[name.rpartition(".")[2] for name in pair] for pair in ends] == [[attention, feed_forward]] * 2
    assert [name.split(".layers.")[1][0] for name, _ in ends] == ["0", "1"]
    assert model.training == tiny(family).training
    method = SimpleNamespace(**{**METHOD, "placement": "pfeiffer"})
    assert bottleneck.config_of(model, method).target_modules == [feed_forward]


@pytest.mark.parametrize("placement", ["houlsby", "pfeiffer"])
def test_what_it_computes(placement):
    """By hand, in a Llama whose blocks are called one by one."""
    model = owned.stirred(owned.attached(bottleneck, tiny("llama"), **{**METHOD, "placement": placement})).eval()
    weights = {name.removeprefix("base_model.model.model."): value for name, value in model.named_parameters()}
    base = tiny("llama").eval()

    def adapted(place, y):
        down, up = (f"layers.{place}.bottleneck_{way}.default" for way in ("down", "up"))
        narrow = F.gelu(y @ weights[f"{down}.weight"].t() + weights[f"{down}.bias"])
        return y + narrow @ weights[f"{up}.weight"].t() + weights[f"{up}.bias"]

    with torch.no_grad():
        ids = owned.IDS
        x, places = base.model.embed_tokens(ids), torch.arange(12)[None]
        rotary = base.model.rotary_emb(x, places)
        for number, layer in enumerate(base.model.layers):
            y = layer.self_attn(layer.input_layernorm(x), rotary, None)[0]
            x = x + (adapted(f"{number}.self_attn.o_proj", y) if placement == "houlsby" else y)
            y = layer.mlp(layer.post_attention_layernorm(x))
            x = x + adapted(f"{number}.mlp.down_proj", y)
        expected = base.lm_head(base.model.norm(x))
    torch.testing.assert_close(owned.logits(model), expected, rtol=1e-5, atol=1e-5)


def test_how_many_numbers_train_and_what_is_on_disk(tmp_path):
    model = owned.attached(bottleneck, tiny("llama"), **METHOD)
    assert sum(value.numel() for value in trained(model).values()) == 4 * (32 * 6 + 6 + 6 * 32 + 32)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    known = {"peft_type": "BOTTLENECK", "size": 6, "placement": "houlsby", "dropout": 0.0, "task_type": "CAUSAL_LM"}
    assert known.items() <= config.items() and sorted(config["target_modules"]) == ["down_proj", "o_proj"]
    with pytest.raises(NotImplementedError):
        model.merge_and_unload()


def test_a_bf16_base_keeps_its_format_and_the_adapter_its_own(tmp_path):
    model = owned.stirred(owned.attached(bottleneck, tiny("qwen2").bfloat16(), **METHOD))
    assert {value.dtype for value in trained(model).values()} == {torch.float32}
    assert owned.logits(model).dtype == torch.bfloat16
    exact = owned.stirred(owned.attached(bottleneck, tiny("qwen2"), **METHOD))
    assert owned.packed(model).item() == pytest.approx(owned.packed(exact).item(), rel=3e-2)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny("qwen2").bfloat16(), tmp_path)
    assert torch.equal(owned.logits(loaded), owned.logits(model))


def test_feed_forwards_of_the_engine_call_it():
    model = owned.stirred(owned.attached(bottleneck, tiny("llama"), **METHOD))
    expected = owned.packed(model)
    wanted = expected, owned.gradients(model, expected)
    with fused_layers(model) as fused:
        assert fused["LlamaMLP"] == 2
        loss = owned.packed(model)
        owned.assert_same((loss, owned.gradients(model, loss)), wanted)


def test_dropout_is_keyed():
    """The same masks however rows are cut, other ones at another seed, none in evaluation."""
    model = owned.stirred(owned.attached(bottleneck, tiny("llama"), **{**METHOD, "dropout": 0.3}))
    dropout.check_keys(model)
    with dropout.keyed(model, 5) as dropping:
        assert dropping
        expected = owned.separate(model, 5)
        loss = owned.packed(model, 5)
        owned.assert_same((loss, owned.gradients(model, loss)), (expected, owned.gradients(model, expected)))
        assert abs(owned.packed(model, 6).item() / loss.item() - 1) > 1e-3
        plain = owned.stirred(owned.attached(bottleneck, tiny("llama"), **METHOD)).eval()
        assert torch.equal(owned.logits(model.eval()), owned.logits(plain))


def test_layers_that_are_stored_transposed():
    config = GPT2Config(vocab_size=61, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    base = GPT2LMHeadModel(config).eval()
    assert list(bottleneck.block_ends(base))[1] == ("transformer.h.1.attn.c_proj", "transformer.h.1.mlp.c_proj")
    expected = owned.logits(base)
    model = get_peft_model(base, bottleneck.config_of(base, SimpleNamespace(**METHOD)))
    assert torch.equal(owned.logits(model), expected)
    assert (owned.logits(owned.stirred(model)) - expected).abs().max() > 0.01


@pytest.mark.parametrize("family", ["phi3", "opt", "yuan"])
def test_a_model_without_memory_can_be_planned_for(family):
    base = tiny(family).to("meta")
    model = get_peft_model(base, bottleneck.config_of(base, SimpleNamespace(**METHOD)))
    assert {value.device.type for value in model.parameters()} == {"meta"}
    assert sum(value.numel() for value in trained(model).values()) == 4 * (32 * 6 + 6 + 6 * 32 + 32)


def test_experts_are_refused():
    model = MixtralForCausalLM(MixtralConfig(**SIZE, **ROTARY, num_local_experts=2))
    with pytest.raises(ModelError, match=r"bottleneck does not fit this mixtral model: .* each end in one layer"):
        bottleneck.config_of(model, SimpleNamespace(**METHOD))


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_on_a_quantised_base(kind, tmp_path):
    pytest.importorskip("bitsandbytes")
    section = ModelSection(name="tiny", dtype="fp32", quantize=kind)
    base = load_model(tiny_llama(tmp_path), section, owned.CPU, say=lambda line: None)
    expected = owned.logits(base)
    model = owned.attached(bottleneck, base, **METHOD)
    assert torch.equal(owned.logits(model), expected)
    owned.stirred(model)
    loss, wanted = owned.packed(model), owned.separate(model)
    owned.assert_same((loss, owned.gradients(model, loss)), (wanted, owned.gradients(model, wanted)))

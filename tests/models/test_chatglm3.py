"""ChatGLM3 from its vendor's folder: the vendor's own numbers, no vendor code, and plain GLM folders on the way out.

Sabotage, each tried once: k and v swapped, theta 20,000, partial_rotary_factor 1 fail `test_the_vendors_logits…`;
biases that are always there fail `test_without_biases…`; the config's class left as it is, the conversions kept,
another pad token, a part of query_key_value read from the wrong row on fail `test_what_is_saved…`; `inv_freq` not
ignored fails `test_the_vendors_vectors_with_the_real_vocabulary`.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GenerationConfig, GlmConfig, GlmForCausalLM

from luthier.engine import dropout
from luthier.engine.proof import prove
from luthier.errors import ModelError
from luthier.merge import merge
from luthier.models import chatglm3, families
from luthier.models.adapters import attach, save_adapter
from luthier.models.load import check_architecture, from_folder, load_model, read_config
from luthier.models.weights import open_weights
from luthier.quiet import quiet
from luthier.sections import MethodSection, ModelSection, Quantization
from rows import Rows
from tiny import moved, tiny_tokenizer
from vendorglm import MINI, VendorGLM, vendor_folder

CPU = torch.device("cpu")
EXPECTED: dict[str, Any] = json.loads((MINI / "expected.json").read_text(encoding="utf-8"))
IDS, LABELS = torch.tensor(EXPECTED["input_ids"]), torch.tensor(EXPECTED["labels"])
STRANGER = """
import sys, torch
from transformers import AutoModelForCausalLM
for folder in sys.argv[1:]:
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert type(model).__name__ == "GlmForCausalLM" and not report["missing_keys"] and not report["unexpected_keys"]
    torch.save(model(torch.arange(5, 29)[None]).logits.detach(), folder + "/logits.pt")
assert "luthier" not in sys.modules
"""


@pytest.fixture(autouse=True)
def _quiet() -> None:
    quiet()


def load(path: Path, quantized: Quantization | None = None) -> Any:
    model, unused = from_folder(path, torch.float32, CPU, quantized=quantized)
    assert unused == []
    return model


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    return model(input_ids=ids).logits


def copy(path: Path, **config: Any) -> Path:
    """The mini folder with other keys in its config.json; None takes one out."""
    shutil.copytree(MINI, path, ignore=shutil.ignore_patterns("expected*"))
    changed = read_config(path) | config
    (path / "config.json").write_text(json.dumps({key: value for key, value in changed.items() if value is not None}))
    return path


# What the vendor computes


def test_the_vendors_logits_loss_and_gradient() -> None:
    model = load(MINI)
    expected = load_file(MINI / "expected.safetensors")
    embedding = model.get_input_embeddings().weight.requires_grad_()
    found = model(input_ids=IDS, labels=LABELS)
    torch.testing.assert_close(found.logits, expected["logits"], rtol=0, atol=1e-5)
    assert found.loss.item() == pytest.approx(EXPECTED["loss"], abs=1e-6)
    found.loss.backward()
    torch.testing.assert_close(embedding.grad[IDS[0]], expected["embedding_grad"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("use_cache", [True, False])
def test_the_vendors_greedy_answer_with_and_without_a_cache(use_cache: bool) -> None:
    model = load(MINI)
    settings = GenerationConfig(max_new_tokens=12, pad_token_id=0, use_cache=use_cache)
    assert model.generate(IDS[:1, :8], generation_config=settings)[0].tolist() == EXPECTED["greedy"]


def test_a_left_padded_batch_is_answered_as_single_prompts() -> None:
    model = load(MINI)
    settings = GenerationConfig(max_new_tokens=8, pad_token_id=0, output_logits=True, return_dict_in_generate=True)
    lengths = (3, 17, 9)
    prompts = [IDS[row, :length] for row, length in enumerate(lengths)]
    ids, mask = torch.zeros(3, 17, dtype=torch.long), torch.zeros(3, 17, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, 17 - len(prompt) :], mask[row, 17 - len(prompt) :] = prompt, 1
    together = model.generate(ids, attention_mask=mask, generation_config=settings)
    for row, prompt in enumerate(prompts):
        alone = model.generate(prompt[None], generation_config=settings)
        assert together.sequences[row, 17:].tolist() == alone.sequences[0, len(prompt) :].tolist()
        for one, other in zip(together.logits, alone.logits, strict=True):
            torch.testing.assert_close(one[row], other[0], rtol=0, atol=1e-5)


def test_the_vendors_vectors_with_the_real_vocabulary(shared: Path) -> None:
    folder = shared / "oracle" / "chatglm3-tiny"
    expected = json.loads((folder / "expected.json").read_text(encoding="utf-8"))
    asked = {key: torch.tensor(expected["forward"][key]) for key in ("input_ids", "labels")}
    model = load(folder)
    found = model(**asked)
    every = load_file(folder / "expected_logits_every127.safetensors")["logits"]
    torch.testing.assert_close(found.logits[..., ::127], every, rtol=0, atol=1e-5)
    assert found.loss.item() == pytest.approx(expected["forward"]["loss"], abs=1e-5)
    begun = next(n for n in range(1, len(expected["greedy"])) if _goes_on(model, expected["greedy"], n))
    assert begun <= len(expected["greedy"]) - 8


def _goes_on(model: Any, row: list[int], start: int) -> bool:
    """Whether each token from `start` on is the likeliest after those before it."""
    choices = logits(model, torch.tensor([row]))[0].argmax(-1).tolist()
    return choices[start - 1 : -1] == row[start:]


def test_packed_rows_with_dropout_train_as_separate_ones() -> None:
    """Through the engine's own proof: loss and every gradient, packed, against padded rows through transformers."""
    generator = np.random.default_rng(0)
    rows = Rows([(generator.integers(3, 256, n).tolist(), int(n // 3)) for n in (5, 9, 14, 23)])
    model = attach(load(MINI), MethodSection(dropout=0.1), 1, say=lambda line: None)
    with dropout.keyed(model, 1):
        found = prove(model.train(), rows, np.arange(4), pad_id=0, device=CPU, autocast=None, seed=3)
    assert found.route == "engine" and found.record["gradients"] == 3 * 6 * 2
    assert found.record["tried"]["engine"]["difference"] < 1e-5


def test_without_biases_and_with_other_sizes(tmp_path: Path) -> None:
    """Against the definition, whose tensors are the vendor's."""
    folder = vendor_folder(tmp_path, words=99, add_qkv_bias=False, num_layers=2, layernorm_epsilon=0.1)
    ids = torch.arange(5, 29)[None]
    with torch.no_grad():
        torch.testing.assert_close(logits(load(folder), ids), VendorGLM(folder)(ids), rtol=0, atol=1e-5)


# Folders


def test_no_code_of_the_vendors_runs(tmp_path: Path) -> None:
    code = {name: f"modeling_chatglm.{kind}" for name, kind in (("AutoConfig", "A"), ("AutoModelForCausalLM", "B"))}
    folder = copy(tmp_path / "model", auto_map={**code, "AutoModel": "modeling_chatglm.B"})
    (folder / "modeling_chatglm.py").write_text("raise SystemExit('code that came with the model ran')\n")
    assert check_architecture(folder, read_config(folder), trusted=False)
    assert torch.equal(logits(load(folder)), logits(load(MINI)))


def test_shards_of_bin_files(tmp_path: Path) -> None:
    folder = copy(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    tensors = sorted(load_file(MINI / "model.safetensors").items())
    weight_map = {name: f"pytorch_model-{1 + (i > 9):05d}-of-00002.bin" for i, (name, _) in enumerate(tensors)}
    for file in set(weight_map.values()):
        torch.save({name: tensor for name, tensor in tensors if weight_map[name] == file}, folder / file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    model = load_model(folder, ModelSection(name="chatglm", dtype="fp32"), CPU, say=lambda line: None)
    assert torch.equal(logits(model), logits(load(MINI)))
    (folder / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(ModelError, match=r"1 of 2 weight files are missing, the first is pytorch_model-00002-of-0000"):
        load_model(folder, ModelSection(name="chatglm"), CPU, say=lambda line: None)


def test_in_bf16_and_what_is_said_of_it(tmp_path: Path) -> None:
    folder = copy(tmp_path / "model")
    stored = load_file(MINI / "model.safetensors") | {chatglm3.UNUSED: torch.ones(2)}
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    said: list[str] = []
    model = load_model(folder, ModelSection(name="chatglm"), CPU, say=said.append)
    assert said == ["chatglm: weights in bf16: fp16 as the checkpoint stores, but a CPU computes in bf16"]
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    torch.testing.assert_close(logits(model).float(), logits(load(MINI)), rtol=0, atol=0.3)


def test_what_is_saved_opens_in_plain_transformers(tmp_path: Path) -> None:
    """Fine-tuned whole, and merged: by a process that knows nothing of luthier."""
    base = vendor_folder(tmp_path / "base", words=384)
    tiny_tokenizer().save_pretrained(base)
    full, ids = load(base), torch.arange(5, 29)[None]
    assert type(full) is GlmForCausalLM and type(full.config) is GlmConfig
    save_adapter(full, tmp_path / "full", tiny_tokenizer())
    lora = moved(attach(load(base), MethodSection(target=["query_key_value", "o_proj"]), 1, say=lambda line: None))
    save_adapter(lora, tmp_path / "adapter", tiny_tokenizer())
    report = merge(base, tmp_path / "adapter", tmp_path / "merged", say=lambda line: None)
    assert (report.kind, report.changed, report.untied) == ("lora", 3 * 4, False)
    again = merge(base, tmp_path / "full", tmp_path / "copied", say=lambda line: None)
    assert (again.kind, again.changed) == ("full", 0)
    folders = [str(tmp_path / name) for name in ("full", "merged", "copied")]
    done = subprocess.run([sys.executable, "-c", STRANGER, *folders], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    expected = {"full": logits(full, ids), "merged": logits(lora, ids), "copied": logits(full, ids)}
    for name, found in expected.items():
        torch.testing.assert_close(torch.load(tmp_path / name / "logits.pt"), found, rtol=0, atol=1e-5)
    assert (expected["full"] - expected["merged"]).abs().max() > 0.1
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("full", "merged", "copied")]
    assert configs[0] == configs[1] == configs[2]
    facts = ("architectures", "model_type", "pad_token_id", "eos_token_id", "dtype", "tie_word_embeddings")
    assert [configs[0][key] for key in facts] == [["GlmForCausalLM"], "glm", 0, 2, "float32", False]
    settings = GenerationConfig.from_pretrained(tmp_path / "merged")
    assert settings.pad_token_id == 0 and settings.eos_token_id == [1, 2]  # the tiny tokenizer's, the vendor's


def test_the_view_on_the_vendors_tensors_is_the_model() -> None:
    view = chatglm3.as_model(open_weights(MINI), read_config(MINI))
    state = load(MINI).state_dict()
    assert view.tensors.keys() == state.keys()
    for name, tensor in state.items():
        stored = view.tensors[name]
        assert (stored.shape, stored.dtype) == (tuple(tensor.shape), torch.float16)
        assert torch.equal(stored.read().float(), tensor), name
    q = view.tensors["model.layers.0.self_attn.q_proj.weight"].read()
    assert q.untyped_storage().nbytes() == q.numel() * 2, "not the memory of all three"


def test_every_name_has_its_vendors() -> None:
    theirs = set(load_file(MINI / "model.safetensors"))
    assert {chatglm3.vendor_name(name) for name in load(MINI).state_dict()} == theirs
    assert theirs == set(VendorGLM(MINI).state_dict())


def test_registered_twice_and_other_glms_are_left_alone(tmp_path: Path) -> None:
    families.register()
    families.register()
    load(MINI).save_pretrained(tmp_path / "glm")
    plain = load(tmp_path / "glm")
    assert torch.equal(logits(plain), logits(load(MINI)))
    plain.save_pretrained(tmp_path / "again")
    assert load_file(tmp_path / "again" / "model.safetensors").keys() == plain.state_dict().keys()


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_quantised_while_it_loads(tmp_path: Path, kind: Any) -> None:
    """As from a plain GLM folder with the same weights, its head in full precision."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    load(MINI).save_pretrained(tmp_path / "glm")
    ours, plain = (load(path, Quantization(kind=kind)) for path in (MINI, tmp_path / "glm"))
    layer = ours.model.layers[0].self_attn.k_proj
    assert isinstance(layer, bitsandbytes.nn.Linear8bitLt if kind == "int8" else bitsandbytes.nn.Linear4bit)
    assert type(ours.lm_head) is torch.nn.Linear
    assert torch.equal(logits(ours), logits(plain))
    assert 1e-3 < (logits(ours) - logits(load(MINI))).abs().mean() < 1
    assert type(ours) is GlmForCausalLM and type(ours.config) is GlmConfig


# What is refused

REFUSED: list[tuple[dict[str, Any], str]] = [
    (
        {"inner_hidden_size": 128, "position_encoding_2d": True, "kv_channels": None},
        "{path}: the first ChatGLM-6B is an architecture of its own; take ChatGLM3 or ChatGLM2",
    ),
    (
        {"kv_channels": None, "seq_length": None},
        "{path}/config.json: it lacks kv_channels, seq_length; take the vendor's own file",
    ),
    (
        {"rope_ratio": 50},
        "{path}: a ChatGLM with rope_ratio 50, which is not computed as ChatGLM3 is; take ChatGLM3-6B itself, or "
        "for GLM-4 the folder whose name ends in -hf",
    ),
    ({"vision_config": {"depth": 1}}, "{path}: a ChatGLM with vision_config, which is not computed as ChatGLM3 is"),
    ({"rmsnorm": False}, "{path}: a ChatGLM with rmsnorm False, which is not computed as ChatGLM3 is"),
    ({"post_layer_norm": False}, "{path}: a ChatGLM with post_layer_norm False, which is not computed"),
    (
        {"apply_residual_connection_post_layernorm": True},
        "{path}: a ChatGLM with apply_residual_connection_post_layernorm True, which is not",
    ),
    ({"multi_query_attention": None}, "{path}: a ChatGLM with multi_query_attention False, which is not computed"),
    ({"original_rope": False}, "{path}: a ChatGLM with original_rope False, which is not computed"),
    ({"add_bias_linear": True}, "{path}: a ChatGLM with add_bias_linear True, which is not computed"),
    ({"pre_seq_len": 128}, "{path}: a ChatGLM with pre_seq_len 128, which is not computed as ChatGLM3 is; take the"),
    ({"quantization_bit": 4}, "{path}: a ChatGLM with quantization_bit 4, which is not computed as ChatGLM3 is; take"),
]


@pytest.mark.parametrize(("config", "message"), REFUSED)
def test_variants_are_refused_before_anything_is_loaded(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    path = copy(tmp_path / "model", **config)
    with pytest.raises(ModelError) as caught:
        load_model(path, ModelSection(name="chatglm"), CPU, say=print)
    assert str(caught.value).startswith(message.format(path=path)), str(caught.value)


def test_chatglm2_with_what_the_vendor_writes_is_none_of_them(tmp_path: Path) -> None:
    """Its config.json also says what it does not use, as null and 0."""
    path = copy(tmp_path / "model", quantization_bit=0, prefix_projection=False, rope_ratio=1.0)
    held = read_config(path) | {"pre_seq_len": None}
    (path / "config.json").write_text(json.dumps(held))
    assert check_architecture(path, read_config(path), trusted=False)


def test_a_folder_without_weights_or_with_some_missing(tmp_path: Path) -> None:
    path = copy(tmp_path / "model")
    tensors = load_file(path / "model.safetensors")
    tensors.pop("transformer.encoder.layers.1.self_attention.query_key_value.bias")
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"its files lack 3 tensors of the model, the first is model\.layers\.1\.self"):
        load(path)
    (path / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="it holds no weights"):
        load_model(path, ModelSection(name="chatglm"), CPU, say=print)


def test_weights_that_are_not_of_the_configuration(tmp_path: Path) -> None:
    path = copy(tmp_path / "model", multi_query_group_num=1)
    with pytest.raises(ModelError, match=r"query_key_value\.\w+ has 64 rows, and config\.json says 48"):
        chatglm3.as_model(open_weights(path), read_config(path))
    with pytest.raises(ModelError, match="it cannot be loaded"):
        load(path)


def test_a_plain_model_class_of_the_vendors_type_is_never_made() -> None:
    """`luthier merge` asks for the model's shape alone."""
    families.register()
    with torch.device("meta"):
        config = chatglm3.ChatGLMConfig.from_dict(read_config(MINI))
        model = AutoModelForCausalLM.from_config(config)
    assert {name: tensor.shape for name, tensor in model.state_dict().items()} == {
        name: tensor.shape for name, tensor in load(MINI).state_dict().items()
    }

"""query_key_value on a GLM: one A for q, k and v, in training, on disk, and as the vendor's own layer has it.

Sabotage, each tried once: A not shared fails nearly all; the dropout not shared, or not replaced by one, fails
`test_the_gradient…` and `test_one_dropout…`.
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GlmConfig, GlmForCausalLM

from luthier.engine import dropout
from luthier.engine.attention import Layout
from luthier.engine.proof import prove
from luthier.errors import ModelError
from luthier.models import chatglm3
from luthier.models.adapters import adapter_off, attach, fill_adapter, load_adapter, save_adapter
from luthier.models.load import from_folder
from luthier.quiet import quiet
from luthier.sections import MethodSection, TrainSection
from luthier.training.distributed import join
from luthier.training.launch import launch
from rows import Rows, fit, trained
from tiny import moved, tiny_llama
from vendorglm import MINI, VendorGLM

CPU = torch.device("cpu")
IDS = torch.tensor(json.loads((MINI / "expected.json").read_text(encoding="utf-8"))["input_ids"])
ATTENTION = "base_model.model.model.layers.{}.self_attn."
EACH = "q_proj, k_proj, v_proj"


@pytest.fixture(autouse=True)
def _quiet() -> None:
    quiet()


def rows(count: int) -> Rows:
    generator = np.random.default_rng(0)
    lengths = generator.integers(5, 24, count)
    return Rows([(generator.integers(3, 256, n).tolist(), int(n // 3)) for n in lengths])


def adapted(say: Any = lambda line: None, target: Any = "query_key_value", **method: Any) -> Any:
    targets = [target] if isinstance(target, str) else target
    return attach(from_folder(MINI, torch.float32, CPU)[0], MethodSection(target=targets, r=4, **method), 1, say=say)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=IDS).logits


def of_6b() -> GlmForCausalLM:
    """ChatGLM3-6B's shape, without memory."""
    vendor = json.loads((MINI / "config.json").read_text(encoding="utf-8"))
    vendor |= {"num_layers": 28, "hidden_size": 4096, "num_attention_heads": 32, "kv_channels": 128}
    vendor |= {"ffn_hidden_size": 13696, "padded_vocab_size": 65024}
    with torch.device("meta"):
        return GlmForCausalLM(GlmConfig(**chatglm3.saved_config(vendor)))


@pytest.mark.parametrize(
    ("target", "count", "line"),
    [
        (
            ["query_key_value"],
            "974,848",
            "query_key_value: q_proj, k_proj and v_proj share one A, 974,848 parameters; "
            f"target: [{EACH}] has an A for each, 1,892,352",
        ),
        (
            ["q_proj", "k_proj", "v_proj"],
            "1,892,352",
            "q_proj, k_proj and v_proj have an A each, 1,892,352 parameters; target: [query_key_value], "
            "the vendor's one projection, has one for the three, 974,848",
        ),
        (["q_proj", "v_proj"], "1,404,928", None),
    ],
)
def test_parameters_of_the_6b_shape(target: list[str], count: str, line: str | None) -> None:
    said: list[str] = []
    attach(of_6b(), MethodSection(r=4, alpha=32, target=target), 1, say=said.append)
    assert said[:-1] == ([line] if line else [])
    assert said[-1].startswith(f"LoRA r 4, alpha 32 on {' '.join(target)}: {count} of 6,24")


def test_a_is_one_parameter_and_the_rest_of_the_targets_as_ever() -> None:
    model = adapted(target=["query_key_value", "down_proj"], dropout=0.1)
    assert len(trained(model)) == 3 * (1 + 3 + 2)
    for number in range(3):
        layer = model.get_base_model().model.layers[number]
        q, k, v = layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj
        assert q.lora_A["default"].weight is k.lora_A["default"].weight is v.lora_A["default"].weight
        assert q.lora_dropout["default"] is k.lora_dropout["default"] is v.lora_dropout["default"]
        assert layer.mlp.down_proj.lora_A["default"].weight.shape == (4, 48)
    assert ATTENTION.format(0) + "q_proj.lora_A.default.weight" in trained(model)
    assert ATTENTION.format(0) + "k_proj.lora_A.default.weight" not in trained(model)


def test_in_one_layer_only() -> None:
    model = adapted(target=["layers.1.self_attn.query_key_value", "layers.2.self_attn.q_proj"])
    assert [name.split("layers.")[1] for name in trained(model)] == [
        "1.self_attn.q_proj.lora_A.default.weight",
        "1.self_attn.q_proj.lora_B.default.weight",
        "1.self_attn.k_proj.lora_B.default.weight",
        "1.self_attn.v_proj.lora_B.default.weight",
        "2.self_attn.q_proj.lora_A.default.weight",
        "2.self_attn.q_proj.lora_B.default.weight",
    ]


def test_targets_that_match_nothing_or_contradict(tmp_path: Path) -> None:
    with pytest.raises(ModelError) as caught:
        adapted(target="query_key_vale")
    assert str(caught.value) == (
        "target: query_key_vale matches no layer of this glm model; close: query_key_value; its linear layers are "
        "q_proj, k_proj, v_proj, o_proj, gate_up_proj, down_proj, query_key_value"
    )
    with pytest.raises(ModelError, match=r"^target: query_key_value contains q_proj; name one or the other$"):
        adapted(target=["query_key_value", "q_proj"])
    with pytest.raises(ModelError, match=r"^target and modules_to_save both name k_proj; train it one way"):
        adapted(modules_to_save=["k_proj"])
    llama, _ = from_folder(tiny_llama(tmp_path), torch.float32, CPU)
    with pytest.raises(ModelError, match=r"^target: query_key_value matches no layer of this llama model"):
        attach(llama, MethodSection(target=["query_key_value"]), 1, say=print)


# Against the vendor's layer


def vendor_adapted(ours: Any, **config: Any) -> Any:
    """The vendor's model with PEFT's own adapter on its fused layer, holding the numbers of `ours`."""
    config = {"r": 4, "lora_alpha": 16, "target_modules": ["query_key_value"], **config}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        theirs = get_peft_model(VendorGLM(MINI), LoraConfig(**config))
    for number, layer in enumerate(ours.get_base_model().model.layers):
        parts = [getattr(layer.self_attn, f"{x}_proj") for x in "qkv"]
        fused = theirs.get_base_model().transformer.encoder.layers[number].self_attention.query_key_value
        fused.lora_A["default"].weight.data = parts[0].lora_A["default"].weight.data.clone()
        fused.lora_B["default"].weight.data = torch.cat([part.lora_B["default"].weight.data for part in parts])
    return theirs


@pytest.mark.parametrize("p", [0.0, 0.25])
def test_the_gradient_is_that_of_an_adapter_on_the_fused_layer(p: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dropout too: the vendor's layer draws one mask for the three. The masks go by name: let both have the same."""
    multiplier, fused = dropout._multiplier, ("self_attention.query_key_value", "self_attn.q_proj")
    monkeypatch.setattr(dropout, "_multiplier", lambda name: multiplier(name.split("layers.")[1].replace(*fused)))
    ours = moved(adapted(dropout=p)).train()
    theirs = vendor_adapted(ours, lora_dropout=p).train()
    _, positions = np.indices(IDS.shape)
    keys = torch.from_numpy(dropout.token_keys(1, 0, IDS.numpy(), positions)).flatten()
    losses = []
    for model in (ours, theirs):
        with dropout.keyed(model, 1):
            dropout.set_keys(model, keys)
            layout = {"layout": Layout((), keys)} if model is ours else {}
            found = model(input_ids=IDS, **layout)
            values = found.logits if model is ours else found
            losses.append(F.cross_entropy(values[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()))
            losses[-1].backward()
    assert losses[0].item() == pytest.approx(losses[1].item(), abs=1e-6)
    for number, layer in enumerate(ours.get_base_model().model.layers):
        parts = [getattr(layer.self_attn, f"{x}_proj") for x in "qkv"]
        fused = theirs.get_base_model().transformer.encoder.layers[number].self_attention.query_key_value
        for mine, their in (
            (parts[0].lora_A["default"].weight.grad, fused.lora_A["default"].weight.grad),
            (torch.cat([part.lora_B["default"].weight.grad for part in parts]), fused.lora_B["default"].weight.grad),
        ):
            assert (mine - their).norm() < 1e-5 * their.norm()
            assert their.norm() > 1e-3


def test_one_dropout_for_the_three_and_their_own_for_other_layers() -> None:
    model = adapted(target=["query_key_value", "o_proj"], dropout=0.5)
    layers = model.get_base_model().model.layers
    before = layers[0].self_attn.q_proj.lora_dropout["default"]
    with dropout.keyed(model, 1):
        found = [
            [
                getattr(layer.self_attn, name).lora_dropout["default"]
                for name in ("q_proj", "k_proj", "v_proj", "o_proj")
            ]
            for layer in layers
        ]
        assert all(q is k is v and q is not o for q, k, v, o in found)
        assert len({each.multiplier for layer in found for each in layer}) == 2 * 3
    assert layers[0].self_attn.k_proj.lora_dropout["default"] is before


def test_the_engine_equals_the_reference_with_dropout() -> None:
    model = adapted(target=["query_key_value", "gate_up_proj"], dropout=0.1)
    with dropout.keyed(model, 1):
        found = prove(model.train(), rows(4), np.arange(4), pad_id=0, device=CPU, autocast=None, seed=3)
    assert found.route == "engine" and found.record["gradients"] == 3 * (1 + 3 + 2)
    assert found.record["tried"]["engine"]["difference"] < 1e-5


# On disk


def test_saved_it_is_a_plain_peft_folder_of_the_same_model(tmp_path: Path) -> None:
    model = moved(adapted(alpha=32))
    save_adapter(model, tmp_path / "adapter")
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert len(tensors) == 3 * 6
    for number in range(3):
        a = [tensors[f"{ATTENTION.format(number)}{part}_proj.lora_A.weight"] for part in "qkv"]
        assert torch.equal(a[0], a[1]) and torch.equal(a[0], a[2])
    written = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (written["r"], written["lora_alpha"]) == (4, 32)
    assert written["target_modules"] == ["k_proj", "q_proj", "v_proj"]
    assert torch.equal(
        logits(load_adapter(from_folder(MINI, torch.float32, CPU)[0], tmp_path / "adapter")), logits(model)
    )
    chatglm3.register()
    from_folder(MINI, torch.float32, CPU)[0].save_pretrained(tmp_path / "glm")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "glm")
    base = logits(plain)
    assert torch.equal(logits(PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()), logits(model))
    with adapter_off(model):
        assert torch.equal(logits(model), base)


def test_filled_again_it_is_still_one_a(tmp_path: Path) -> None:
    model = moved(adapted())
    save_adapter(model, tmp_path)
    expected, other = logits(model), adapted()
    names = set(trained(other))
    fill_adapter(other, tmp_path)
    assert set(trained(other)) == names and len(names) == 3 * 4
    assert torch.equal(logits(other.eval()), expected)


def test_a_run_goes_on_from_a_checkpoint_bit_for_bit(tmp_path: Path) -> None:
    section = TrainSection(batch=4, steps=4, lr=0.02, warmup=0, save_every=2, tokens_per_pass=40)
    data = rows(9)

    def run(name: str, **options: Any) -> dict[str, torch.Tensor]:
        model = adapted(dropout=0.1)
        fit(tmp_path / name, model, data, section, write=lambda at: save_adapter(model, at), **options)
        return copy.deepcopy(trained(model))

    straight = run("run")
    assert json.loads((tmp_path / "run" / "proof.json").read_text())["path"] == "engine"
    resumed = run("again", resume=tmp_path / "run" / "checkpoints" / "step-000002")
    assert straight.keys() == resumed.keys() and len(straight) == 3 * 4
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)
    start = trained(adapted(dropout=0.1))
    assert all(not torch.equal(straight[name], start[name]) for name in straight)


def of_two_processes(folder: Path, say: Callable[[str], None]) -> dict[str, Any]:
    quiet()
    with join(["cpu", "cpu"]) as world:
        model = adapted(dropout=0.1)
        section = TrainSection(batch=4, steps=3, lr=0.02, warmup=0, tokens_per_pass=24)
        fit(folder, model, rows(9), section, write=lambda at: save_adapter(model, at), world=world)
        return {name: value.numpy() for name, value in trained(model).items()}


@pytest.mark.full
def test_two_processes_train_the_one_a_as_one_does(tmp_path: Path) -> None:
    together = launch(of_two_processes, (tmp_path / "two",), 2, print)
    model = adapted(dropout=0.1)
    section = TrainSection(batch=4, steps=3, lr=0.02, warmup=0, tokens_per_pass=1000, activation_checkpointing=True)
    fit(tmp_path / "one", model, rows(9), section, write=lambda at: save_adapter(model, at))
    for name, value in trained(model).items():
        torch.testing.assert_close(torch.from_numpy(together[name]), value, rtol=0, atol=1e-5)

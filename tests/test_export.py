"""`luthier export`: a ChatGLM3 run's adapter on the vendor's own layers is the same model, through plain PEFT.

Sabotage, each tried once: the rows of k and v swapped, blocks not on the diagonal, alpha not raised with the rank, a
missing part's rows left out: each fails `test_on_the_vendors_own_layers…`.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file

from luthier import verbs
from luthier.cli import main as cli
from luthier.errors import ModelError
from luthier.export import export
from luthier.models.adapters import attach, save_adapter
from luthier.models.load import from_folder
from luthier.quiet import quiet
from luthier.run import load_run, train
from luthier.sections import MethodSection
from tiny import tiny_llama, tiny_tokenizer
from vendorglm import MINI, VendorGLM, vendor_folder

CPU = torch.device("cpu")
IDS = torch.tensor(json.loads((MINI / "expected.json").read_text(encoding="utf-8"))["input_ids"])
FUSED = "transformer.encoder.layers.{}.self_attention.query_key_value"


@pytest.fixture(autouse=True)
def _quiet() -> None:
    quiet()


def tuned(base: Path, adapter: Path, **method: Any) -> Any:
    """A model whose every trainable number was moved at random, as training would; its adapter is saved."""
    model = attach(from_folder(base, torch.float32, CPU)[0], MethodSection(**method), 1, say=lambda line: None)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    save_adapter(model, adapter)
    return model.eval()


def vendors(base: Path, adapter: Path) -> torch.Tensor:
    """Logits of the vendor's model with an adapter folder, by PEFT alone. Errors: those of a warning, so of any key."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.filterwarnings("ignore", category=FutureWarning)
        model = PeftModel.from_pretrained(VendorGLM(base), adapter)
        return model.eval()(input_ids=IDS)


RANKS: list[tuple[dict[str, Any], list[str], dict[str, int]]] = [
    ({"target": ["query_key_value"]}, ["query_key_value"], {}),
    (
        {"target": ["query_key_value", "o_proj", "gate_up_proj", "down_proj", "lm_head", "embed_tokens"]},
        ["dense", "dense_4h_to_h", "dense_h_to_4h", "output_layer", "query_key_value", "word_embeddings"],
        {},
    ),
    ({"target": "auto"}, ["dense", "dense_4h_to_h", "dense_h_to_4h", "query_key_value"], {"query_key_value": 12}),
    ({"target": ["q_proj", "v_proj"]}, ["query_key_value"], {"query_key_value": 8}),
    ({"target": ["k_proj"]}, ["query_key_value"], {}),
    (
        {"target": ["layers.1.self_attn.query_key_value", "layers.2.self_attn.k_proj", "layers.2.self_attn.v_proj"]},
        [FUSED.format(1), FUSED.format(2)],
        {FUSED.format(2): 8},
    ),
]


@pytest.mark.parametrize(("method", "targets", "ranks"), RANKS)
def test_on_the_vendors_own_layers_it_is_the_same_model(
    tmp_path: Path, method: dict[str, Any], targets: list[str], ranks: dict[str, int]
) -> None:
    model = tuned(MINI, tmp_path / "adapter", r=4, alpha=32, **method)
    said: list[str] = []
    export(MINI, tmp_path / "adapter", tmp_path / "out", say=said.append)
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    written = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (written["target_modules"], written["rank_pattern"]) == (targets, ranks)
    assert written["alpha_pattern"] == {name: 8 * rank for name, rank in ranks.items()}
    assert (written["r"], written["lora_alpha"], written["peft_type"], written["bias"]) == (4, 32, "LORA", "none")
    assert written["base_model_name_or_path"] == str(MINI)
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
        assert (expected - VendorGLM(MINI)(IDS)).abs().max() > 0.1
    torch.testing.assert_close(vendors(MINI, tmp_path / "out"), expected, rtol=0, atol=1e-5)
    assert said[-1] == f"{tmp_path / 'out'}: a PEFT adapter for the vendor's own layers ({', '.join(targets)})"
    assert len(said) == (2 if ranks else 1)


def test_one_a_stays_what_it_is_and_b_is_stacked(tmp_path: Path) -> None:
    tuned(MINI, tmp_path / "adapter", r=4, target=["query_key_value"])
    export(MINI, tmp_path / "adapter", tmp_path / "out", say=lambda line: None)
    before = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    after = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert len(after) == 3 * 2 and sum(tensor.numel() for tensor in after.values()) == 3 * 4 * (32 + 64)
    for number in range(3):
        ours = f"base_model.model.model.layers.{number}.self_attn."
        theirs = f"base_model.model.{FUSED.format(number)}."
        assert torch.equal(after[f"{theirs}lora_A.weight"], before[f"{ours}q_proj.lora_A.weight"])
        b = torch.cat([before[f"{ours}{part}_proj.lora_B.weight"] for part in "qkv"])
        assert torch.equal(after[f"{theirs}lora_B.weight"], b)


def test_what_is_refused(tmp_path: Path) -> None:
    def refused(base: Path, message: str, out: Path = tmp_path / "out") -> None:
        with pytest.raises(ModelError) as caught:
            export(base, tmp_path / "adapter", out, say=print)
        assert str(caught.value).startswith(message), str(caught.value)
        assert not (tmp_path / "out").exists()

    adapter = tmp_path / "adapter"
    llama = tiny_llama(tmp_path / "llama")
    tuned(llama, adapter)
    refused(llama, f"{adapter}: it is in the layout of the model's vendor already; use it as it is")
    tuned(MINI, adapter, target=["query_key_value"], bias="all")
    refused(MINI, f"{adapter}: an adapter with bias cannot be exported; luthier merge takes it")
    tuned(MINI, adapter, target=["query_key_value"], modules_to_save=["lm_head"])
    refused(MINI, f"{adapter}: an adapter with modules_to_save cannot be exported")
    refused(MINI, f"{llama}: it exists and is not empty; remove it", out=llama)
    for file in adapter.iterdir():
        file.unlink()
    refused(MINI, f"{adapter}: a whole model (full fine-tuning) is a GLM folder; only an adapter is exported")


def test_a_run_from_its_recipe_to_the_vendors_layout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "cache"))
    tiny_tokenizer().save_pretrained(vendor_folder(tmp_path / "model", words=384))
    rows = [{"prompt": f"Where is {i}?", "response": f"In town {i % 3}."} for i in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {
        "model": {"name": "./model"},
        "data": {"train": "rows.jsonl", "template": "chatml", "max_length": 64},
        "method": {"r": 4, "alpha": 32, "dropout": 0.05, "target": ["query_key_value"]},
        "train": {"batch": 4, "steps": 2, "lr": 2e-2, "warmup": 0},
    }
    (tmp_path / "town.yaml").write_text(yaml.safe_dump(recipe))
    said: list[str] = []
    run = train("town.yaml", say=said.append)
    assert any(line.startswith("query_key_value: q_proj, k_proj and v_proj share one A, 1,152 param") for line in said)
    assert any(line.startswith("engine = reference") for line in said)
    verbs.export(run, tmp_path / "out", say=said.append)
    with torch.no_grad():
        expected = load_run(run).model(input_ids=IDS).logits
    torch.testing.assert_close(vendors(tmp_path / "model", tmp_path / "out"), expected, rtol=0, atol=1e-5)
    monkeypatch.setattr(sys, "argv", ["luthier", "export", "runs/town", "out", "--layout", "vendor"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert capfd.readouterr().err == "error: out: it exists and is not empty; remove it, or name another folder\n"

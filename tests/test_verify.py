"""The proof of a merge, and that it finds a folder which is not the same model."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from luthier.errors import RunError
from luthier.merge import merge
from luthier.models.adapters import attach, load_adapter, save_adapter
from luthier.models.load import load_model
from luthier.quiet import quiet
from luthier.sections import MethodSection, ModelSection
from luthier.verify import _logits, main, verify, write_rows
from tiny import tiny_llama, tiny_qwen2

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _quiet() -> None:
    quiet()


def load(path: Path) -> Any:
    return load_model(path, ModelSection(name="tiny"), CPU, say=lambda line: None)


def merged(tmp_path: Path, base: Path, dtype: Any = "auto", strength: float = 0.05, **method: Any) -> Path:
    """Base + a random adapter, merged; `strength` is the size of B."""
    model = attach(load(base), MethodSection(**method), 1, say=lambda line: None)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += strength * torch.randn(parameter.shape, generator=generator)
    save_adapter(model, tmp_path / "adapter")
    return merge(base, tmp_path / "adapter", tmp_path / "merged", dtype, say=lambda line: None).folder


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """70 rows of 30 random tokens, the last 20 supervised: 1,000 positions are reached with 50 of them."""
    generator = np.random.default_rng(0)
    supervised = np.arange(30) >= 10
    examples = [(generator.integers(4, 384, 30), supervised) for _ in range(70)]
    assert write_rows(examples, tmp_path / "rows.npz") == 1000
    return tmp_path / "rows.npz"


def note(folder: Path) -> Any:
    return json.loads((folder / "luthier_merge.json").read_text())


def perturb(folder: Path, name: str, amount: float) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors[name].view(-1)[:64] += amount
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_rows_keep_their_ends(rows: Path) -> None:
    stored = np.load(rows)
    assert stored["lengths"].tolist() == [30] * 50
    assert (stored["ids"].shape, stored["supervised"].sum()) == ((1500,), 1000)


def test_a_true_merge_is_verified_in_a_fresh_process(tmp_path: Path, rows: Path) -> None:
    folder = merged(tmp_path, tiny_llama(tmp_path / "base"))
    said: list[str] = []
    figures = verify(folder, rows, said.append)
    assert figures["positions"] == 1000
    assert 0 < figures["max_logit_difference"] < 1e-4
    assert abs(figures["mean_kl"]) < 1e-8
    assert figures["top1_agreement"] == 1.0
    assert (note(folder)["verified"], note(folder)["figures"]) == (True, figures)
    assert said[0].startswith(f"{folder}: verified: at 1,000 positions the largest logit difference is ")
    assert said[0].endswith("the same first choice 100.00 %")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base", "merged", "rows.npz"]


def test_the_figures_are_what_they_say(tmp_path: Path, rows: Path) -> None:
    base = tiny_llama(tmp_path / "base")
    folder = merged(tmp_path, base)
    perturb(folder, "model.layers.1.mlp.down_proj.weight", 0.1)
    assert main([str(folder), str(rows)]) == 1
    reference = load_adapter(load(base), tmp_path / "adapter")
    other = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = torch.from_numpy(np.load(rows)["ids"].reshape(50, 30).astype(np.int64))
    with torch.no_grad():
        p, q = (model(ids).logits[:, 9:29].flatten(0, 1).double() for model in (reference, other))
    figures = note(folder)["figures"]
    assert figures["max_logit_difference"] == pytest.approx((p - q).abs().max().item(), rel=1e-4)
    kl = torch.nn.functional.kl_div(q.log_softmax(-1), p.log_softmax(-1), reduction="batchmean", log_target=True)
    assert figures["mean_kl"] == pytest.approx(kl.item(), rel=1e-3)
    assert figures["top1_agreement"] == pytest.approx((p.argmax(-1) == q.argmax(-1)).double().mean().item(), abs=2e-3)


@pytest.mark.parametrize(("dtype", "rounding"), [("bf16", 1e-3), ("fp16", 1e-4)])
def test_half_formats_are_held_to_divergence_and_first_choice(
    tmp_path: Path, rows: Path, dtype: Any, rounding: float
) -> None:
    base = tiny_llama(tmp_path / "base", dtype=torch.bfloat16, initializer_range=0.05)
    folder = merged(tmp_path, base, dtype, strength=0.02)
    assert main([str(folder), str(rows)]) == 0, note(folder)
    figures = note(folder)["figures"]
    assert figures["max_logit_difference"] > rounding, "the format's rounding is there, and it is the same model"
    assert (figures["mean_kl"] < 1e-5, figures["top1_agreement"] >= 0.99) == (True, True)
    perturb(folder, "model.layers.0.self_attn.v_proj.weight", 0.5)
    assert main([str(folder), str(rows)]) == 1
    assert note(folder)["verified"] is False


@pytest.mark.parametrize(
    "method",
    [
        {"dropout": 0.5},
        {"modules_to_save": ["embed_tokens"]},
        {"target": ["lm_head"]},
        {"bias": "all"},
        {"kind": "full"},
    ],
)
def test_every_method_is_verified(tmp_path: Path, rows: Path, method: Any) -> None:
    base = tiny_qwen2(tmp_path / "base", tie_word_embeddings=True)
    folder = merged(tmp_path, base, **method)
    assert main([str(folder), str(rows)]) == 0, note(folder)


def test_stored_in_bf16_computed_in_fp32(tmp_path: Path) -> None:
    base = tiny_qwen2(tmp_path / "base", dtype=torch.bfloat16, tie_word_embeddings=True)
    merged(tmp_path, base, modules_to_save=["embed_tokens"], bias="all")
    row = (np.arange(4, 34), np.arange(30) >= 10)
    narrow = load_adapter(load(base), tmp_path / "adapter")
    wide = load_adapter(load(base), tmp_path / "adapter").float()
    before = {name: (parameter.dtype, parameter.detach().clone()) for name, parameter in narrow.named_parameters()}
    (got,), (expected,) = _logits(narrow, [row]), _logits(wide, [row])
    assert torch.equal(got, expected)
    assert torch.bfloat16 in {dtype for dtype, _ in before.values()}
    for name, parameter in narrow.named_parameters():
        assert parameter.dtype == before[name][0]
        assert torch.equal(parameter, before[name][1])


def test_one_wrong_tensor_is_found_and_the_folder_marked(tmp_path: Path, rows: Path) -> None:
    folder = merged(tmp_path, tiny_llama(tmp_path / "base"))
    perturb(folder, "model.layers.1.self_attn.o_proj.weight", 0.01)
    with pytest.raises(RunError) as caught:
        verify(folder, rows, print)
    message = str(caught.value)
    assert message.startswith(f"{folder}: not the same model as base + adapter: at 1,000 positions the largest")
    assert message.endswith("; marked unverified")
    assert caught.value.exit_status == 1
    assert note(folder)["verified"] is False
    assert note(folder)["figures"]["max_logit_difference"] > 1e-3


def test_a_merge_that_forgot_the_adapter_is_found(tmp_path: Path, rows: Path) -> None:
    base = tiny_llama(tmp_path / "base")
    folder = merged(tmp_path, base)
    (folder / "model.safetensors").write_bytes((base / "model.safetensors").read_bytes())
    assert main([str(folder), str(rows)]) == 1


def test_a_head_tied_again_is_found(tmp_path: Path, rows: Path) -> None:
    """The trap of tied embeddings: everything is right in the files, and the reloaded model overwrites the head."""
    folder = merged(tmp_path, tiny_qwen2(tmp_path / "base", tie_word_embeddings=True), target=["lm_head"])
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    tensors = load_file(folder / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert main([str(folder), str(rows)]) == 1


def test_not_a_number_never_passes(tmp_path: Path, rows: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = merged(tmp_path, tiny_llama(tmp_path / "base"))
    perturb(folder, "model.norm.weight", float("nan"))
    assert main([str(folder), str(rows)]) == 1
    assert note(folder)["verified"] is False
    assert "its logits are not finite" in capsys.readouterr().err


def test_mistakes_are_one_line(tmp_path: Path, rows: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = tiny_llama(tmp_path / "base")
    assert main([str(base), str(rows)]) == 2
    assert capsys.readouterr().err == f"{base}: no merge wrote this folder (it has no luthier_merge.json)\n"
    folder = merged(tmp_path, base)
    perturb_adapter = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    save_file({k: v + 1 for k, v in perturb_adapter.items()}, tmp_path / "adapter" / "adapter_model.safetensors")
    run = subprocess.run(
        [sys.executable, "-m", "luthier.verify", folder, rows], capture_output=True, text=True, check=False
    )
    assert (run.returncode, run.stderr) == (2, f"{tmp_path / 'adapter'} is not what was merged: it changed since\n")
    assert note(folder)["verified"] is None


def test_a_whole_model_that_changed_since_is_told(
    tmp_path: Path, rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = merged(tmp_path, tiny_llama(tmp_path / "base"), kind="full")
    perturb(tmp_path / "adapter", "model.norm.weight", 1)
    assert main([str(folder), str(rows)]) == 2
    assert capsys.readouterr().err == f"{tmp_path / 'adapter'} is not what was merged: it changed since\n"


@pytest.mark.parametrize("gone", ["base", "adapter"])
def test_what_was_merged_is_gone(tmp_path: Path, rows: Path, gone: str, capsys: pytest.CaptureFixture[str]) -> None:
    folder = merged(tmp_path, tiny_llama(tmp_path / "base"))
    shutil.rmtree(tmp_path / gone)
    assert main([str(folder), str(rows)]) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"{tmp_path / gone}: ") and told.count("\n") == 1, told
    assert note(folder)["verified"] is None


def test_a_comparison_that_dies_without_a_word(tmp_path: Path, rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As one that the system kills for its memory; by another cause; by Ctrl-C, which reaches both."""
    python, merged = tmp_path / "python", tmp_path / "merged"
    monkeypatch.setattr(sys, "executable", str(python))

    def told(ends: str, error: type[BaseException]) -> str:
        python.write_text(f"#!/bin/sh\n{ends}\n")
        python.chmod(0o755)
        with pytest.raises(error) as caught:
            verify(merged, rows, print)
        return str(caught.value)

    why = "the comparison was killed (as the system does when memory runs out)"
    assert told("kill -9 $$", RunError) == f"{merged}: written, but not verified: {why}"
    assert told("exit 3", RunError) == f"{merged}: the comparison died"
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # what runs in the background may ignore it
    try:
        assert told("kill -INT $PPID", KeyboardInterrupt) == f"{merged} is written, but not verified"
    finally:
        signal.signal(signal.SIGINT, before)

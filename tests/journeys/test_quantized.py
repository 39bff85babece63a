"""A quantised base from the recipe to the merged model: the command line, in this process but for the verification."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from luthier import verify
from luthier.cli.main import main
from shell import begin

QUANTIZED = {
    "model": {"quantize": {"kind": "nf4", "double_quant": True, "compute_dtype": "fp16"}},
    "method": {"r": 64},
    "train": {"steps": 8, "optimizer": "paged_adamw_8bit", "eval_every": 4, "save_every": 4},
}
Luthier = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("quantized")
    begin(folder, **QUANTIZED)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LUTHIER_CACHE", str(folder / "cache"))
        patch.chdir(folder)
        yield folder


@pytest.fixture
def luthier(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Luthier:
    """Exit status, output and error stream of one command."""

    def command(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["luthier", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        return int(ended.value.code or 0), *capsys.readouterr()

    return command


def answer(said: tuple[int, str, str]) -> str:
    status, out, error = said
    assert status == 0, error
    return str(json.loads(out)["reply"])


@pytest.mark.full  # ten seconds, of which three go to the fresh process that verifies
def test_train_compare_generate_and_merge(place: Path, luthier: Luthier) -> None:
    status, trained, error = luthier("train", "town.yaml")
    assert status == 0, error
    lines = trained.splitlines()
    why = "(fp16 as the recipe says, but a CPU computes in bf16)"
    held = f"linear layers in nf4, double quantisation, computed in bf16 {why}; the head is not quantised"
    assert lines.count(f"{place / 'model'}: {held}") == 1
    assert any(
        re.fullmatch(r"model: \d{3}\.\d KiB of weights \(fp32, nf4\), 110,912 parameters on cpu", line)
        for line in lines
    ), lines
    assert "train.optimizer: a CPU has nothing to page to: paged_adamw_8bit is adamw_8bit" in lines
    assert any(line.startswith("engine = reference") for line in lines)
    curve = [json.loads(line) for line in (place / "runs/town/metrics.jsonl").read_text().splitlines()]
    assert curve[-1]["eval_loss"] < curve[0]["eval_loss"]
    assert yaml.safe_load((place / "runs/town/recipe.yaml").read_text())["model"]["quantize"]["double_quant"] is True

    asked = ("--prompt", "Where is 7?", "--max-new-tokens", "6", "--json")
    quantised = luthier("generate", "runs/town", *asked)
    assert "linear layers in nf4" in quantised[2]
    sample = json.loads((place / "runs/town/samples.jsonl").read_text().splitlines()[0])
    assert sample["reply"].startswith(answer(quantised))
    plain = luthier("generate", "runs/town", "--quantize", "none", *asked)
    assert "linear layers in" not in plain[2] and plain[0] == 0
    assert "linear layers in int8" in luthier("generate", "runs/town", "--quantize", "int8", *asked)[2]
    assert luthier("generate", "runs/town", "--quantize", "int4", *asked)[0] == 2

    status, compared, error = luthier("compare", "runs/town", "--rows", "2")
    assert status == 0 and "linear layers in nf4" in compared, error
    status, merged, error = luthier("merge", "runs/town", "-o", "merged")
    assert status == 0, error
    said = next(line for line in merged.splitlines() if "the nf4 model that was trained" in line)
    note = json.loads((place / "merged" / "luthier_merge.json").read_text())
    figures = note["quantised"]["figures"]
    assert note["verified"] is True and note["figures"]["max_logit_difference"] <= 1e-3
    assert 1e-6 < figures["mean_kl"] < 1 and figures["positions"] == note["figures"]["positions"]
    assert f"differs from it, as its base is unquantised: mean KL {figures['mean_kl']:.1e}" in said
    assert answer(luthier("generate", "merged", *asked)) == answer(plain)
    assert "linear layers in int8" in luthier("generate", "merged", "--quantize", "int8", *asked)[2]


def test_what_is_not_installed_is_missed_before_anything_is_loaded(
    place: Path, luthier: Luthier, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("luthier.models.quantize.importlib.util.find_spec", lambda name: None)
    rest = "needs bitsandbytes, which is not installed: pip install luthier[quant]\n"
    for overrides, key in [
        ((), "model.quantize: nf4"),
        (("model.quantize=none", "generate.quantize=int8"), "generate.quantize: int8"),
        (("model.quantize=none", "train.optimizer=lion_8bit"), "train.optimizer: lion_8bit"),
    ]:
        status, out, error = luthier("train", "town.yaml", "run=missing", *overrides)
        assert (status, out, error) == (2, "", f"error: {key} {rest}")
    assert not (place / "runs" / "missing").exists()


def test_answers_may_be_quantised_otherwise_and_a_merge_tells_what_quantisation_changed(
    place: Path, luthier: Luthier, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = ("run=other", "generate.quantize=int8", "train.steps=3", "train.eval_every=3", "train.batch=4")
    status, trained, error = luthier("train", "town.yaml", *changes, "--no-proof")
    assert status == 0, error
    assert "linear layers in int8" not in trained
    lines = [json.loads(line) for line in (place / "runs/other/samples.jsonl").read_text().splitlines()]
    replies = [line["reply"] for line in lines if line["step"] == 3]
    asked = [part for prompt in ("Where is 7?", "你好，谁？") for part in ("--prompt", prompt)]
    said = luthier("generate", "runs/other", "--json", *asked)
    assert "linear layers in int8" in said[2]
    assert [json.loads(line)["reply"] for line in said[1].splitlines()] == replies

    def here(command: list[str], **_: object) -> SimpleNamespace:
        return SimpleNamespace(returncode=verify.main(command[3:]), stderr="")

    monkeypatch.setattr(verify.subprocess, "run", here)  # the fresh process is the full journey's
    found = []
    for out, installed in (("measured", True), ("unmeasured", False)):
        if not installed:
            monkeypatch.setattr("luthier.models.quantize.importlib.util.find_spec", lambda name: None)
        status, merged, error = luthier("merge", "runs/other", "-o", out)
        assert status == 0, error
        found.append((merged, json.loads((place / out / "luthier_merge.json").read_text())))
    (merged, note), (unmeasured, other) = found
    figures = note["quantised"]["figures"]
    assert note["verified"] is other["verified"] is True
    assert 1e-6 < figures["mean_kl"] < 1 and figures["positions"] == note["figures"]["positions"]
    assert note["quantised"]["trained"] == {"dtype": "auto", "quantize": QUANTIZED["model"]["quantize"]}
    assert (
        f"the nf4 model that was trained differs from it, as its base is unquantised: mean KL {figures['mean_kl']:.1e}"
    ) in merged
    assert other["quantised"]["figures"] is None
    assert "the nf4 model that was trained was not held against it: the quantised model needs bitsandb" in unmeasured

"""Whole verbs as a user runs them: real processes, a tiny real model, an empty folder."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from shell import ENVIRONMENT, LUTHIER, begin, luthier, well
from tiny import tiny_llama


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run."""
    folder = tmp_path_factory.mktemp("journey")
    os.environ["LUTHIER_CACHE"] = str(folder / "cache")
    ENVIRONMENT["LUTHIER_CACHE"] = str(folder / "cache")
    begin(folder)
    (folder / "train.txt").write_text(well(folder, "train", "town.yaml", "track=[tensorboard]"))
    return folder


def test_a_run_leaves_what_the_design_says(trained: Path) -> None:
    run = trained / "runs" / "town"
    names = {path.name for path in run.iterdir()}
    assert names == {
        ".lock", "adapter", "checkpoints", "data.json", "environment.json", "metrics.jsonl", "proof.json",
        "recipe.yaml", "rejected.jsonl", "report.html", "samples.jsonl", "status.json", "tensorboard", "trackers",
    }  # fmt: skip
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(9))
    assert [line["step"] for line in lines if line["eval_loss"] is not None] == [0, 4, 8]
    assert lines[8]["loss"] < lines[1]["loss"] and lines[8]["eval_loss"] < lines[0]["eval_loss"]
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "luthier.json"} <= {
        path.name for path in (run / "adapter").iterdir()
    }
    assert [path.name for path in sorted((run / "checkpoints").iterdir())] == [f"step-{n:06d}" for n in (4, 6, 8)]
    assert json.loads((run / "status.json").read_text())["state"] == "done"
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert [(line["step"], line["prompt"]) for line in samples] == [
        (step, prompt) for step in (0, 4, 8) for prompt in ("Where is 7?", "你好，谁？")
    ]
    assert yaml.safe_load((run / "recipe.yaml").read_text())["train"]["weight_decay"] == 0.0
    assert "next: luthier compare runs/town" in (trained / "train.txt").read_text()


def test_a_run_is_held_against_the_reference_before_it_begins(trained: Path, tmp_path: Path) -> None:
    kept = json.loads((trained / "runs" / "town" / "proof.json").read_text())
    figure = f"{kept['tried']['engine']['difference']:.0e}"
    said = f"engine = reference, {figure} ({len(kept['rows'])} rows, loss and 28 gradients; fp32)"
    lines = (trained / "train.txt").read_text().splitlines()
    assert lines.index(said) < next(number for number, line in enumerate(lines) if line.startswith("eval"))
    assert kept["path"] == "engine" and kept["tried"]["engine"]["difference"] < 1e-5 and len(kept["rows"]) >= 2
    begin(tmp_path, train={"steps": 2})
    unproven = well(tmp_path, "train", "town.yaml", "--no-proof")
    assert "\nengine not proven, as asked; the loss of 2 rows is the reference's\n" in unproven
    assert json.loads((tmp_path / "runs" / "town" / "proof.json").read_text())["gradients"] == 0


def test_plain_peft_opens_the_adapter(trained: Path) -> None:
    code = (
        "from peft import PeftModel; from transformers import AutoModelForCausalLM as A;"
        "m = PeftModel.from_pretrained(A.from_pretrained('model'), 'runs/town/adapter');"
        "print(sum(p.abs().sum().item() for n, p in m.named_parameters() if 'lora_B' in n) > 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=trained, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.stdout == "True\n", done.stderr


@pytest.mark.full
def test_compare_merge_and_generate(trained: Path) -> None:
    shown = well(trained, "compare", "runs/town", "--rows", "4")
    assert "Where is 7?" in shown and "base" in shown and "tuned" in shown
    assert {"compare.md", "compare.html", "compare.json"} <= {path.name for path in (trained / "runs/town").iterdir()}
    merged = well(trained, "merge", "runs/town", "-o", "merged")
    assert "verified" in merged
    note = json.loads((trained / "merged" / "luthier_merge.json").read_text())
    assert note["verified"] is True and note["figures"]["max_logit_difference"] <= 1e-3
    asked = ["--prompt", "Where is 7?", "--max-new-tokens", "6", "--json"]
    replies = [
        json.loads(well(trained, "generate", *target, *asked))
        for target in (["runs/town"], ["merged"], ["model", "--adapter", "runs/town/adapter"], ["runs/town", "--base"])
    ]
    assert replies[0] == replies[1] == replies[2] != replies[3]


@pytest.mark.full
def test_an_adapter_counts_once_and_a_folder_is_not_written_over(trained: Path) -> None:
    if not (trained / "merged").exists():
        well(trained, "merge", "runs/town", "-o", "merged")
    asked = ["--prompt", "Where is 7?", "--max-new-tokens", "6", "--json"]
    again = luthier(trained, "generate", "merged", "--adapter", "runs/town/adapter", *asked)
    assert again.returncode == 2 and "is merged into it already and would count twice" in again.stderr
    taken = luthier(trained, "merge", "runs/town", "-o", "merged")
    assert taken.returncode == 2 and taken.stderr.startswith("error: ") and "merged" in taken.stderr


@pytest.mark.full
def test_prompts_come_from_files_and_standard_input(trained: Path) -> None:
    (trained / "prompt.txt").write_text("Where is 3?\n")
    (trained / "prompts.jsonl").write_text('"Where is 1?"\n{"prompt": "谁？"}\n')
    short = ["--max-new-tokens", "4", "--json"]
    lines = well(trained, "generate", "runs/town", "--prompt-file", "prompts.jsonl", *short).splitlines()
    assert [json.loads(line)["prompt"] for line in lines] == ["Where is 1?", "谁？"]
    piped = json.loads(well(trained, "generate", "runs/town", *short, said="Where is 3?\n"))
    assert piped["prompt"] == "Where is 3?"
    talk = well(trained, "chat", "runs/town", said="Where is 3?\nAnd 4?\n/new\nAnd 5?\n/exit\n")
    assert len(talk.splitlines()) >= 3


@pytest.mark.full
def test_resume_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    """SIGTERM: the step is finished, a checkpoint written, exit 143; resumed, it ends like a run that never stopped."""
    begin(tmp_path, train={"steps": 40, "log_every": 1})
    well(tmp_path, "train", "town.yaml", "run=straight")
    command = [str(LUTHIER), "train", "town.yaml"]
    process = subprocess.Popen(command, cwd=tmp_path, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True)
    metrics = tmp_path / "runs" / "town" / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.read_text().count("\n") > 5):
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    output = process.communicate()[0]
    assert process.returncode == 143, output
    assert output.splitlines()[-1].endswith("go on with: luthier train runs/town --resume")
    well(tmp_path, "train", "runs/town", "--resume")
    keep = ("step", "loss", "eval_loss", "lr", "grad_norm")
    curves = [
        [{key: json.loads(line)[key] for key in keep} for line in path.read_text().splitlines()]
        for path in (metrics, tmp_path / "runs" / "straight" / "metrics.jsonl")
    ]
    assert curves[0] == curves[1]
    adapters = [
        (tmp_path / "runs" / name / "adapter" / "adapter_model.safetensors").read_bytes()
        for name in ("town", "straight")
    ]
    assert adapters[0] == adapters[1]
    changed = luthier(tmp_path, "train", "runs/town", "--resume", "train.lr=1e-3")
    assert changed.returncode == 2 and "train.lr: 0.005" in changed.stderr


@pytest.mark.full
def test_full_fine_tuning_makes_the_same_journey(tmp_path: Path) -> None:
    begin(tmp_path, method={"kind": "full", "r": None, "dropout": None}, train={"lr": 1e-3, "steps": 4})
    recipe = yaml.safe_load((tmp_path / "town.yaml").read_text())
    recipe["method"] = {"kind": "full"}
    (tmp_path / "town.yaml").write_text(yaml.safe_dump(recipe))
    well(tmp_path, "train", "town.yaml")
    assert (tmp_path / "runs" / "town" / "model" / "model.safetensors").is_file()
    well(tmp_path, "compare", "runs/town", "--rows", "2")
    assert "verified" in well(tmp_path, "merge", "runs/town", "-o", "merged")


def test_a_users_mistake_is_one_line_and_exit_2(tmp_path: Path) -> None:
    path = begin(tmp_path)
    tiny_llama(tmp_path / "small", vocab_size=100)
    for arguments, words in [
        (["train", path, "model.name=./small"], "and the model has embeddings for 100 tokens only"),
        (["train", "nowhere.yaml"], "nowhere.yaml"),
        (["train", path, "train.batchsize=3"], "train.batchsize: unknown key; did you mean train.batch?"),
        (["train", path, "method.target=[fc_in]"], "target: fc_in matches no layer"),
        (["compare", "nowhere"], "there is no run nowhere"),
        (["generate", "./nowhere", "--prompt", "x"], "nowhere"),
        (["generate", "./model", "--prompt", "x", "--top-k", "3"], "--top-k has no effect without --sample"),
        (["train", path, "--resume"], "there is no run town below"),
    ]:
        done = luthier(tmp_path, *arguments)
        assert done.returncode == 2, (arguments, done.stdout, done.stderr)
        assert done.stderr.startswith("error: ") and words in done.stderr, (arguments, done.stderr)
        assert "Traceback" not in done.stderr
    assert not (tmp_path / "runs").exists()  # nothing half written

"""Each system's recipe from look to the merged model, small; its exact figures; and the traps that it steps around."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

from luthier.cli import main as cli
from luthier.recipe import load_recipe
from systems import RECIPES, SYSTEMS, System


class Shell(NamedTuple):
    """The command line in a folder, in this process: the seven journeys are forty verbs."""

    folder: Path
    patch: pytest.MonkeyPatch
    screen: pytest.CaptureFixture[str]

    def __call__(self, *words: str, status: int = 0) -> str:
        self.patch.chdir(self.folder)
        self.patch.setattr(sys, "argv", ["luthier", *words])
        ended = 0
        try:
            cli.main()
        except SystemExit as end:
            ended = int(end.code or 0)
        said = "".join(self.screen.readouterr())
        assert ended == status, said
        return said


@pytest.fixture
def shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Shell]:
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_COLOR", "1")
    shutil.copytree(RECIPES, tmp_path, dirs_exist_ok=True)
    yield Shell(tmp_path, monkeypatch, capsys)


def reply(screen: str) -> dict[str, object]:
    """What --json wrote; asides come behind it here."""
    return next(json.loads(line) for line in screen.splitlines() if line.startswith('{"prompt"'))


def lines(file: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()]


LONG = {"S1", "S2", "S3", "S5", "S6", "S7"}  # their traps are tested below all the same


@pytest.mark.parametrize("things", ["stand-ins", pytest.param("real", marks=pytest.mark.full)])
@pytest.mark.parametrize(
    "system",
    [pytest.param(one, marks=[pytest.mark.full] * (one.name in LONG), id=one.name) for one in SYSTEMS],
)
def test_a_system_from_look_to_the_merged_model(
    shell: Shell, system: System, things: str, request: pytest.FixtureRequest
) -> None:
    """With stand-ins of this repository for tokenizer and data; in test-full with the shared folder's real ones, where
    it has them (Gemma's tokenizer it has not: a stand-in there as well)."""
    if system.quantised:
        pytest.importorskip("bitsandbytes")
    shared = request.getfixturevalue("shared") if things == "real" else None
    changes, stands_in = system.begin(shell.folder, shared)
    assert stands_in == (["tokenizer", "data"] if shared is None else ["tokenizer"] * (system.name == "S2"))
    name = system.recipe.removesuffix(".yaml")
    run = shell.folder / "runs" / name

    looked = shell("look", system.recipe, *changes)
    assert "end" in looked and (shell.folder / f"{name}-look.html").stat().st_size > 5000

    trained = shell("train", system.recipe, *changes)
    assert "= reference" in trained, trained
    steps = [line for line in lines(run / "metrics.jsonl") if line["loss"] is not None]
    assert len(steps) >= 3
    assert json.loads((run / "proof.json").read_text())["path"] in ("engine", "own_logits")
    if system.quantised:
        kind = QUANTISED[system.name]
        assert f": linear layers in {kind}" in trained and f", {kind}), " in trained

    compared = shell("compare", str(run), "--rows", "2")
    assert "base" in compared and "tuned" in compared

    merged = shell("merge", str(run), "-o", "merged")
    assert "verified" in merged
    prompt = ["--prompt", "你好", "--max-new-tokens", "6", "--greedy", "--json"]
    if system.name not in ("S3", "S4", "S5"):
        prompt += ["--raw"]
    first, again = (reply(shell("generate", target, *prompt)) for target in (str(run), "merged"))
    assert first["prompt"] == again["prompt"] and isinstance(again["reply"], str)
    if not system.quantised:
        assert first == again
    refused = shell("generate", "merged", "--adapter", str(run / "adapter"), *prompt, status=2)
    assert "is merged into it already and would count twice" in refused


FIGURES = """
S1:
  method: {r: 8, alpha: 32, dropout: 0.05, target: [q_proj, v_proj]}
  train: {batch: 4, lr: 1.0e-4}
  generate: {prompts: prompt.txt, raw: true, max_new_tokens: 200, quantize: int8}
S2:
  data: {text: "Quote: {quote}\\nAuthor: {author}", supervise: all, max_length: 1024}
  method: {r: 8, alpha: 8, dropout: 0.0}
  train: {batch: 4, steps: 10, lr: 2.0e-4, warmup: 2, optimizer: paged_adamw_8bit, log_every: 1}
  generate: {prompts: ["Quote: Imagination is more"], raw: true, max_new_tokens: 20}
S3:
  data: {text: "### Human: {prompt} ### Assistant: {response}", sample: 1000, max_length: 512, supervise: answers}
  method: {r: 64, alpha: 16, dropout: 0.1, target: [q_proj, v_proj]}
  train: {batch: 16, steps: 100, lr: 2.0e-4, warmup: 0, log_every: 10, devices: [0]}
  merge: {dtype: fp16}
S4:
  model: {dtype: bf16}
  data: {join: "", system: 现在你要扮演皇帝身边的女人--甄嬛, max_length: 384}
  method: {r: 8, alpha: 32, dropout: 0.1}
  train: {batch: 40, epochs: 3, lr: 1.0e-4, warmup: 0, log_every: 10, save_every: 100, activation_checkpointing: true}
  generate: {prompts: [你是谁, 1.11 和 1.9 那个大], max_length: 2500, sample: true, top_k: 1}
S5:
  model: {dtype: bf16}
  data: {template: yuan2, max_length: 384}
  method: {r: 8, alpha: 32, dropout: 0.1}
  train: {batch: 12, epochs: 3, lr: 1.0e-4, log_every: 1, save_every: epoch, keep: all, activation_checkpointing: true}
S6:
  data: {text: "{quote}", supervise: all}
  method: {r: 8, alpha: 32, dropout: 0.05, target: [q_proj, k_proj, v_proj, out_proj, fc1, fc2]}
  train: {batch: 4, steps: 100, lr: 2.0e-4, precision: fp16, log_every: 20, activation_checkpointing: true}
  generate: {prompts: [Python is the best programming language.], raw: true, max_length: 50}
S7:
  data: {join: "\\n", template: glm3_pair, max_prompt: 510, max_answer: 1535, too_long: cut, seed: 8}
  method: {r: 4, alpha: 32, dropout: 0.05, target: [query_key_value]}
  train: {batch: 48, epochs: 1, lr: 1.0e-3, warmup: 0.1, optimizer: adamw, precision: fp16, log_every: 100}
"""
QUANTISED = {"S1": "int8", "S2": "nf4", "S3": "nf4", "S4": None, "S5": None, "S6": "int8", "S7": "nf4"}


@pytest.mark.parametrize("system", SYSTEMS, ids=lambda system: system.name)
def test_a_recipe_carries_its_tutorials_figures(system: System, tmp_path: Path) -> None:
    """Those of the tutorials, and explicitly what a tutorial leaves to its library."""
    said = yaml.safe_load((RECIPES / system.recipe).read_text("utf-8"))
    resolved = load_recipe(RECIPES / system.recipe, check_files=False).model_dump(mode="json")
    for section, values in yaml.safe_load(FIGURES)[system.name].items():
        for key, value in values.items():
            value = str(RECIPES / value) if key == "prompts" and isinstance(value, str) else value
            assert key in said[section] and resolved[section][key] == value, (section, key)
    quantise = said["model"].get("quantize")
    assert (quantise["kind"] if isinstance(quantise, dict) else quantise) == QUANTISED[system.name]
    left_out = {"weight_decay": 0, "betas": [0.9, 0.999], "eps": 1e-8, "clip": 1.0, "seed": 42}
    assert left_out.keys() <= said["train"].keys()
    assert {key: resolved["train"][key] for key in left_out} == left_out
    assert said["train"]["schedule"] == ("constant" if system.name == "S1" else "linear")
    assert said["method"]["bias"] == "none"


# -- traps: what the tutorials do wrong ------------------------------------------------------------------------------


def system(name: str) -> System:
    return next(each for each in SYSTEMS if each.name == name)


@pytest.mark.full
def test_s1_contradictory_generation_settings_are_repaired(shell: Shell) -> None:
    """transformers refuses to save temperature and top_p without sampling, after all the work is done."""
    changes = [*system("S1").begin(shell.folder, None)[0], "model.quantize=none", "generate.quantize=null"]
    (shell.folder / "model.v1/generation_config.json").write_text(
        json.dumps({"bos_token_id": 0, "eos_token_id": 1, "do_sample": False, "temperature": 0.9, "top_p": 0.6})
    )
    trained = shell("train", "s1_llama2_7b_int8.yaml", *changes)
    assert "generation_config.json contradicts itself; dropped: temperature 0.9, top_p 0.6" in trained
    shell("merge", "runs/s1_llama2_7b_int8", "-o", "merged")
    settings = json.loads((shell.folder / "merged/generation_config.json").read_text())
    assert "temperature" not in settings and "top_p" not in settings


def test_s2_every_row_is_trained_on_and_its_end_is_taught(shell: Shell) -> None:
    changes = [*system("S2").begin(shell.folder, None)[0], "model.quantize=none", "train.optimizer=adamw"]
    shell("train", "s2_gemma_2b_nf4.yaml", *changes, "data.sample=null")
    report = json.loads((shell.folder / "runs/s2_gemma_2b_nf4/data.json").read_text())
    assert report["train_rows"] == 144 and report["supervised_tokens"] > report["train_rows"] * 5
    looked = shell("look", "s2_gemma_2b_nf4.yaml", *changes)
    assert looked.count("</s>⟧") == 3, looked  # each row that is shown


def test_s3_input_is_kept_the_sample_has_a_seed_and_the_prompt_is_not_taught(shell: Shell) -> None:
    changes = [*system("S3").begin(shell.folder, None)[0], "model.quantize=none"]
    shell("train", "s3_llama2_13b_chinese_nf4.yaml", *changes, "train.steps=1")
    texts = [str(row["text"]) for row in lines(shell.folder / "belle_1000.jsonl")]
    assert len(texts) == 24 and any("In town?" in text for text in texts)
    assert all(text.startswith("### Human: Where is ") and " ### Assistant: By the river" in text for text in texts)
    (shell.folder / "belle_1000.jsonl").unlink()
    shell("train", "s3_llama2_13b_chinese_nf4.yaml", *changes, "train.steps=1", "run=again")
    assert [str(row["text"]) for row in lines(shell.folder / "belle_1000.jsonl")] == texts
    refused = shell("train", "s3_llama2_13b_chinese_nf4.yaml", *changes, "train.devices=[0, 1]", status=2)
    assert "train.devices" in refused and "GPU" in refused


def test_s6_a_target_that_is_not_there_is_an_error_with_the_close_names(shell: Shell) -> None:
    changes = [*system("S6").begin(shell.folder, None)[0], "model.quantize=none"]
    targets = "method.target=[q_proj, k_proj, v_proj, out_proj, fc_in, fc_out]"
    refused = shell("train", "s6_opt_6_7b_int8.yaml", *changes, targets, status=2)
    assert "fc_in matches no layer of this opt model; close: " in refused and "fc1" in refused


def test_s4_the_turns_own_end_is_taught_and_a_long_row_is_no_row_without_an_end(shell: Shell) -> None:
    """The tutorial teaches the pad token instead of <|im_end|>, and cuts both off at 384 tokens."""
    [*changes], _ = system("S4").begin(shell.folder, None)
    rows = json.loads((shell.folder / "huanhuan.json").read_text("utf-8"))[:9]
    rows.append({"instruction": "谁？", "input": "", "output": "河边的老城。" * 100})
    (shell.folder / "huanhuan.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    looked = shell("look", "s4_qwen2_1_5b_huanhuan.yaml", *changes, "data.sample=null", "--rows", "9")
    assert looked.count("<|im_end|>⟧") == 9 and "甄嬛" in looked
    assert "9 rows to train on, 0 held out, 1 too long, dropped" in looked
    cut = shell(
        "look", "s4_qwen2_1_5b_huanhuan.yaml", *changes, "data.sample=null", "data.too_long=cut", "--rows", "10"
    )
    assert cut.count("<|im_end|>⟧") == 10 and "10 rows to train on, 0 held out, 1 cut" in cut


def test_s5_no_vendor_code_runs_and_the_end_is_taught_though_it_is_pad_and_beginning(shell: Shell) -> None:
    """A dot in the folder's name broke the dynamic import of code that is not imported here."""
    changes, _ = system("S5").begin(shell.folder, None)
    folder = shell.folder / "model.v1"
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "theirs.Config", "AutoModelForCausalLM": "theirs.Model"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "theirs.py").write_text("raise SystemExit('vendor code ran')")
    assert len({config["pad_token_id"], config["bos_token_id"], config["eos_token_id"]}) == 1
    looked = shell("look", "s5_yuan2_2b_medical.yaml", *changes)
    assert looked.count("<eod>⟧") == 3 and looked.count("<sep>⟦") == 3


def test_s7_what_is_cut_is_counted_and_keeps_its_end(shell: Shell) -> None:
    changes, _ = system("S7").begin(shell.folder, None)
    looked = shell("look", "s7_chatglm3_6b_adgen.yaml", *changes, "data.max_answer=8", "--rows", "5")
    assert "144 cut" in looked, looked
    assert looked.count("</s>⟧") == 5  # each row that is shown

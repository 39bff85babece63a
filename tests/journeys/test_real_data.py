"""Real data and a real pretrained model, where the shared folder is there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

LUTHIER = Path(sys.executable).parent / "luthier"
PLAIN = """
import json, sys
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
base, adapter, quotes = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(base)
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
told = 0
for line in open(quotes, encoding="utf-8").readlines()[:10]:
    asked = tokenizer("Quote: " + json.loads(line)["quote"], return_tensors="pt")
    reply = model.generate(**asked, max_new_tokens=40, do_sample=False)[0, asked.input_ids.shape[1]:]
    told += "\\nAuthor:" in tokenizer.decode(reply)
print(told)
"""


def luthier(folder: Path, *arguments: str, status: int = 0) -> str:
    environment = os.environ | {"NO_COLOR": "1", "LUTHIER_CACHE": str(folder / "cache")}
    done = subprocess.run([LUTHIER, *arguments], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == status, done.stderr + done.stdout
    return done.stdout + done.stderr


def recipe(folder: Path, shared: Path, file: str, more: str = "") -> None:
    lines = [f"model: {{name: {shared / 'tokenizers' / 'qwen2'}}}", "data:", f"  train: {shared / 'data' / file}", more]
    (folder / "look.yaml").write_text("\n".join(lines) + "\n", encoding="utf-8")


@pytest.mark.full
@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("huanhuan.json", "alpaca: prompt = instruction + input, response = output"),
        ("advertisegen.jsonl", "prompt: prompt = content, response = summary"),
        ("advertisegen_messages.jsonl", "messages: turns = messages"),
        ("sharegpt_zh.jsonl", "sharegpt: turns = conversations"),
        ("alpaca_52k.json.gz", "alpaca: prompt = instruction + input, response = output"),
    ],
)
def test_real_files_are_looked_at_with_no_format_given(shared: Path, tmp_path: Path, file: str, words: str) -> None:
    recipe(tmp_path, shared, file)
    screen = luthier(tmp_path, "look", "look.yaml")
    assert words in screen and "rows whose end is not taught" in screen.rpartition("none  ")[2]
    assert (tmp_path / "look-look.html").stat().st_size > 10_000


@pytest.mark.full
def test_a_table_with_names_of_its_own_is_told_the_line_to_paste(shared: Path, tmp_path: Path) -> None:
    recipe(tmp_path, shared, "medical_zh_en.csv")
    told = luthier(tmp_path, "look", "look.yaml", status=2)
    line = next(line for line in told.splitlines() if line.strip().startswith("columns:"))
    assert line == "  columns: {prompt: en, response: zh}"
    recipe(tmp_path, shared, "medical_zh_en.csv", line)
    assert "prompt = en, response = zh" in luthier(tmp_path, "look", "look.yaml")


@pytest.mark.full
def test_a_real_model_learns_real_quotes_and_plain_peft_opens_it(shared: Path, tmp_path: Path) -> None:
    """150 steps of LoRA r 16: the held-out loss falls by more than 35 %, and a quote is followed by its author."""
    base, quotes = shared / "models" / "stories260k", shared / "data" / "english_quotes.jsonl"
    lines = [
        f"model: {{name: {base}}}",
        f"data: {{train: {quotes}, eval: 0.05, max_length: 512, supervise: all,",
        r'  text: "Quote: {quote}\nAuthor: {author}"}',
        "method: {kind: lora, r: 16, target: all_linear}",
        "train: {batch: 32, steps: 150, lr: 3e-3, log_every: 50, eval_every: 50}",
    ]
    (tmp_path / "quotes.yaml").write_text("\n".join(lines) + "\n", encoding="utf-8")
    luthier(tmp_path, "train", "quotes.yaml")
    metrics = (tmp_path / "runs/quotes/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    losses = [line["eval_loss"] for line in map(json.loads, metrics) if line["eval_loss"] is not None]
    assert len(losses) == 4 and losses[-1] <= 0.65 * losses[0]
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-c",
        PLAIN,
        str(base),
        str(tmp_path / "runs/quotes/adapter"),
        str(quotes),
    ]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == "10"

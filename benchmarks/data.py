"""From JSON lines to ready rows, beside TRL and LLaMA-Factory: python benchmarks/data.py [FILE] --tokenizer FOLDER

FILE: JSON lines (or an array) of {instruction, input, output}, as alpaca_52k; without one it makes 20,000 rows of its
own. FOLDER: a tokenizer with a chat template, as Qwen2's; without one, that of the quickstart's tiny model. `--trl
PYTHON` and `--llamafactory PYTHON` name the interpreters of environments that have them; each is given the same rows
as a file, nothing cached, in a process of its own. The ways take turns; medians of three are printed. What is timed
begins behind the imports and the tokenizer (and TRL's tiny model), and ends with the last encoded row. For TRL it
covers reading the file with `datasets`, turning its columns into prompt and completion, and making an SFTTrainer, which
encodes the rows; for LLaMA-Factory it is its get_dataset. Both have as many processes as there are cores.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import psutil

WORDS = Path(__file__).read_text(encoding="utf-8").split()
REPETITIONS = 3

LUTHIER = """
from datetime import date
from luthier.data.encode import Encoder
from luthier.data.prepare import prepare
from luthier.models.load import load_tokenizer
from luthier.sections import DataSection
os.environ["LUTHIER_CACHE"] = fresh
section = DataSection(train=file, bad_rows="skip")
encoder = Encoder(load_tokenizer(Path(tokenizer)), section, date.today())
begin()
done(len(prepare(section, encoder, lambda line: None).train))
begin()
prepare(section, encoder, lambda line: None)
warm()
"""
TRL = """
import datasets
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from trl import SFTConfig, SFTTrainer
rows = lambda row: {
    "prompt": [{"role": "user", "content": "\\n".join(filter(None, (row["instruction"], row["input"])))}],
    "completion": [{"role": "assistant", "content": row["output"]}],
}
made = AutoTokenizer.from_pretrained(tokenizer)
shape = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
model = LlamaForCausalLM(LlamaConfig(vocab_size=len(made), **shape))
config = SFTConfig(fresh, max_length=2048, dataset_num_proc=cores, report_to=[], use_cpu=True, bf16=False)
begin()
data = datasets.load_dataset("json", data_files=file, cache_dir=fresh, split="train")
data = data.map(rows, remove_columns=data.column_names, num_proc=cores)
trainer = SFTTrainer(model, config, train_dataset=data, processing_class=made)
done(len(trainer.train_dataset))
"""
LLAMAFACTORY = """
from llamafactory.data import get_dataset, get_template_and_fix_tokenizer
from llamafactory.hparams import get_train_args
from transformers import AutoTokenizer
(Path(fresh) / "dataset_info.json").write_text(json.dumps({"rows": {"file_name": file}}))
made = AutoTokenizer.from_pretrained(tokenizer)
model, data, training, _, _ = get_train_args(dict(
    model_name_or_path=tokenizer, stage="sft", do_train=True, dataset="rows", dataset_dir=fresh, template="qwen",
    cutoff_len=2048, preprocessing_num_workers=cores, output_dir=fresh, overwrite_cache=True, report_to="none",
    use_cpu=True))
template = get_template_and_fix_tokenizer(made, data)
begin()
done(len(get_dataset(template, model, data, training, "sft", tokenizer=made)["train_dataset"]))
"""
FRAME = """
import json, os, sys, time
from pathlib import Path
file, tokenizer, fresh, cores = *sys.argv[1:4], int(sys.argv[4])
os.environ["HF_DATASETS_CACHE"], os.environ["HF_HUB_OFFLINE"] = fresh, "1"
told = {}
def begin(): told["began"] = time.perf_counter()
def done(rows): told.update(rows=rows, seconds=time.perf_counter() - told["began"])
def warm(): told["warm"] = time.perf_counter() - told["began"]
if __name__ == "__main__":
"""


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("file", nargs="?")
    asked.add_argument("--tokenizer", default=str(Path(__file__).parents[1] / "src/luthier/assets/tiny"))
    asked.add_argument("--rows", type=int, help="the first so many; more than there are: varied by a number at the end")
    asked.add_argument("--trl", metavar="PYTHON")
    asked.add_argument("--llamafactory", metavar="PYTHON")
    given = asked.parse_args()
    ways = {"luthier": (sys.executable, LUTHIER)}
    for name, python, code in (("trl", given.trl, TRL), ("llamafactory", given.llamafactory, LLAMAFACTORY)):
        if python:
            ways[name] = (python, code)
        else:
            print(f"{name}: left out; --{name} PYTHON names an environment that has it")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.json"
        count = write(file, given.file, given.rows)
        print(f"{count:,} rows, {cores()} cores")
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for repetition in range(REPETITIONS):
            for name, (python, code) in ways.items():
                told = measure(python, code, file, given.tokenizer)
                seconds[name].append(told["seconds"])
                behind = f", {told['warm']:.2f} s from the cache" if "warm" in told else ""
                print(
                    f"{repetition + 1}/{REPETITIONS}  {name}: {told['seconds']:.2f} s, {told['rows']:,.0f} rows left, "
                    f"peak {told['peak']:,.0f} MiB above the imports{behind}",
                    flush=True,
                )
    print("medians")
    ours = statistics.median(seconds["luthier"])
    for name, took in seconds.items():
        median = statistics.median(took)
        print(f"{name:12}  {count / median:8,.0f} rows/s  luthier {median / ours:.2f} × as fast")


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def write(file: Path, given: str | None, rows: int | None) -> int:
    """The rows as JSON lines; how many."""
    if given is None:
        drawn = random.Random(0)
        texts = [" ".join(drawn.choices(WORDS, k=60)) for _ in range(rows or 20_000)]
        whole = [{"instruction": text[:80], "input": "", "output": text[80:]} for text in texts]
    else:
        text = Path(given).read_text(encoding="utf-8")
        whole = json.loads(text) if text.lstrip().startswith("[") else [json.loads(line) for line in text.splitlines()]
    count = rows or len(whole)
    with file.open("w", encoding="utf-8") as out:
        for i in range(count):
            turn, row = i // len(whole), whole[i % len(whole)]
            if turn:
                row = {**row, "output": f"{row['output']} {i}"}
            out.write(json.dumps(row, ensure_ascii=False) + "\n")
    return count


def measure(python: str, code: str, file: Path, tokenizer: str) -> dict[str, float]:
    """seconds, rows, and the peak of its and its children's memory above that at the start, MiB."""
    frame = FRAME + "".join(f"    {line}\n" for line in code.strip().splitlines())
    frame = frame.replace("    begin()", "    begin(); print('begun', flush=True)", 1) + "    print(json.dumps(told))\n"
    with tempfile.TemporaryDirectory() as fresh:
        script = Path(fresh) / "way.py"
        script.write_text(frame, encoding="utf-8")
        arguments = [python, str(script), str(file), tokenizer, fresh, str(cores())]
        with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            return _watched(process, psutil.Process(process.pid))


def _watched(process: subprocess.Popen[str], told: psutil.Process) -> dict[str, float]:
    assert process.stdout is not None and process.stderr is not None
    errors: list[str] = []
    threading.Thread(target=lambda: errors.append(process.stderr.read() if process.stderr else ""), daemon=True).start()
    start, peak, over = 0, 0, threading.Event()

    def memory() -> int:
        total = 0
        for one in (told, *told.children(recursive=True)):
            try:
                info = one.memory_full_info()
                total += info.uss
            except psutil.Error:
                continue
        return total

    def watch() -> None:
        nonlocal peak
        while not over.wait(0.25):
            try:
                peak = max(peak, memory())
            except psutil.Error:
                return

    last = ""
    for line in process.stdout:
        if line.strip() == "begun":
            start = memory()
            threading.Thread(target=watch, daemon=True).start()
        last = line if line.startswith("{") else last
    over.set()
    if process.wait() or not last:
        sys.exit(f"{process.args[0]}: {errors[0][-2000:] if errors else 'ended early'}")  # type: ignore[index]
    return {**json.loads(last), "peak": max(peak - start, 0) / 2**20}


if __name__ == "__main__":
    main()

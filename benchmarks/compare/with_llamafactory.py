"""LLaMA-Factory's own SFT run, plain or with neat_packing.

The rows come in through its data files, and its template would give them one token more each (a line break behind the
end token is taught): each row's text is its number, and the encoder is told the ids. All else is LLaMA-Factory's.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from llamafactory.data.processor.processor_utils import greedy_knapsack
from llamafactory.data.processor.supervised import SupervisedDatasetProcessor
from llamafactory.train.tuner import run_exp
from probe import Probe, job_of, tokens
from watch import Watch, arguments

PACK = 1024
"""Tokens of a packed row (LLaMA-Factory adds a place of padding)."""


def main() -> None:
    job = job_of()
    torch.set_num_threads(job["threads"])
    probe = Probe(job)
    packed, rows, work = job["variant"] == "neat_packing", tokens(job), Path(job["work"])
    encode_as(rows)
    batch, parts = job["batch"], len(rows) // job["batch"]
    if packed:
        batch, parts = 1, len(greedy_knapsack([len(row["input_ids"]) for row in rows], PACK))
        probe.facts["packed_rows"] = parts
    numbers = [{"instruction": str(number), "input": "", "output": "-"} for number in range(len(rows))]
    (work / "rows.json").write_text(json.dumps(numbers))
    (work / "dataset_info.json").write_text(json.dumps({"rows": {"file_name": "rows.json"}}))
    run_exp(settings(job, batch, parts, packed), callbacks=[Watch(probe)])
    probe.write(["llamafactory", "peft", "accelerate"])


def settings(job: dict[str, Any], batch: int, parts: int, packed: bool) -> dict[str, Any]:
    """As its YAML file has them."""
    return {
        **arguments(job, batch, parts),
        "model_name_or_path": job["folder"] + "/model",
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "lora",
        "lora_rank": 8,
        "lora_alpha": 32,
        "lora_target": "all",
        "dataset_dir": job["work"],
        "dataset": "rows",
        "template": "qwen",
        "cutoff_len": PACK,
        "packing": packed,
        "neat_packing": packed,
        "disable_gradient_checkpointing": not job.get("checkpointing", True),
        "bf16": job.get("bf16", False),
        "overwrite_cache": True,
    }


def encode_as(rows: list[dict[str, list[int]]]) -> None:
    """Give these ids and labels to the rows whose text is their number."""

    def encode(self: Any, prompt: list[dict[str, str]], **others: Any) -> tuple[list[int], list[int]]:
        row = rows[int(prompt[0]["content"])]
        return list(row["input_ids"]), list(row["labels"])

    SupervisedDatasetProcessor._encode_data_example = encode


if __name__ == "__main__":
    main()

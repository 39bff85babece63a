"""Unsloth's FastLanguageModel and its SFTTrainer on tokenised rows, asked to pack; whether it did is among the facts.

(2026.10 on a CPU: "packing needs FlashAttention to keep packed examples apart, turning it off". It then pads.)
"""

from __future__ import annotations

from typing import Any

import unsloth  # noqa: F401 (first: it patches what is imported after it)

# isort: split
import torch
from datasets import Dataset
from probe import Probe, job_of, tokens
from trl import SFTConfig, SFTTrainer
from unsloth import FastLanguageModel
from watch import SEVEN, Watch, arguments

PACK = 1024
"""Tokens of a packed row."""


def main() -> None:
    job = job_of()
    torch.set_num_threads(job["threads"])
    probe = Probe(job)
    model, tokenizer = FastLanguageModel.from_pretrained(
        job["folder"] + "/model", max_seq_length=PACK, dtype=torch.bfloat16, load_in_4bit=False
    )
    model = FastLanguageModel.get_peft_model(
        model, r=8, lora_alpha=32, lora_dropout=0, target_modules=SEVEN, use_gradient_checkpointing="unsloth"
    )
    rows = tokens(job)
    data = Dataset.from_list([{"input_ids": row["input_ids"], "labels": row["labels"]} for row in rows])

    def trainer_of(batch: int, parts: int) -> Any:
        args = SFTConfig(**arguments(job, batch, parts), max_length=PACK, packing=True)
        return SFTTrainer(
            model=model, args=args, train_dataset=data, processing_class=tokenizer, callbacks=[Watch(probe)]
        )

    parts = len(rows) // job["batch"]
    trainer = trainer_of(job["batch"], parts)
    if trainer.args.packing:  # as many packed rows as the step's rows fill make its step
        parts = len(trainer.train_dataset)
        trainer = trainer_of(1, parts)
    probe.facts |= {"packing": bool(trainer.args.packing), "padding_free": bool(trainer.args.padding_free)}
    probe.facts["batches"] = [list(batch["input_ids"].shape) for batch in trainer.get_train_dataloader()]
    assert len(probe.facts["batches"]) == parts, "a step would be other rows"
    trainer.train()
    probe.write(["unsloth", "unsloth_zoo", "trl", "peft"])


if __name__ == "__main__":
    main()

"""TRL's SFTTrainer, padded or packed, by its own defaults (checkpointing, bf16 autocast) on tokenised rows."""

from __future__ import annotations

import torch
from datasets import Dataset
from peft import LoraConfig
from probe import Probe, job_of, tokens
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer
from trl.data_utils import pack_dataset
from watch import SEVEN, Watch, arguments

PACK = 1024
"""Tokens of a packed row."""


def main() -> None:
    job = job_of()
    torch.set_num_threads(job["threads"])
    probe = Probe(job)
    packed = job["variant"] == "packed"
    model = AutoModelForCausalLM.from_pretrained(job["folder"] + "/model", dtype=torch.bfloat16)
    rows = tokens(job)
    data = Dataset.from_list([{"input_ids": row["input_ids"], "labels": row["labels"]} for row in rows])
    batch, parts = job["batch"], len(rows) // job["batch"]
    if packed:  # as many packed rows as the step's rows fill make its step
        batch, parts = 1, len(pack_dataset(data, PACK, "bfd"))
        probe.facts["packed_rows"] = parts
    checkpointing = job.get("checkpointing", True)
    args = SFTConfig(
        **arguments(job, batch, parts), max_length=PACK, packing=packed, gradient_checkpointing=checkpointing
    )
    trainer = SFTTrainer(
        model=model,
        args=args,
        train_dataset=data,
        processing_class=AutoTokenizer.from_pretrained(job["folder"] + "/model"),
        peft_config=LoraConfig(task_type="CAUSAL_LM", target_modules=SEVEN, r=8, lora_alpha=32),
        callbacks=[Watch(probe)],
    )
    assert len(trainer.get_train_dataloader()) == parts, "a step would be other rows"
    trainer.train()
    probe.facts["autocast"] = bool(args.bf16)
    probe.write(["trl", "peft", "accelerate"])


if __name__ == "__main__":
    main()

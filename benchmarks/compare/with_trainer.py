"""The tutorial script: transformers' Trainer and PEFT, padded batches, full logits, checkpointing (S4)."""

from __future__ import annotations

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from probe import Probe, job_of, tokens
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments
from watch import SEVEN, Watch, arguments


def main() -> None:
    job = job_of()
    torch.set_num_threads(job["threads"])
    probe = Probe(job)
    model = AutoModelForCausalLM.from_pretrained(job["folder"] + "/model", dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(job["folder"] + "/model")
    model.enable_input_require_grads()
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules=SEVEN, r=8, lora_alpha=32))
    rows = tokens(job)
    Trainer(
        model=model,
        args=TrainingArguments(**arguments(job, job["batch"], len(rows) // job["batch"]), gradient_checkpointing=True),
        train_dataset=Dataset.from_list([row | {"attention_mask": [1] * len(row["input_ids"])} for row in rows]),
        data_collator=DataCollatorForSeq2Seq(tokenizer, padding=True),
        callbacks=[Watch(probe)],
    ).train()
    probe.write(["peft", "accelerate"])


if __name__ == "__main__":
    main()

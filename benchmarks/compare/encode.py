"""One contestant's own way from a JSON-lines file of messages to token ids with labels, timed from file to rows.

The libraries and the tokenizer are loaded before; nothing is in a cache. It runs in that contestant's environment.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from probe import job_of

Way = Callable[[], int]


def main() -> None:
    job = job_of()
    way = WAYS[job["group"]](job, job["folder"] + "/messages.jsonl")
    began = time.perf_counter()
    rows = way()
    Path(job["out"]).write_text(json.dumps({"rows": rows, "seconds": time.perf_counter() - began}))


def tutorial(job: dict[str, Any], file: str) -> Way:
    """datasets.map row by row, prompt and answer encoded apart, as the tutorials have it."""
    from datasets import load_dataset
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(job["folder"] + "/model")

    def encode(row: dict[str, Any]) -> dict[str, list[int]]:
        *before, answer = row["messages"]
        prompt = "".join(f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n" for turn in before)
        ids = tokenizer(prompt + "<|im_start|>assistant\n", add_special_tokens=False)["input_ids"]
        target = tokenizer(answer["content"] + "<|im_end|>", add_special_tokens=False)["input_ids"]
        return {"input_ids": (ids + target)[: job["max_length"]], "labels": [-100] * len(ids) + target}

    def way() -> int:
        data = load_dataset("json", data_files=file, split="train", cache_dir=job["work"])
        return len(data.map(encode, remove_columns=data.column_names))

    return way


def trl(job: dict[str, Any], file: str) -> Way:
    """SFTTrainer's own preparation; nothing is masked, which is less work than the others have."""
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    model = AutoModelForCausalLM.from_pretrained(job["folder"] + "/model")
    tokenizer = AutoTokenizer.from_pretrained(job["folder"] + "/model")
    args = SFTConfig(output_dir=job["work"], use_cpu=True, report_to="none", max_length=job["max_length"])

    def way() -> int:
        data = load_dataset("json", data_files=file, split="train", cache_dir=job["work"])
        return len(SFTTrainer(model=model, args=args, train_dataset=data, processing_class=tokenizer).train_dataset)

    return way


def unsloth(job: dict[str, Any], file: str) -> Way:
    """Its notebooks' way: the template's text, SFTTrainer, train_on_responses_only."""
    from unsloth import FastLanguageModel  # isort: skip
    from datasets import load_dataset
    from trl import SFTConfig, SFTTrainer
    from unsloth.chat_templates import train_on_responses_only

    model, tokenizer = FastLanguageModel.from_pretrained(
        job["folder"] + "/model", max_seq_length=job["max_length"], load_in_4bit=False
    )
    model = FastLanguageModel.get_peft_model(model, r=8)
    args = SFTConfig(output_dir=job["work"], use_cpu=True, report_to="none", max_length=job["max_length"])

    def texts(rows: dict[str, Any]) -> dict[str, Any]:
        return {"text": [tokenizer.apply_chat_template(turns, tokenize=False) for turns in rows["messages"]]}

    def way() -> int:
        data = load_dataset("json", data_files=file, split="train", cache_dir=job["work"]).map(texts, batched=True)
        trainer = SFTTrainer(model=model, args=args, train_dataset=data, processing_class=tokenizer)
        marks = {"instruction_part": "<|im_start|>user\n", "response_part": "<|im_start|>assistant\n"}
        return len(train_on_responses_only(trainer, **marks).train_dataset)

    return way


def llamafactory(job: dict[str, Any], file: str) -> Way:
    """Its data loader, with the template qwen."""
    from llamafactory.data import get_dataset, get_template_and_fix_tokenizer
    from llamafactory.hparams import get_train_args
    from llamafactory.model import load_tokenizer

    columns = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    known = {"file_name": file, "formatting": "sharegpt", "columns": {"messages": "messages"}}
    tags = {"tags": columns | {"system_tag": "system"}}
    Path(job["work"], "dataset_info.json").write_text(json.dumps({"rows": known | tags}))
    settings = {"model_name_or_path": job["folder"] + "/model", "stage": "sft", "do_train": True, "template": "qwen"}
    settings |= {"dataset_dir": job["work"], "dataset": "rows", "cutoff_len": job["max_length"], "use_cpu": True}
    settings |= {"output_dir": job["work"] + "/out", "finetuning_type": "lora", "overwrite_cache": True}
    model_args, data_args, training_args, _, _ = get_train_args(settings)
    tokenizer = load_tokenizer(model_args)
    template = get_template_and_fix_tokenizer(tokenizer["tokenizer"], data_args)

    def way() -> int:
        model_args.cache_dir = tempfile.mkdtemp(dir=job["work"])
        return len(get_dataset(template, model_args, data_args, training_args, "sft", **tokenizer)["train_dataset"])

    return way


def luthier(job: dict[str, Any], file: str) -> Way:
    """Its data path, as a run has it; LUTHIER_CACHE is an empty folder."""
    from datetime import date

    from luthier.loaded import load_data, load_encoder
    from luthier.recipe import load_recipe

    settings = {"model": {"name": job["folder"] + "/model"}, "data": {"train": file, "max_length": job["max_length"]}}
    recipe = Path(job["work"], "recipe.yaml")
    recipe.write_text(json.dumps(settings | {"data": settings["data"] | {"too_long": "cut"}}))
    chosen = load_recipe(recipe, [])
    _, _, encoder = load_encoder(chosen, lambda line: None, date(2026, 1, 1))
    return lambda: len(load_data(chosen, encoder, lambda line: None).train)


WAYS: dict[str, Callable[[dict[str, Any], str], Way]] = {
    "tutorial script": tutorial,
    "TRL": trl,
    "LLaMA-Factory": llamafactory,
    "Unsloth": unsloth,
    "Luthier": luthier,
}

if __name__ == "__main__":
    main()

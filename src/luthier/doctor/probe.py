"""What `luthier doctor` tries out: torch, each device, the libraries, a LoRA step, quantised layers.

`python -m luthier.doctor.probe torch device …` goes through stages and prints a finding a line, as JSON, and a line
{"done": stage} after each. trial.py starts it, reads along, and outlives it.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import re
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from luthier.doctor.driver import Driver, find_driver
from luthier.doctor.finding import GIB, Finding, reason
from luthier.doctor.libraries import installed

NEED_TORCH = ("torch", "device", "bitsandbytes", "models")
IMPORTED = ("numpy", "pyarrow", "tokenizers", "safetensors", "huggingface_hub", "datasets")
ADD_ONS = ("torchvision", "torchaudio", "torchao", "flash_attn", "xformers", "deepspeed", "apex")
"""Packages that transformers and peft import where they are installed, and that break when they fit another torch."""


def stages() -> list[str]:
    """What there is to try here, in the order of repair: an add-on that breaks transformers comes before it."""
    named = ["torch", "device", "imports", "sentencepiece", *filter(_there, ADD_ONS), "bitsandbytes", "models"]
    return named if _there("torch") else without_torch(named)


def without_torch(named: Sequence[str]) -> list[str]:
    """Those of the stages that mean something where torch does not work."""
    return [stage for stage in named if stage not in (*NEED_TORCH, *ADD_ONS)]


def main(named: Sequence[str]) -> None:
    """Go through the stages. What libraries print goes to the error stream: standard output is for findings."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def tell(value: dict[str, Any]) -> None:
        out.write(json.dumps(value) + "\n")
        out.flush()

    for stage in named:
        try:
            for finding in STAGES[stage]() if stage in STAGES else _add_on(stage):
                tell(finding._asdict())
        except Exception as error:  # whatever a broken library raises
            tell(failed(stage, reason(error))._asdict())
        tell({"done": stage})


def failed(stage: str, how: str) -> Finding:
    """The line of a stage that could not end as it should."""
    what = {"device": "GPU", "models": "transformers", "imports": "libraries"}.get(stage, stage)
    if stage == "torch":
        return Finding("✗", what, how, find_driver().torch_line())
    if stage == "device":
        return Finding(
            "✗", what, how, "export CUDA_VISIBLE_DEVICES=  (for the CPU alone; then see what nvidia-smi says)"
        )
    if stage in (*ADD_ONS, "bitsandbytes"):
        return Finding("✗", what, how, f"pip uninstall -y {stage.replace('_', '-')}  (Luthier can do without)")
    names = {"models": "transformers peft accelerate", "imports": " ".join(IMPORTED)}.get(stage, stage)
    return Finding("✗", what, how, f"pip install --force-reinstall --no-deps {names}")


def _torch() -> Iterator[Finding]:
    import torch

    driver, cuda, hip = find_driver(), torch.version.cuda, getattr(torch.version, "hip", None)
    about = f"{torch.__version__}, built for {f'CUDA {cuda}' if cuda else f'ROCm {hip}' if hip else 'the CPU'}"
    problem, fix = ("", "") if hip else driver.unfit(cuda, torch.cuda.is_available())
    if problem:
        yield Finding("!", "torch", f"{about}; {problem}", fix)
        return
    limit = f" goes up to CUDA {driver.cuda[0]}.{driver.cuda[1]}" if driver.cuda else ""
    yield Finding("✓", "torch", f"{about}; driver {driver.version}{limit}" if driver.there and cuda else about)


def _device() -> Iterator[Finding]:
    """Each device does a product and its gradient, whose right value is known."""
    import torch

    if not torch.cuda.is_available():
        _check_product(torch.device("cpu"), [torch.float32, torch.bfloat16])
        threads = torch.get_num_threads()
        yield Finding("✓", "cpu", f"product and gradient right in fp32 and bf16; {threads} thread{'s'[: threads != 1]}")
        return
    driver = find_driver()
    for index in range(torch.cuda.device_count()):
        yield _gpu(torch.device("cuda", index), driver)


def _gpu(device: Any, driver: Driver) -> Finding:
    import torch

    capability = torch.cuda.get_device_capability(device)
    bf16 = capability >= (8, 0)
    name = torch.cuda.get_device_name(device)
    what = f"GPU {device.index}"
    about = f"{name}, compute capability {capability[0]}.{capability[1]}, {'bf16' if bf16 else 'no bf16: fp32 or fp16'}"
    try:
        free, total = torch.cuda.mem_get_info(device)
        _check_product(device, [torch.float32, torch.bfloat16 if bf16 else torch.float16])
    except Exception as error:  # CUDA's errors are of several kinds
        said = reason(error)
        return Finding("✗", what, f"{about}: {said}", driver.repair(said, capability))
    room = f"{free / GIB:.1f} of {total / GIB:.1f} GiB free"
    if free < total / 2:
        fix = "nvidia-smi  lists who holds the memory; end them, or name another GPU: export CUDA_VISIBLE_DEVICES=…"
        return Finding("!", what, f"{about}; {room}", fix)
    return Finding("✓", what, f"{about}; {room}; product and gradient right")


def _check_product(device: Any, formats: list[Any]) -> None:
    """Errors: RuntimeError where a device computes wrongly, or whatever torch raises."""
    import torch

    for dtype in formats:
        ones = torch.ones(64, 64, dtype=dtype, device=device, requires_grad=True)
        scale = torch.arange(64, dtype=dtype, device=device)
        product = ones @ torch.diag(scale)
        torch.autograd.backward(product.sum())
        right = scale.expand(64, 64)
        if ones.grad is None or not torch.equal(product, right) or not torch.equal(ones.grad, right):
            raise RuntimeError(f"a product or its gradient is wrong in {str(dtype).removeprefix('torch.')}")


def _imports() -> Iterator[Finding]:
    failed = False
    for name in filter(_there, IMPORTED):
        try:
            importlib.import_module(name)
        except Exception as error:
            failed = True
            yield _broken(name, error)
    if not failed:
        yield Finding("✓", "libraries", f"{', '.join(IMPORTED)} import")


def _sentencepiece() -> Iterator[Finding]:
    """A real tokenizer.model is made, and read by the library and by ourselves."""
    import sentencepiece

    from luthier.models.spm import read_spm

    with tempfile.TemporaryDirectory() as folder:
        rows, prefix = Path(folder) / "rows.txt", Path(folder) / "tokenizer"
        rows.write_text("a tale of two towns and one river\n" * 20, encoding="utf-8")
        sentencepiece.SentencePieceTrainer.Train(
            input=str(rows), model_prefix=str(prefix), vocab_size=24, model_type="bpe", minloglevel=2
        )
        model = prefix.with_suffix(".model")
        pieces = sentencepiece.SentencePieceProcessor(model_file=str(model)).GetPieceSize()
        assert pieces == len(read_spm(model).pieces)
    if importlib.util.find_spec("google") and importlib.util.find_spec("google.protobuf"):
        try:
            importlib.import_module("sentencepiece.sentencepiece_model_pb2")
        except Exception as error:
            needed = re.search(r"gencode ([\d.]+\d)", str(error))
            fix = f"pip install 'protobuf>={needed[1]}'" if needed else "pip install --upgrade protobuf"
            found = f"protobuf {installed('protobuf')} does not fit its code; Luthier reads tokenizer.model without"
            yield Finding("!", "sentencepiece", f"{found}, transformers does not ({reason(error)})", fix)
            return
    yield Finding("✓", "sentencepiece", "a tokenizer.model is made and read")


def _models() -> Iterator[Finding]:
    """The embedded model with LoRA, forward and backward: what transformers, peft and their add-ons do at the start."""
    if not all(map(_there, ("accelerate", "transformers", "peft"))):
        return  # the one that is not there has a line
    for name in ("accelerate", "transformers.modeling_utils", "peft"):
        try:
            importlib.import_module(name)
        except Exception as error:
            yield _broken(name.partition(".")[0], error)
            return
    try:
        device = _one_step()
    except Exception as error:
        yield _broken("peft", error)
        return
    yield Finding("✓", "transformers", f"with peft: the embedded model takes a LoRA step on {device}")


def _one_step() -> str:
    """The device on which it was taken. Errors: whatever the libraries raise."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    device = "cuda" if torch.cuda.is_available() else "cpu"
    with resources.as_file(resources.files("luthier") / "assets" / "tiny") as folder:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        base: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = get_peft_model(base.to(device), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    ids = tokenizer("Where do they meet?", return_tensors="pt").input_ids.to(device)
    model(input_ids=ids, labels=ids).loss.backward()
    moved = [value.grad for name, value in model.named_parameters() if "lora_B" in name]
    if not all(grad is not None and grad.isfinite().all() and grad.any() for grad in moved):
        raise RuntimeError("a LoRA step of the embedded model has no gradient")
    return device


def _bitsandbytes() -> Iterator[Finding]:
    """An int8 and an nf4 layer on this device: product and gradient, near those of the numbers they stand for."""
    if not _there("bitsandbytes"):
        what = "not installed; for model.quantize and 8-bit optimizers: pip install 'luthier[quant]'"
        yield Finding("✓", "bitsandbytes", what)
        return
    fix = "pip install --force-reinstall --no-deps bitsandbytes  (or: pip uninstall bitsandbytes)"
    try:
        importlib.import_module("bitsandbytes")
        device = _quantised_products()
    except Exception as error:
        found = f"{installed('bitsandbytes')}: model.quantize will not work: {reason(error)}"
        yield Finding("!", "bitsandbytes", found, fix)
        return
    found = f"{installed('bitsandbytes')}: int8 and nf4 products and gradients right on {device}"
    yield Finding("✓", "bitsandbytes", found)


def _quantised_products() -> str:
    import torch
    from bitsandbytes import nn

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cpu" or torch.cuda.get_device_capability() >= (8, 0) else torch.float16
    torch.manual_seed(0)
    weight, x = torch.randn(64, 64), torch.randn(8, 64)
    layers = {
        "int8": (nn.Linear8bitLt(64, 64, bias=False, has_fp16_weights=False), 0.05),
        "nf4": (nn.Linear4bit(64, 64, bias=False, quant_type="nf4", compute_dtype=dtype), 0.2),
    }  # with how far they may be off: nf4's own rounding is a tenth
    for name, (layer, bound) in layers.items():
        layer.weight.data.copy_(weight)
        layer, given = layer.to(device), x.to(device, dtype).requires_grad_()
        product = layer(given)
        product.sum().backward()
        assert given.grad is not None
        for value, right in ((product, x @ weight.T), (given.grad, weight.sum(0).expand(8, 64))):
            off = float((value.detach().float().cpu() - right).norm() / right.norm())
            if not off < bound:
                raise RuntimeError(f"{name} on {device} is off by {off:.0%}")
    return device


def _add_on(name: str) -> Iterator[Finding]:
    """One that Luthier does not need, and transformers or peft may import: well where nothing is said."""
    try:
        importlib.import_module(name)
    except Exception as error:
        fix = f"pip uninstall -y {name.replace('_', '-')}  (Luthier does not need it)"
        yield Finding("!", name, f"{installed(name)} does not import: {reason(error)}", fix)


def _broken(name: str, error: BaseException) -> Finding:
    """A library that does not import, with the add-on that it stumbled over where it is one."""
    trace = "".join(traceback.format_exception(error))
    guilty = next((one for one in (*ADD_ONS, "bitsandbytes") if f"/{one}/" in trace), None)
    fix = f"pip install --force-reinstall --no-deps {name.replace('_', '-')}"
    if guilty:
        fix = f"pip uninstall -y {guilty.replace('_', '-')}  (Luthier can do without)"
    return Finding("✗", name, f"{installed(name)} does not work: {reason(error)}", fix)


def _there(name: str) -> bool:
    return importlib.util.find_spec(name.partition(".")[0]) is not None


STAGES: dict[str, Callable[[], Iterator[Finding]]] = {
    "torch": _torch,
    "device": _device,
    "imports": _imports,
    "sentencepiece": _sentencepiece,
    "bitsandbytes": _bitsandbytes,
    "models": _models,
}


if __name__ == "__main__":
    main(sys.argv[1:])

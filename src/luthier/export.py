"""A run's adapter in the layout of the model's vendor, for who computes with the vendor's own code.

Only ChatGLM3's differs from what is computed with: its query_key_value is q_proj, k_proj and v_proj here.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor

from luthier.errors import ModelError
from luthier.folder import folder_atomic, write_json
from luthier.merge import MERGEABLE, PREFIX
from luthier.models.adapters import CONFIG, TENSORS, read_adapter, read_adapter_config
from luthier.models.chatglm3 import ChatGLMConfig, rows_of, vendor_name
from luthier.models.fused import FUSED, PARTS
from luthier.models.load import Say, read_config

NAMING = {"rank_pattern", "alpha_pattern", "exclude_modules", "layers_to_transform", "layers_pattern"}
RENAMED = MERGEABLE - NAMING - {"use_rslora", "bias", "modules_to_save"}
"""LoRA options that are the same for the vendor's layers."""


def export(base: Path, adapter: Path, out: Path, *, say: Say) -> None:
    """Write the adapter of a ChatGLM3 as a PEFT folder for its vendor's layers: the same function, number by number.

    Where q, k and v share one A, it is that of query_key_value. Where each has its own, they are stacked and the B's
    stand block by block: the rank is the sum of theirs, alpha / r stays.
    Errors: ModelError where there is no adapter or nothing to translate, out is taken, or it is more than plain LoRA.
    """
    config = read_config(base)
    if config.get("model_type") != ChatGLMConfig.model_type:
        raise ModelError(f"{adapter}: it is in the layout of the model's vendor already; use it as it is")
    if not (adapter / CONFIG).is_file():
        raise ModelError(f"{adapter}: a whole model (full fine-tuning) is a GLM folder; only an adapter is exported")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ModelError(f"{out}: it exists and is not empty; remove it, or name another folder")
    lora = _plain_lora(adapter)
    tensors = _vendor_tensors(read_adapter(adapter), rows_of(config))
    with folder_atomic(out) as folder:
        save_file({PREFIX + name: tensor for name, tensor in tensors.items()}, folder / TENSORS)
        written = _vendor_config(lora, base, tensors, config["num_layers"])
        write_json(folder / CONFIG, written)
    if ranks := written["rank_pattern"]:
        shown = ", ".join(map(str, sorted(set(ranks.values()))))
        say(f"query, key and value do not share an A: {FUSED} gets their ranks' sum, {shown}; alpha / r stays")
    say(f"{out}: a PEFT adapter for the vendor's own layers ({', '.join(written['target_modules'])})")


def _plain_lora(adapter: Path) -> LoraConfig:
    config, plain = read_adapter_config(adapter), LoraConfig().to_dict()
    if not isinstance(config, LoraConfig):
        raise ModelError(f"{adapter}: an adapter of type {config.peft_type.value} cannot be exported; ship its folder")
    if odd := sorted(key for key, value in config.to_dict().items() if key not in RENAMED and value != plain.get(key)):
        raise ModelError(f"{adapter}: an adapter with {', '.join(odd)} cannot be exported; luthier merge takes it")
    return config


def _vendor_tensors(tensors: dict[str, Tensor], rows: tuple[int, ...]) -> dict[str, Tensor]:
    """The adapter's tensors by the vendor's names. `rows`: of query, key and value."""
    renamed: dict[str, Tensor] = {}
    fused: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for key, tensor in sorted(tensors.items()):
        name = key.removeprefix(PREFIX)
        if part := next((part for part in PARTS if f".{part}." in name), None):
            fused[vendor_name(name)][part] = tensor
        else:
            renamed[vendor_name(name)] = tensor
    for name in [name for name in fused if ".lora_A." in name]:
        of_b = name.replace(".lora_A.", ".lora_B.")
        renamed[name], renamed[of_b] = _joined(fused[name], fused[of_b], rows)
    return renamed


def _joined(a: dict[str, Tensor], b: dict[str, Tensor], rows: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """A: [r, in] and B: [rows, r] of some of the parts → those of query_key_value, with r or the sum of the r's."""
    first, *others = a.values()
    if len(a) == len(PARTS) and all(torch.equal(first, other) for other in others):
        return first, torch.cat([b[part] for part in PARTS])
    there = [part for part in PARTS if part in a]
    blocks = [torch.zeros(count, 0) if part not in a else b[part] for part, count in zip(PARTS, rows, strict=True)]
    return torch.cat([a[part] for part in there]), torch.block_diag(*blocks)  # type: ignore[no-untyped-call]


def _vendor_config(lora: LoraConfig, base: Path, tensors: dict[str, Tensor], layers: int) -> dict[str, Any]:
    """adapter_config.json: layers by their last name where all of that name are adapted, else in full."""
    modules: dict[str, list[str]] = defaultdict(list)
    for name in tensors:
        module, _, kind = name.rpartition(".lora_")
        if kind in ("A.weight", "embedding_A"):
            modules[module.rpartition(".")[2]].append(module)
    ranks = {module: tensors[f"{module}.lora_A.weight"].shape[0] for module in modules[FUSED]}
    other = {module: rank for module, rank in ranks.items() if rank != lora.r}
    if other and len(set(ranks.values())) == 1:
        other = {FUSED: other.popitem()[1]}
    changed = {
        "base_model_name_or_path": str(base.absolute()),
        "target_modules": sorted(
            name
            for last, found in modules.items()
            for name in ([last] if len(found) == layers or ".layers." not in found[0] else found)
        ),
        "rank_pattern": other,
        "alpha_pattern": {name: lora.lora_alpha * rank / lora.r for name, rank in other.items()},
    }
    return {**lora.to_dict(), **changed}

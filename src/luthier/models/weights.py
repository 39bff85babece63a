"""The tensors of a model folder, one at a time: what there is and how it is stored, without loading the model."""

from __future__ import annotations

import hashlib
import json
import pickle
import zipfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from luthier.errors import ModelError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""A recipe's names of number formats."""
_SAFETENSORS = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


@dataclass(frozen=True)
class Stored:
    """One tensor on disk. `dtype` is torch's, or the file's own name where it is no plain float (I64, F8_E4M3 …)."""

    shape: tuple[int, ...]
    dtype: torch.dtype | str
    read: Callable[[], Tensor]


@dataclass(frozen=True)
class Weights:
    """A folder's tensors by name, in the order of the files."""

    folder: Path
    tensors: dict[str, Stored]

    @property
    def dtype(self) -> torch.dtype | str:
        """The format in which most of the numbers are stored."""
        numbers: Counter[torch.dtype | str] = Counter()
        for tensor in self.tensors.values():
            numbers[tensor.dtype] += torch.Size(tensor.shape).numel()
        return numbers.most_common(1)[0][0]


def open_weights(folder: Path) -> Weights:
    """Open a model folder's weight files. Errors: ModelError when one is missing, cut short or more than tensors."""
    tensors: dict[str, Stored] = {}
    for file in weight_files(folder):
        tensors |= _open_safetensors(file) if file.suffix == ".safetensors" else _open_pickle(file)
    return Weights(folder, tensors)


def weight_files(folder: Path) -> list[Path]:
    """A folder's weight files, in order. Errors: ModelError when there is none, or a shard is missing."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            return [folder / name]
        if index.is_file():
            names = _shards(index)
            missing = [shard for shard in names if not (folder / shard).is_file()]
            if missing:
                raise ModelError(
                    f"{folder}: {len(missing)} of {len(names)} weight files are missing, the first is {missing[0]}; "
                    "download the model again"
                )
            return [folder / shard for shard in names]
    raise ModelError(
        f"{folder}: it holds no weights (model.safetensors, its shards with their index, or pytorch_model.bin)"
    )


def fingerprint(folder: Path) -> str:
    """Of a folder's weights: another where a file was written since (names, sizes, times), without reading them."""
    files = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in weight_files(folder)]
    return hashlib.sha256(repr(files).encode()).hexdigest()[:16]


def _shards(index: Path) -> list[str]:
    try:
        return sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ModelError(f"{index}: not an index of weight files; download the model again") from None


def name_of(dtype: torch.dtype | str) -> str:
    """fp32, bf16, fp16, or the file's own name of another format."""
    return next((name for name, known in DTYPES.items() if known == dtype), str(dtype).removeprefix("torch."))


def _open_safetensors(file: Path) -> dict[str, Stored]:
    try:
        handle: Any = safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ModelError(
            f"{file}: not a whole safetensors file ({error}); was its download cut, or is it a git-lfs pointer?"
        ) from None

    def stored(name: str) -> Stored:
        header = handle.get_slice(name)
        dtype = _SAFETENSORS.get(header.get_dtype(), header.get_dtype())
        return Stored(tuple(header.get_shape()), dtype, lambda: handle.get_tensor(name))

    return {name: stored(name) for name in handle.keys()}  # noqa: SIM118  (a handle is no mapping)


def _open_pickle(file: Path) -> dict[str, Stored]:
    """torch.load maps the zip format of torch ≥ 1.6 from disk; older files come whole into memory."""
    try:
        tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ModelError(
            f"{file}: refused: it is no plain file of tensors, and unpickling anything else may run code ({reason}); "
            "take the model's safetensors files"
        ) from None
    return {
        name: Stored(
            tuple(tensor.shape), tensor.dtype if tensor.is_floating_point() else str(tensor.dtype), tensor.clone
        )
        for name, tensor in tensors.items()
    }

"""Checkpoints from which a run goes on exactly as if it had never stopped.

checkpoints/step-000100/
  adapter_config.json, adapter_model.safetensors    a PEFT folder by itself (full fine-tuning: a Hugging Face model);
                       it holds what PiSSA and OLoRA started from as well
  state.safetensors    weight/NAME (adapters only: a whole model has them in its own files), optimizer/NAME/KEY, rng/…
  state.json           TrainState, the generators of Python and numpy, what the numbers depend on; written last

No pickle in it. Everything goes by parameter name: the order of parameters may change between versions.
"""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from luthier.engine.forward import Route
from luthier.engine.products import faster
from luthier.errors import RunError
from luthier.folder import folder_atomic, write_json
from luthier.models import adapters, starts
from luthier.training.optim import recall, remembered

STATE = "state.json"
TENSORS = "state.safetensors"


@dataclass
class TrainState:
    """Where a run stands, beside its tensors and generators. The order of the data needs nothing but the step."""

    tokens_per_pass: int  # decided once: other cuts after a resume would round otherwise
    asked: int | Literal["auto"] | None = None  # by the recipe, when that was decided
    route: Route = "engine"  # decided once, by the proof
    own_layers: bool = True  # likewise: are no layers fused, because they would differ?
    engine: dict[str, bool] | None = None  # what the recipe asked for, when that was decided
    fp16: bool = False  # is anything computed in it?
    scale: float = 1.0  # of the loss: 1 but for fp16
    steady: int = 0  # steps in a row at that scale
    step: int = 0  # optimizer steps taken
    best_step: int | None = None
    best_eval: float | None = None
    not_better: int = 0  # evaluations in a row without a better loss
    tokens: int = 0
    seconds: float = 0.0


class Generators(NamedTuple):
    """The state of every random generator of a process, as JSON and tensors can hold it."""

    python: Any
    numpy: list[Any]
    torch: dict[str, Tensor]


def generators(device: torch.device) -> Generators:
    """Those of this process."""
    name, words, *rest = np.random.get_state()
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return Generators(random.getstate(), [name, np.asarray(words).tolist(), *rest], states)


def save(
    checkpoints: Path,
    write: Callable[[Path], None],
    parameters: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    state: TrainState,
    keep: int | Literal["all"],
    generators: Sequence[Generators],
) -> Path:
    """Write checkpoints/step-N atomically, then remove all but the newest `keep`.

    `write` puts the adapter (or whole model) into the folder that it is given; `parameters` are the trainable ones;
    `generators` those of each process.
    """
    target = checkpoints / f"step-{state.step:06d}"
    device = next(iter(parameters.values())).device
    with folder_atomic(target) as folder:
        write(folder)
        there = _names(folder)  # a whole model's files: but experts are stored under other names than they train by
        weights = {name: parameter for name, parameter in parameters.items() if name not in there}
        save_file(_tensors(weights, parameters, optimizer, generators), folder / TENSORS)
        record = {
            "state": asdict(state),
            "trainable": list(parameters),
            "generators": [{"python": each.python, "numpy": each.numpy} for each in generators],
            "environment": _environment(device, len(generators)),
        }
        write_json(folder / STATE, record)
    prune(checkpoints, keep)
    return target


def latest(checkpoints: Path) -> Path | None:
    """The newest complete checkpoint."""
    complete = _complete(checkpoints)
    return complete[-1] if complete else None


def load(
    folder: Path,
    parameters: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    say: Callable[[str], None],
    rank: int = 0,
    processes: int = 1,
    exact: bool = True,
) -> TrainState:
    """Put a checkpoint into the trainable parameters, the optimizer and every generator; give back its TrainState.

    This is the process `rank` of `processes`; one that the checkpoint does not know takes the first one's generators.
    Not `exact` (train.base_dropout): what is drawn in sequence depends on where it is computed.

    Errors: RunError where the folder is damaged or was written for other trainable tensors.
    """
    device = next(iter(parameters.values())).device
    try:
        record = json.loads((folder / STATE).read_text("utf-8"))
        tensors = load_file(folder / TENSORS)
        _check_names(folder, set(record["trainable"]), set(parameters))
        _load_weights(folder, tensors, parameters)
        starts.recall(parameters, folder / adapters.TENSORS)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise RunError(f"{folder}: damaged ({error}); delete it to resume from the checkpoint before it") from error
    _load_optimizer(tensors, parameters, optimizer)
    known = rank if rank < len(record["generators"]) else 0
    _load_generators(record["generators"][known], tensors, known, device)
    here, there = _environment(device, processes), record["environment"]
    changed = [f"{key} {there[key]} → {here[key]}" for key in here if here[key] != there.get(key, here[key])]
    if changed:
        then = "be equal only to rounding" if exact else "differ (train.base_dropout)"
        say(f"resume: {', '.join(changed)}: the numbers will {then}")
    return TrainState(**record["state"])


def _tensors(
    weights: dict[str, nn.Parameter],
    parameters: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    generators: Sequence[Generators],
) -> dict[str, Tensor]:
    tensors = {f"weight/{name}": parameter.detach().contiguous() for name, parameter in weights.items()}
    for name, parameter in parameters.items():
        for key, value in remembered(optimizer, parameter).items():
            tensors[f"optimizer/{name}/{key}"] = value
    for rank, each in enumerate(generators):
        tensors |= {f"rng/{rank}/{kind}": value for kind, value in each.torch.items()}
    return tensors


def _load_weights(folder: Path, tensors: dict[str, Tensor], parameters: dict[str, nn.Parameter]) -> None:
    missing = dict(parameters)
    for name, value in _weights(folder, tensors):
        if name in missing:  # a whole model's files also hold what does not train
            parameter = missing.pop(name)
            if value.shape != parameter.shape:
                raise ValueError(f"{name} is {list(value.shape)} there and {list(parameter.shape)} in the model")
            parameter.data.copy_(value)
    if missing:
        raise ValueError(f"it lacks {', '.join(missing)}")


def _weights(folder: Path, tensors: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    for key, value in tensors.items():
        if key.startswith("weight/"):
            yield key.removeprefix("weight/"), value
    for path in _model_files(folder):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 (it is no mapping)
                yield name, file.get_tensor(name)


def _load_optimizer(
    tensors: dict[str, Tensor], parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> None:
    kept: dict[str, dict[str, Tensor]] = {}
    for path, value in tensors.items():
        if path.startswith("optimizer/"):
            name, _, key = path.removeprefix("optimizer/").rpartition("/")
            kept.setdefault(name, {})[key] = value
    for name, values in kept.items():
        recall(optimizer, parameters[name], values)


def _load_generators(record: dict[str, Any], tensors: dict[str, Tensor], rank: int, device: torch.device) -> None:
    version, words, gauss = record["python"]
    random.setstate((version, tuple(words), gauss))
    np.random.set_state(record["numpy"])
    torch.set_rng_state(tensors[f"rng/{rank}/cpu"])
    if device.type == "cuda" and f"rng/{rank}/cuda" in tensors:
        torch.cuda.set_rng_state(tensors[f"rng/{rank}/cuda"], device)


def _environment(device: torch.device, processes: int) -> dict[str, str]:
    """What bit-equal numbers depend on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    threads, count = str(torch.get_num_threads()), str(processes)
    wide = "fp32" if faster() else "16 bits"  # of frozen 16-bit weights, by the processor
    return {
        "torch": torch.__version__, "threads": threads, "device": name, "processes": count, "products": wide,
    }  # fmt: skip


def _check_names(folder: Path, there: set[str], here: set[str]) -> None:
    if there != here:
        names = ", ".join(sorted(there ^ here)[:3])
        raise RunError(f"{folder}: was written for other trainable tensors ({names} …): method or model have changed")


def _model_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("model*.safetensors"))


def _names(folder: Path) -> set[str]:
    names: set[str] = set()
    for path in _model_files(folder):
        with safe_open(path, "pt") as file:
            names.update(file.keys())
    return names


def _complete(checkpoints: Path) -> list[Path]:
    """Oldest first. A folder gets its final name when everything in it is on the disk."""
    found = [path for path in checkpoints.glob("step-*") if re.fullmatch(r"step-\d+", path.name)]
    return sorted((path for path in found if (path / STATE).is_file()), key=lambda path: int(path.name[5:]))


def prune(checkpoints: Path, keep: int | Literal["all"]) -> None:
    """Remove all but the newest `keep`, and what a killed run left half written."""
    for leftover in checkpoints.glob(".step-*"):  # of a run that was killed while it wrote
        shutil.rmtree(leftover)
    if keep != "all":
        for old in _complete(checkpoints)[:-keep]:
            hidden = old.with_name(f".{old.name}.old")  # a removal that is cut short leaves no half checkpoint
            old.replace(hidden)
            shutil.rmtree(hidden)

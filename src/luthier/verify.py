"""The proof of a merge: the folder against base + adapter, both read from disk in a fresh process.

Both are held in the merged format and computed in fp32, so that what differs is the merge. In bf16 arithmetic even one
and the same model changes its first choice for 2 % of the tokens (stories260k, bf16 against fp32; KL 6e-4).

Where the base was quantised in training, the merged model is another one than was trained: how far apart they are is
measured as well, each in its own arithmetic, and reported; it is no failure.

`python -m luthier.verify FOLDER ROWS.npz` compares, marks the folder's luthier_merge.json, and exits 1 over tolerance.
"""

from __future__ import annotations

import gc
import json
import math
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from luthier.errors import LuthierError, ModelError, RunError
from luthier.folder import write_json
from luthier.models.device import pick_device
from luthier.models.weights import DTYPES, open_weights
from luthier.quiet import quiet
from luthier.sections import ModelSection

if TYPE_CHECKING:  # peft speaks while it is imported: a process of its own is made quiet before
    from peft import PeftModel
    from transformers import PreTrainedModel

    from luthier.models.load import Say

POSITIONS = 1000
"""Supervised positions that a verification looks at."""
CHUNK = 64
"""Positions that are compared at a time: in fp64, 64 × 151,936 logits are 78 MB."""
MAX_LOGIT, MEAN_KL, TOP1 = 1e-3, 1e-3, 0.99
"""How far they may differ: any logit in fp32; in bf16 and fp16 the mean divergence (nats) and equal first choices."""

Row = tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]
"""ids and which of them are supervised"""


def write_rows(
    rows: Iterable[tuple[Sequence[int] | np.ndarray, Sequence[bool] | np.ndarray]],
    path: Path,
    positions: int = POSITIONS,
) -> int:
    """Write rows (ids, supervised) to an .npz for `verify`, until `positions` tokens are supervised; their number."""
    ids, supervised, lengths = [], [], []
    for row, flags in rows:
        ids.append(np.asarray(row, np.int32))
        supervised.append(np.asarray(flags, bool))
        lengths.append(len(row))
        if sum(int(flags.sum()) for flags in supervised) >= positions:
            break
    np.savez(path, ids=np.concatenate(ids), supervised=np.concatenate(supervised), lengths=np.asarray(lengths))
    return sum(int(flags.sum()) for flags in supervised)


def verify(folder: Path, rows: Path, say: Say) -> dict[str, Any]:
    """Compare a merged folder with base + adapter, both from disk, in a fresh process; the figures.

    They are kept in the folder's luthier_merge.json with `verified`. Errors: RunError when they are over tolerance
    (the folder is then marked `"verified": false`) or the comparison could not run.
    """
    try:
        child = subprocess.run(
            [sys.executable, "-m", "luthier.verify", str(folder), str(rows)], capture_output=True, text=True
        )
    except KeyboardInterrupt:  # Ctrl-C; the words are for whoever says what there is
        raise KeyboardInterrupt(f"{folder} is written, but not verified") from None
    if child.returncode == -signal.SIGKILL:
        raise RunError(
            f"{folder}: written, but not verified: the comparison was killed (as the system does when memory runs out)"
        )
    if child.returncode != 0:
        raise RunError(child.stderr.strip().rpartition("\n")[2] or f"{folder}: the comparison died")
    figures: dict[str, Any] = _note(folder)["figures"]
    say(f"{folder}: verified: {_shown(figures)}")
    if quantised := _note(folder).get("quantised"):
        say(f"{folder}: {_apart(quantised)}")
    return figures


def main(arguments: Sequence[str]) -> int:
    """`python -m luthier.verify FOLDER ROWS.npz`: compare, mark the folder; the exit status (1 over tolerance)."""
    quiet()
    from luthier.models.adapters import MERGE_NOTE

    folder, rows = map(Path, arguments)
    try:
        note = _note(folder)
        figures, quantised = _compare(folder, note, rows)
        passed = _within(figures, note["dtype"])
        note |= {"verified": passed, "figures": figures} | ({"quantised": quantised} if quantised else {})
        write_json(folder / MERGE_NOTE, note)
        if not passed:
            raise RunError(f"{folder}: not the same model as base + adapter: {_shown(figures)}; marked unverified")
    except LuthierError as error:
        print(error, file=sys.stderr)
        return error.exit_status
    return 0


def _note(folder: Path) -> dict[str, Any]:
    from luthier.models.adapters import MERGE_NOTE

    if not (folder / MERGE_NOTE).is_file():
        raise ModelError(f"{folder}: no merge wrote this folder (it has no {MERGE_NOTE})")
    return dict(json.loads((folder / MERGE_NOTE).read_text(encoding="utf-8")))


def _compare(folder: Path, note: dict[str, Any], file: Path) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """The figures, and the note's part on the quantised model. One model in memory at a time: its logits wait on disk.

    The device is `auto`'s, whatever the run's `train.devices` says: a merge needs none, the folder knows no recipe, and
    both models run on the same one, so that the difference is the merge's on any.
    """
    from luthier.models.load import from_folder

    dtype, device = DTYPES[note["dtype"]], pick_device("auto")
    with np.load(file) as stored:
        cuts = np.cumsum(stored["lengths"])[:-1]
        rows = list(zip(np.split(stored["ids"], cuts), np.split(stored["supervised"], cuts), strict=True))
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as scratch:
        kept = [Path(scratch) / f"{number}.npy" for number in range(len(rows))]
        for path, logits in zip(kept, _logits(_reference(note, dtype, device), rows), strict=True):
            np.save(path, logits.numpy())
        gc.collect()  # the reference is gone before the merged model comes: PEFT's modules refer to each other
        parts = []
        for path, logits in zip(kept, _logits(from_folder(folder, dtype, device)[0], rows), strict=True):
            parts += _in_chunks(torch.from_numpy(np.load(path)), logits, dtype)
            np.save(path, logits.numpy())
        gc.collect()
        quantised = note.get("quantised") and _beside_quantised(note, kept, rows, device)
    return _figures(parts), quantised


def _beside_quantised(note: dict[str, Any], kept: list[Path], rows: list[Row], device: torch.device) -> dict[str, Any]:
    """How far the merged model, whose logits are `kept`, is from the quantised one that was trained; or why unknown."""
    from luthier.models.adapters import load_adapter
    from luthier.models.load import choose_dtype, from_folder
    from luthier.models.quantize import check_installed, quantization, settle, widen

    try:
        check_installed("the quantised model")
        base, section = Path(note["base"]), ModelSection(name="-", **note["quantised"]["trained"])
        dtype, _ = choose_dtype(section.dtype, open_weights(base).dtype, device)
        model, _ = from_folder(base, dtype, device, quantized=quantization(section.quantize))
        widen(model)  # both are computed in fp32: what differs is the quantisation
        settle(model, None)
        parts = []
        adapted = _adapted(load_adapter(model, Path(note["adapter"])), note)
        for path, logits in zip(kept, _logits(adapted, rows, wide=False), strict=True):
            parts += _in_chunks(logits, torch.from_numpy(np.load(path)), DTYPES[note["dtype"]])
    except Exception as error:  # whatever bitsandbytes raises: the merge itself is proven
        return {**note["quantised"], "reason": (str(error).strip() or type(error).__name__).partition("\n")[0]}
    return {**note["quantised"], "figures": _figures(parts)}


def _in_chunks(reference: Tensor, other: Tensor, dtype: torch.dtype) -> list[np.ndarray[Any, Any]]:
    return [
        _differences(reference[at : at + CHUNK], other[at : at + CHUNK], dtype) for at in range(0, len(other), CHUNK)
    ]


def _figures(parts: list[np.ndarray[Any, Any]]) -> dict[str, Any]:
    largest, divergence, same = np.concatenate(parts).T
    figures = {"max_logit_difference": largest.max(), "mean_kl": divergence.mean(), "top1_agreement": same.mean()}
    return {"positions": len(same), **{k: float(v) if math.isfinite(v) else None for k, v in figures.items()}}


def _differences(reference: Tensor, other: Tensor, dtype: torch.dtype) -> np.ndarray[Any, Any]:
    """By position: largest logit difference, KL(reference ‖ other) in nats, 1 where the first choice is the same.

    The other's first choice is the same if the reference's logits, held in `dtype`, have none above it: two logits
    around 10 that are less than 0.06 apart are one number in bf16, and which of their tokens comes first is chance.
    """
    p, q = reference.double().log_softmax(-1), other.double().log_softmax(-1)
    held = reference.to(dtype)
    same = held.gather(-1, other.argmax(-1, keepdim=True))[:, 0] == held.amax(-1)
    return torch.stack([(reference - other).abs().amax(-1), (p.exp() * (p - q)).sum(-1), same], -1).double().numpy()


def _reference(note: dict[str, Any], dtype: torch.dtype, device: torch.device) -> PreTrainedModel | PeftModel:
    from luthier.models.adapters import adapter_hash, load_adapter
    from luthier.models.load import from_folder

    if adapter_hash(Path(note["adapter"])) != note["adapter_sha256"]:
        raise ModelError(f"{note['adapter']} is not what was merged: it changed since")
    if note["kind"] == "full":
        return _whole(note, dtype, device)
    return _adapted(load_adapter(from_folder(Path(note["base"]), dtype, device)[0], Path(note["adapter"])), note)


def _adapted(model: PeftModel, note: dict[str, Any]) -> PeftModel:
    """The adapter at the strength at which it was merged, to stay so."""
    from luthier.models.scaling import set_strength

    set_strength(model, note.get("strength", 1.0))
    return model


def _whole(note: dict[str, Any], dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """After full fine-tuning: the model that trained, or at part of its strength; that is computed in fp32 here too."""
    from luthier.models.load import from_folder
    from luthier.models.scaling import differing, set_whole

    tuned, strength = Path(note["adapter"]), note.get("strength", 1.0)
    if strength == 1:
        return from_folder(tuned, dtype, device)[0]
    model = from_folder(tuned, torch.float32, device)[0]
    moved = differing(from_folder(Path(note["base"]), torch.float32, device)[0], model)
    set_whole(model, moved, strength)
    return model.to(dtype)


@torch.no_grad()
def _logits(model: PreTrainedModel | PeftModel, rows: list[Row], wide: bool = True) -> Iterator[Tensor]:
    """For each row the logits that predict its supervised tokens: fp32 [supervised, vocabulary], on the CPU.

    They are computed in fp32, or where it is not to be `wide` as the model itself does it.
    """
    if wide:
        _compute_in_fp32(model)
    for ids, supervised in rows:
        before = torch.from_numpy(np.flatnonzero(supervised) - 1).to(model.device)
        row = torch.from_numpy(ids.astype(np.int64))[None].to(model.device)
        yield model(input_ids=row, logits_to_keep=before, use_cache=False).logits[0].float().cpu()


def _compute_in_fp32(model: nn.Module) -> None:
    """Each layer turns its own weights to fp32 while it runs: fp32 numbers in the memory of the stored format."""
    stored: dict[nn.Parameter, Tensor] = {}

    def widen(module: nn.Module, _: Any) -> None:
        for parameter in module.parameters(recurse=False):
            stored[parameter] = parameter.data
            parameter.data = parameter.data.float()

    def narrow(module: nn.Module, *_: Any) -> None:
        for parameter in module.parameters(recurse=False):
            parameter.data = stored.pop(parameter)

    for module in model.modules():
        if next(module.parameters(recurse=False), None) is not None:
            module.register_forward_pre_hook(widen)
            module.register_forward_hook(narrow)


def _within(figures: dict[str, Any], dtype: str) -> bool:
    if None in figures.values():
        return False
    if dtype == "fp32":
        return bool(figures["max_logit_difference"] <= MAX_LOGIT)
    return bool(figures["mean_kl"] <= MEAN_KL and figures["top1_agreement"] >= TOP1)


def _shown(figures: dict[str, Any]) -> str:
    if None in figures.values():
        return "its logits are not finite"
    return (
        f"at {figures['positions']:,} positions the largest logit difference is {figures['max_logit_difference']:.1e}, "
        f"the mean KL {figures['mean_kl']:.1e}, the same first choice {figures['top1_agreement']:.2%}".replace(
            "%", " %"
        )
    )


def _apart(quantised: dict[str, Any]) -> str:
    """How far the quantised model that was trained is from the merged one."""
    asked = quantised["trained"]["quantize"]
    trained = f"the {asked if isinstance(asked, str) else asked['kind']} model that was trained"
    figures = quantised["figures"]
    if figures is None:
        return f"{trained} was not held against it: {quantised['reason']}"
    if None in figures.values():
        return f"{trained} gives logits that are not finite"
    return (
        f"{trained} differs from it, as its base is unquantised: mean KL {figures['mean_kl']:.1e}, the same first "
        f"choice {figures['top1_agreement']:.2%} (told, not judged)".replace("%", " %")
    )


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

"""What a run will write, foretold: against the bytes of real checkpoints, and refused where the disk is too small."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import Qwen2Config, Qwen2ForCausalLM

from luthier.errors import RunError
from luthier.folder import RunFolder
from luthier.models.adapters import save_adapter
from luthier.sections import TrainSection
from luthier.training import room
from luthier.training.room import bytes_in, check_room, sizes
from luthier.words import size
from rows import fit, lora, random_rows, tiny
from tiny import tiny_tokenizer

ROWS = random_rows(12)


def larger() -> Any:
    """2.3 M parameters: what its checkpoints hold is nearly all tensors, as it is with real models."""
    config = Qwen2Config(
        vocab_size=2048, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True, pad_token_id=None,
    )  # fmt: skip
    return Qwen2ForCausalLM(config).train()


def trainable(model: Any) -> dict[str, Any]:
    return {name: value for name, value in model.named_parameters() if value.requires_grad}


def shown(text: str) -> int:
    """Bytes of what `size` wrote, to its one decimal."""
    number, unit = text.split()
    return round(float(number.replace(",", "")) * 2 ** {"MiB": 20, "GiB": 30}[unit])


@pytest.mark.parametrize("make", [lambda: tiny("qwen2"), lambda: tiny("llama", tied=True), larger])
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_sizes_are_foretold_within_a_tenth(tmp_path: Path, kind: str, make: Any) -> None:
    model = lora(make()) if kind == "lora" else make().train()
    tokenizer = tiny_tokenizer() if kind == "lora" else None

    def write(target: Path) -> None:
        save_adapter(model, target, tokenizer)

    foretold = sizes(RunFolder(tmp_path), model, trainable(model), write, kind)
    assert list(tmp_path.iterdir()) == []
    fit(tmp_path / "run", model, ROWS, TrainSection(batch=4, steps=3, lr=1e-3), kind=kind, write=write)
    result = tmp_path / "run" / ("adapter" if kind == "lora" else "model")
    assert foretold.result == pytest.approx(bytes_in(result), rel=0.1)
    checkpoint = tmp_path / "run" / "checkpoints" / "step-000003"
    assert foretold.checkpoint == pytest.approx(bytes_in(checkpoint), rel=0.1)
    assert bytes_in(checkpoint) > 2.9 * bytes_in(result) or kind == "lora"


class Disk:
    """A run folder for an adapter, and what its disk has free: a check against it, without the disk."""

    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.patch = RunFolder(path), monkeypatch
        self.model = lora(larger())
        self.each = sizes(self.folder, self.model, trainable(self.model), self.write, "lora")

    def write(self, target: Path) -> None:
        save_adapter(self.model, target)

    def check(self, free: int, steps: int = 100, **section: Any) -> None:
        usage = shutil.disk_usage(self.folder.path)
        self.patch.setattr(room.shutil, "disk_usage", lambda path: usage._replace(free=free))
        given = TrainSection(**{"save_every": 10, **section})
        check_room(self.folder, self.model, trainable(self.model), self.write, given, "lora", steps, 25)

    def needs(self, checkpoints: int, **given: Any) -> None:
        """So many checkpoints and the adapter, not a byte less."""
        needed = checkpoints * self.each.checkpoint + self.each.result
        self.check(needed, **given)
        with pytest.raises(RunError):
            self.check(needed - 1, **given)


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(tmp_path, monkeypatch)


@pytest.mark.parametrize(
    ("section", "checkpoints"),
    [
        ({}, 4),
        ({"keep": 1}, 2),
        ({"keep": "all"}, 10),
        ({"keep": "all", "save_every": 30}, 4),  # steps 30, 60, 90 and the last
        ({"keep": "all", "save_every": "epoch"}, 4),
        ({"keep": 20}, 10),
        ({"save_every": 60}, 2),
        ({"save_every": 1000}, 1),
    ],
)
def test_how_many_checkpoints_there_are_at_most(disk: Disk, section: dict[str, Any], checkpoints: int) -> None:
    disk.needs(checkpoints, **section)


def test_what_is_there_already_is_not_needed_again(disk: Disk) -> None:
    """A run that is resumed: the next checkpoint must fit beside those that are kept."""
    for step in (70, 80, 90):
        (disk.folder.checkpoints / f"step-{step:06d}").mkdir(parents=True)
        (disk.folder.checkpoints / f"step-{step:06d}" / "state.safetensors").write_bytes(b"0" * disk.each.checkpoint)
    disk.needs(1)
    disk.needs(1, keep=1)
    disk.needs(7, keep="all")
    with pytest.raises(RunError, match=rf"up to \S+ MiB, {re.escape(size(3 * disk.each.checkpoint))} of which are th"):
        disk.check(0)


def test_the_refusal(disk: Disk) -> None:
    """One line: what is free, what is needed for what, what to do."""
    checkpoint, result = size(disk.each.checkpoint), size(disk.each.result)
    with pytest.raises(RunError) as caught:
        disk.check(123_456)
    needed = size(4 * disk.each.checkpoint + disk.each.result)
    assert str(caught.value) == (
        f"{disk.folder.path}: the disk has 120.6 KiB free, and the run needs up to {needed}: 4 checkpoints of "
        f"{checkpoint} (3 kept and a new one) and an adapter of {result}; lower train.keep, free some space, or train "
        "in a folder on another disk"
    )
    assert shown(needed) == pytest.approx(4 * disk.each.checkpoint + disk.each.result, abs=2**19 / 10)
    for section, words in [
        ({"keep": 1}, f"2 checkpoints of {checkpoint} (1 kept and a new one) and an adapter of {result}; free some"),
        (
            {"keep": "all"},
            f"10 checkpoints of {checkpoint} and an adapter of {result}; lower train.keep, raise train.s",
        ),
        ({"save_every": 50}, f"2 checkpoints of {checkpoint} and an adapter of {result}; lower train.keep, raise trai"),
        ({"save_every": 100}, f"a checkpoint of {checkpoint} and an adapter of {result}; free some space, or train in"),
    ]:
        with pytest.raises(RunError) as caught:
            disk.check(0, **section)
        assert words in str(caught.value)


def test_full_fine_tuning_needs_its_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint has the model once, and twice more for AdamW."""
    model = tiny("llama").train()
    folder, parameters = RunFolder(tmp_path), trainable(model)
    weights = sum(value.nbytes for value in parameters.values())
    each = sizes(folder, model, parameters, model.save_pretrained, "full")
    assert each.result == weights and 3 * weights < each.checkpoint < 3 * weights + 60_000
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(room.shutil, "disk_usage", lambda path: usage._replace(free=0))
    with pytest.raises(RunError, match=r" and a model of 75\.9 KiB; lower train\.keep, free some space"):
        check_room(folder, model, parameters, model.save_pretrained, TrainSection(), "full", 1000, 25)


def test_sizes_in_words() -> None:
    assert [size(n) for n in (0, 34_000, 2**20, 850 * 2**20 + 2**19, 2**30, 1500 * 2**30)] == [
        "0.0 KiB", "33.2 KiB", "1.0 MiB", "850.5 MiB", "1.0 GiB", "1,500.0 GiB",
    ]  # fmt: skip

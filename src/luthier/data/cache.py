"""Encoded rows on disk: memory-mapped Arrow, keyed by content, written atomically under a lock.

One entry holds one data source under one template: `<key>.arrow` and `<key>.json` (its checksum). A damaged entry is
told by the checksum and made anew. The folder is LUTHIER_CACHE, else ~/.cache/luthier; past 10 GiB the entries that
were used longest ago go.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from filelock import FileLock

from luthier.folder import write_json

LARGEST = 10 * 2**30
SCHEMA = pa.schema(
    [
        ("file", pa.int32()),  # number in the source's list of files
        ("line", pa.int64()),
        ("status", pa.int8()),
        ("reason", pa.string()),
        ("raw", pa.string()),  # of a bad row, for rejected.jsonl
        ("ids", pa.list_(pa.int32())),
        ("starts", pa.list_(pa.int32())),
        ("stops", pa.list_(pa.int32())),
        ("apart", pa.int32()),
        ("split", pa.bool_()),
        ("lost", pa.int32()),  # answer tokens lost by a cut
        ("prompt", pa.uint64()),
        ("row", pa.uint64()),
    ]
)


def cache_folder() -> Path:
    """Where encoded data is kept (LUTHIER_CACHE, else ~/.cache/luthier)."""
    return Path(os.environ.get("LUTHIER_CACHE") or Path.home() / ".cache" / "luthier").expanduser()


def key_of(identity: dict[str, Any]) -> str:
    """The entry's name: a digest of everything that decides the encoded rows."""
    text = json.dumps(identity, ensure_ascii=True, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def cached(key: str, make: Callable[[], Iterable[pa.RecordBatch]], say: Callable[[str], None]) -> tuple[Store, bool]:
    """The entry of that key, made by `make` where it is not there or is damaged; and whether it was there.

    Two processes that want the same entry wait for each other. What `make` raises passes through, nothing is left.
    """
    folder = cache_folder() / "rows"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{key}.arrow"
    with FileLock(folder / f"{key}.lock"):
        if path.exists():
            if _whole(path):
                os.utime(path)
                return Store(path), True
            say(f"cache: the entry {path.name} is damaged; encoding again")
        _write(path, make())
        _prune(folder, keep=path)
        return Store(path), False


class Store:
    """An entry, memory-mapped: the columns as numpy arrays, the ids of row i without a copy of the others."""

    def __init__(self, path: Path) -> None:
        with pa.memory_map(str(path)) as source:
            reader = pa.ipc.open_file(source)
            self._batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
        self._first = np.cumsum([0, *(batch.num_rows for batch in self._batches)])
        self.lengths = self._list_lengths("ids")
        self.supervised = self._list_sums()

    def __len__(self) -> int:
        return int(self._first[-1])

    def column(self, name: str) -> np.ndarray:
        """A column of numbers, whole, [rows]."""
        parts = [batch.column(name).to_numpy(zero_copy_only=False) for batch in self._batches]
        return np.concatenate(parts) if parts else np.zeros(0, np.int64)

    def value(self, name: str, row: int) -> Any:
        """One value of a column."""
        batch, at = self._at(row)
        return batch.column(name)[at].as_py()

    def ids(self, row: int) -> np.ndarray:
        """int32 [t], a view into the file."""
        return self._list("ids", row)

    def largest_id(self) -> int:
        """The largest token id of all rows, -1 where there is none."""
        return max((pc.max(batch.column("ids").values).as_py() or -1 for batch in self._batches), default=-1)

    def spans(self, row: int) -> list[tuple[int, int]]:
        """The supervised token ranges [start, stop)."""
        return list(zip(self._list("starts", row).tolist(), self._list("stops", row).tolist(), strict=True))

    def _at(self, row: int) -> tuple[pa.RecordBatch, int]:
        number = int(np.searchsorted(self._first, row, side="right")) - 1
        return self._batches[number], row - int(self._first[number])

    def _list(self, name: str, row: int) -> np.ndarray:
        batch, at = self._at(row)
        column = batch.column(name)
        start, stop = column.offsets[at].as_py(), column.offsets[at + 1].as_py()
        return np.asarray(column.values.slice(start, stop - start).to_numpy())

    def _list_lengths(self, name: str) -> np.ndarray:
        parts = [np.diff(batch.column(name).offsets.to_numpy()) for batch in self._batches]
        return np.concatenate(parts).astype(np.int32) if parts else np.zeros(0, np.int32)

    def _list_sums(self) -> np.ndarray:
        """Supervised tokens of each row: the sum of its ranges' lengths."""
        parts = []
        for batch in self._batches:
            starts, stops = batch.column("starts"), batch.column("stops")
            sums = np.concatenate([[0], np.cumsum(stops.values.to_numpy() - starts.values.to_numpy())])
            parts.append(np.diff(sums[starts.offsets.to_numpy()]))
        return np.concatenate(parts).astype(np.int32) if parts else np.zeros(0, np.int32)


def _write(path: Path, batches: Iterable[pa.RecordBatch]) -> None:
    temporary = path.with_suffix(f".{os.getpid()}.part")
    try:
        with pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_file(sink, SCHEMA) as writer:
            for batch in batches:
                writer.write_batch(batch)
        write_json(path.with_suffix(".json"), {"sha256": _sha256(temporary)})
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _whole(path: Path) -> bool:
    try:
        recorded = json.loads(path.with_suffix(".json").read_text())["sha256"]
    except (OSError, ValueError, KeyError):
        return False
    return bool(recorded == _sha256(path))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _prune(folder: Path, keep: Path) -> None:
    entries = sorted(folder.glob("*.arrow"), key=lambda path: path.stat().st_mtime)
    total = sum(path.stat().st_size for path in entries)
    for path in entries:
        if total <= LARGEST or path == keep:
            break
        total -= path.stat().st_size
        path.unlink(missing_ok=True)
        path.with_suffix(".json").unlink(missing_ok=True)

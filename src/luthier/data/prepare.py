"""The data path in one story: sources → rows → conversations → examples, cached; then sample, split, report."""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import tokenizers

from luthier import hub
from luthier.data.cache import cached, key_of
from luthier.data.encode import Encoder
from luthier.data.examples import BAD, CUT, TOO_LONG, Examples, Source, spread
from luthier.data.formats import Format, recognise, to_conversation
from luthier.data.record import Recorder
from luthier.data.sources import Rejected, Row, fingerprint, open_source, source_files
from luthier.data.split import eval_part, ranges, sampled, usable
from luthier.data.workers import encoded_batches
from luthier.errors import DataError
from luthier.folder import write_atomic
from luthier.sections import DataFile, DataSection

LOOKED_AT = 100  # rows that decide the format
SHOWN = 5  # bad rows named in an error


@dataclass(frozen=True)
class Data:
    """What a run learns from. train_sources: (start, stop, weight) of each file's rows in `train`."""

    train: Examples
    eval: Examples | None
    train_sources: list[tuple[int, int, float]]
    report: dict[str, Any]
    rejected: list[Rejected]


def prepare(section: DataSection, encoder: Encoder, say: Callable[[str], None]) -> Data:
    """Encode (or take from the cache) everything that the recipe's data section names.

    Errors: DataError for a file, a row or a length that the recipe does not allow.
    """
    train = [_source(entry, section, encoder, say) for entry in _entries(section.train)]
    held = [_source(entry, section, encoder, say) for entry in _entries(section.eval)] if _is_file(section) else []
    for source in [*train, *held]:
        _check_rows(source, section)
    everything = Examples(train, usable(train))
    if section.sample is not None:
        everything = Examples(train, sampled(everything, section))
    is_eval = np.zeros(len(everything), dtype=bool) if held else eval_part(everything, section)
    kept = Examples(train, everything.chosen[~is_eval])
    if len(kept) == 0:
        raise DataError(f"data.eval: {section.eval} leaves no row for training ({len(everything)} rows in all)")
    evaluation = Examples(held, usable(held)) if held else Examples(train, everything.chosen[is_eval])
    if section.eval is not None and len(evaluation) == 0:
        raise DataError(f"data.eval: {section.eval} of {len(everything):,} rows holds out none; give a number of rows")
    report = _report(train, held, kept, evaluation, encoder)
    say(_summary(report))
    return Data(
        train=kept,
        eval=evaluation if len(evaluation) else None,
        train_sources=ranges(kept, train),
        report=report,
        rejected=[rejected for source in [*train, *held] for rejected in _rejected(source)],
    )


def _entries(given: Any) -> list[DataFile]:
    listed = given if isinstance(given, list) else [given]
    return [entry if isinstance(entry, DataFile) else DataFile(path=entry) for entry in listed]


def _is_file(section: DataSection) -> bool:
    return isinstance(section.eval, str)


# -- one source ------------------------------------------------------------------------------------------------------


def _source(entry: DataFile, section: DataSection, encoder: Encoder, say: Callable[[str], None]) -> Source:
    files = [file for path in hub.data_files(entry.path, Path.cwd(), say) for file in source_files(path)]
    columns = entry.columns or section.columns
    first = list(islice((row for file in files for row in open_source(file) if isinstance(row, Row)), LOOKED_AT))
    if not first:
        raise DataError(f"{entry.path}: not one row of it can be read; the first problem is {_first_problem(files)}")
    shape = recognise(first, section, columns)
    if shape.name == "text" and section.text is None:
        raise DataError(
            f"{entry.path}: plain text without question and answer; to teach all of it, write under data:\n"
            '  text: "{text}"\n  supervise: all'
        )
    sha256 = fingerprint(files)
    key = key_of(
        {
            "source": sha256,
            "format": [shape.name, shape.columns.model_dump()],
            "section": section.model_dump(include=_DECIDING),
            "encoder": encoder.identity,
            "tokenizers": tokenizers.__version__,
        }
    )
    began = time.monotonic()
    store, warm = cached(key, lambda: _encode_source(files, shape, section, encoder, say), say)
    took = "from the cache" if warm else f"encoded in {time.monotonic() - began:.1f} s"
    source = Source(entry.path, files, shape, entry.weight, sha256, store)
    say(f"data: {_short(entry.path)}: {_rows(len(np.unique(source.lines())))} {took}; {shape.how}")
    return source


# What of the section changes a row's ids; seed, sample and split stand on top of the cache.
_DECIDING = {
    "join",
    "before_prompt",
    "text",
    "system",
    "supervise",
    "max_length",
    "max_prompt",
    "max_answer",
    "too_long",
}


def _first_problem(files: Sequence[Path]) -> str:
    for file in files:
        for row in open_source(file):
            if isinstance(row, Rejected):
                return f"{Path(row.file).name}:{row.line}: {row.reason}"
    return "that it is empty"


def _encode_source(
    files: Sequence[Path], shape: Format, section: DataSection, encoder: Encoder, say: Callable[[str], None]
) -> Iterator[pa.RecordBatch]:
    done, told, began = 0, time.monotonic(), time.monotonic()
    for batch, count in encoded_batches(files, Recorder(shape, section, encoder)):
        yield batch
        done += count
        if time.monotonic() - told > 5:
            told = time.monotonic()
            say(f"data: {done:,} rows encoded, {done / (told - began):,.0f} rows/s")


# -- what a recipe allows --------------------------------------------------------------------------------------------


def _check_rows(source: Source, section: DataSection) -> None:
    """Errors: DataError for bad rows (unless they are skipped), rows too long (as the policy says), no row left."""
    status = source.store.column("status")
    total, name = len(status), _short(source.path)
    bad, long = np.flatnonzero(status == BAD), np.flatnonzero(status == TOO_LONG)
    if len(bad) == total:
        raise DataError(
            f"{name}: {'its one row is' if total == 1 else f'all {total:,} rows are'} bad:\n{_named(source, bad)}"
        )
    if len(bad) and section.bad_rows == "error":
        raise DataError(
            f"{name}: {len(bad):,} of {total:,} rows cannot be used; put them right, or data.bad_rows: skip leaves "
            f"them out and lists them in rejected.jsonl:\n{_named(source, bad)}"
        )
    if len(long) and section.too_long == "error":
        are = "is" if len(long) == 1 else "are"
        raise DataError(
            f"{name}: {_rows(len(long))} {are} longer than data.max_length {section.max_length} allows "
            f"(or max_prompt, max_answer), and too_long is error:\n{_named(source, long)}"
        )
    if len(long) * 2 > total - len(bad):
        remedy = f"raise data.max_length (now {section.max_length})"
        cut = "cannot be cut to fit" if section.too_long == "cut" else "are too long"
        raise DataError(
            f"{name}: {len(long):,} of {total - len(bad):,} rows {cut} and would be dropped, more than half; "
            f"{remedy}{'' if section.too_long == 'cut' else ' or set data.too_long: cut'}\n{_named(source, long)}"
        )


def _rows(count: int) -> str:
    return f"{count:,} row{'' if count == 1 else 's'}"


def _named(source: Source, rows: np.ndarray) -> str:
    lines = [f"  {source.origin(int(row))}: {source.store.value('reason', int(row))}" for row in rows[:SHOWN]]
    if len(rows) > SHOWN:
        lines.append(f"  … and {len(rows) - SHOWN:,} more")
    return "\n".join(lines)


def _rejected(source: Source) -> Iterator[Rejected]:
    status = source.store.column("status")
    for row in np.flatnonzero((status == BAD) | (status == TOO_LONG)).tolist():
        file, line = source.origin(row).rsplit(":", 1)
        raw = source.store.value("raw", row) if status[row] == BAD else ""
        yield Rejected(file, int(line), source.store.value("reason", row), raw)


# -- records ---------------------------------------------------------------------------------------------------------


def _report(
    train: Sequence[Source],
    held: Sequence[Source],
    kept: Examples,
    evaluation: Examples,
    encoder: Encoder,
) -> dict[str, Any]:
    """What data.json holds."""
    sources = [*train, *held]
    fates = Counter[int]()
    for source in sources:
        fates.update(source.store.column("status").tolist())
    numbers = {name: sum(int(s.store.column(name).sum()) for s in sources) for name in ("apart", "split", "lost")}
    return {
        "sources": [
            {
                "path": source.path,
                "part": "eval" if source in held else "train",
                "sha256": source.sha256,
                "rows": len(np.unique(source.lines())),
                "weight": source.weight,
                "format": source.format.name,
                "columns": source.format.columns.model_dump(exclude_none=True),
                "how": source.format.how,
            }
            for source in sources
        ],
        "template": encoder.template.name,
        "template_sha256": hashlib.sha256(encoder.template.source.encode()).hexdigest(),
        "end_ids": encoder.end_ids,
        "today": encoder.today.isoformat(),
        "train_rows": len(kept),
        "eval_rows": len(evaluation),
        "train_tokens": int(kept.lengths.sum()),
        "supervised_tokens": int(kept.supervised.sum()),
        "longest": int(kept.lengths.max()),
        "lengths": dict(zip(("counts", "edges"), spread(kept.lengths), strict=True)),
        "bad": fates[BAD],
        "dropped_for_length": fates[TOO_LONG],
        "cut": fates[CUT],
        "answer_tokens_lost": numbers["lost"],
        "one_example_a_turn": numbers["split"],
        "borders_encoded_apart": numbers["apart"],
    }


def _summary(report: dict[str, Any]) -> str:
    """The line that tells what there is to train on, and what was left out and why."""
    parts = [f"{_rows(report['train_rows'])} to train on", f"{report['eval_rows']:,} held out"]
    told = {
        "bad": "bad, left out",
        "dropped_for_length": "too long, dropped",
        "cut": "cut",
        "one_example_a_turn": "examples written one a turn",
        "borders_encoded_apart": "borders encoded apart",
    }
    parts += [f"{report[key]:,} {words}" for key, words in told.items() if report[key]]
    if report["answer_tokens_lost"]:
        parts.append(f"{report['answer_tokens_lost']:,} answer tokens lost")
    return "data: " + ", ".join(parts)


def write_text(data: Data, section: DataSection, encoder: Encoder) -> None:
    """Write the rows to train on, rendered, as JSON lines {"text": …} into data.write_text, in the order of the files.

    A row that was cut is written as its tokens decode.
    """
    assert section.write_text is not None
    kept, lines = data.train, []
    chosen = {(int(n), kept.origin(i)): i for i, (n, _) in enumerate(kept.chosen)}
    fates = kept.column(lambda source: source.store.column("status"))
    for number, source in enumerate(kept.sources):
        for row in (row for file in source.files for row in open_source(file)):
            i = chosen.get((number, f"{Path(row.file).name}:{row.line}"))
            if i is None or not isinstance(row, Row):
                continue
            if fates[i] == CUT:
                texts = [encoder.tokenizer.decode(kept[i].ids.tolist(), skip_special_tokens=False)]
            else:
                texts = [encoder.text(e) for e in encoder.render(to_conversation(row, source.format, section))[0]]
            lines += [json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts]
    write_atomic(Path(section.write_text), "".join(lines))


def _short(path: str) -> str:
    return path if ":" in path.split("/")[0] else Path(path).name

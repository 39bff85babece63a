"""Rows of a source → a batch of the cache: what became of each, column by column."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import accumulate, chain, takewhile
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from luthier.data.cache import SCHEMA
from luthier.data.cut import excess, shorten
from luthier.data.encode import Encoded, Encoder, digest
from luthier.data.examples import BAD, CUT, OK, TOO_LONG
from luthier.data.formats import BadRow, Conversation, Format, to_conversation
from luthier.data.sources import Rejected, Row
from luthier.sections import DataSection


class Record(NamedTuple):
    """A row of the cache; its names are those of cache.SCHEMA, and `encoded` stands for what a good row has."""

    file: int
    line: int
    status: int
    reason: str | None = None
    raw: str | None = None
    encoded: Encoded | None = None
    split: bool = False
    lost: int = 0
    prompt: bytes = bytes(8)


class Recorder:
    """What is done to every row of one source."""

    def __init__(self, shape: Format, section: DataSection, encoder: Encoder) -> None:
        self.shape, self.section, self.encoder = shape, section, encoder

    def batch(self, rows: Sequence[tuple[int, Row | Rejected]]) -> pa.RecordBatch:
        """Rows, each with its file's number → records in order: one an example, one for a bad or too long row."""
        rendered: list[Any] = []  # per row: (conversation, examples, split) or the reason against it
        for _, row in rows:
            try:
                if isinstance(row, Rejected):
                    raise BadRow(row.reason)
                conversation = to_conversation(row, self.shape, self.section)
                examples, split = self.encoder.prepared(conversation)
                rendered.append((conversation, examples, split))
            except BadRow as error:
                rendered.append(str(error))
        encoded = iter(self.encoder.encode([e for one in rendered if not isinstance(one, str) for e in one[1]]))
        records = []
        for (file, row), one in zip(rows, rendered, strict=True):
            if isinstance(one, str):
                records.append(Record(file, row.line, BAD, one, _raw(row)))
                continue
            conversation, examples, split = one
            for _ in examples:
                records.append(self._record(next(encoded), conversation, split, row, file))
        return _columns(records)

    def _record(
        self, encoded: Encoded | BadRow, conversation: Conversation, split: bool, row: Row | Rejected, file: int
    ) -> Record:
        if isinstance(encoded, BadRow):
            return Record(file, row.line, BAD, str(encoded), _raw(row))
        status, lost = OK, 0
        what, over = excess(encoded, self.encoder)
        if what:
            subject = "" if what == "row" else f"its {what} is "
            reason = f"{subject}{over:,} tokens too long ({encoded.length:,} in all)"
            whole = encoded.answer_tokens
            cuttable = self.encoder.section.too_long == "cut" and not split
            shorter = shorten(conversation, self.encoder, self._encode_one) if cuttable else None
            if shorter is None:
                return Record(file, row.line, TOO_LONG, reason, lost=whole)
            encoded, status, lost = shorter, CUT, whole - shorter.answer_tokens
        asked = digest(_asked(conversation, self.encoder.section))
        return Record(file, row.line, status, None, None, encoded, split, lost, asked)

    def _encode_one(self, conversation: Conversation) -> Encoded | None:
        try:
            examples, split = self.encoder.render(conversation)
        except BadRow:
            return None
        encoded = self.encoder.encode(examples)[0]
        return encoded if isinstance(encoded, Encoded) and not split else None


def _asked(conversation: Conversation, section: DataSection) -> str:
    """What a row's prompt is known by when rows are held out: the words before its first answer.

    Not what the recipe puts around them, so that two recipes hold out the same rows; and one value for all turns of a
    conversation, since a later turn's prompt tells the answer of an earlier one.
    """
    if conversation.fields:
        answers = ("response", section.columns.response if section.columns else None)
        return "".join(f"{text}\0" for name, text in sorted(conversation.fields.items()) if name not in answers)
    asked = takewhile(lambda message: message.role != "assistant", conversation.messages)
    words = [message.content.removeprefix(section.before_prompt) for message in asked]
    return "".join([f"{text}\0" for text in words if text != section.system])


def _raw(row: Row | Rejected) -> str:
    if isinstance(row, Rejected):
        return row.row
    return json.dumps(row.values, ensure_ascii=False, default=str)[:200]


def _columns(records: Sequence[Record]) -> pa.RecordBatch:
    """Records → Arrow without a Python number for every token: the ids are bytes already."""
    encoded = [record.encoded for record in records]
    ids = np.frombuffer(b"".join([one.packed for one in encoded if one]), np.int32)
    spans = np.array(list(chain.from_iterable(one.spans for one in encoded if one)), np.int32).reshape(-1, 2)
    lengths, ranges = [one.length if one else 0 for one in encoded], [len(one.spans) if one else 0 for one in encoded]
    file, line, status, reason, raw, _, split, lost, prompt = zip(*records, strict=True) if records else [()] * 9
    arrays: dict[str, Any] = {
        "file": file,
        "line": line,
        "status": status,
        "reason": reason,
        "raw": raw,
        "ids": _lists(lengths, ids),
        "starts": _lists(ranges, spans[:, 0]),
        "stops": _lists(ranges, spans[:, 1]),
        "split": split,
        "lost": lost,
        "apart": [one.apart if one else 0 for one in encoded],
        "prompt": np.frombuffer(b"".join(prompt), "<u8"),
        "row": np.frombuffer(b"".join([one.row if one else bytes(8) for one in encoded]), "<u8"),
    }
    columns = [v if isinstance(v := arrays[f.name], pa.Array) else _array(v, f.type) for f in SCHEMA]
    return pa.RecordBatch.from_arrays(columns, schema=SCHEMA)


def _array(values: Any, kind: pa.DataType) -> pa.Array:
    """As pa.array, which imports pandas, a third of a second in every helper, where there is any."""
    if pa.types.is_string(kind):
        return pa.array(values, kind) if any(v is not None for v in values) else pa.nulls(len(values), kind)
    if pa.types.is_boolean(kind):
        made = np.packbits(np.array(values, bool), bitorder="little")
    else:
        made = np.ascontiguousarray(values, kind.to_pandas_dtype())
    return pa.Array.from_buffers(kind, len(values), [None, pa.py_buffer(made)])


def _lists(lengths: Sequence[int], values: np.ndarray) -> pa.ListArray:
    offsets = np.fromiter(accumulate(lengths, initial=0), np.int32)
    held = _array(values, pa.int32())
    return pa.ListArray.from_buffers(pa.list_(pa.int32()), len(lengths), [None, pa.py_buffer(offsets)], children=[held])

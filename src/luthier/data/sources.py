"""Data files → rows, one after another: memory stays flat however large the file is.

Row         values by column, and the line on which the row begins
Rejected    a row that cannot be read, with the reason; reading goes on behind it
DataError   a file that cannot be read (on): not UTF-8, a broken JSON array, a cut archive
"""

from __future__ import annotations

import codecs
import csv
import difflib
import gzip
import hashlib
import json
import re
import zlib
from collections.abc import Iterator, Sequence
from io import BufferedReader
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any, NamedTuple

from luthier.data.jsonarray import elements
from luthier.errors import DataError

KINDS = ("json", "jsonl", "csv", "tsv", "parquet", "txt", "arrow")

_READABLE = f"what is read: {', '.join(KINDS[:-1])}, each also .gz or .zst, and folders of datasets.save_to_disk"
_CHUNK = 1 << 20
_LONGEST_FIELD = 1 << 24  # a longer CSV field is a quote that was never closed
_DECODER = json.JSONDecoder()
_FIRST_KEY = re.compile(r'\s*\{\s*"([^"\\]{1,60})"')
_UNUSABLE = re.compile("[\0\ud800-\udfff]")


class Row(NamedTuple):
    """One row. `line` is the 1-based line of the decompressed file on which it begins (Parquet, Arrow: its number)."""

    values: dict[str, Any]
    file: str
    line: int


class Rejected(NamedTuple):
    """A row that cannot be used. `row` is its text, cut to 200 characters."""

    file: str
    line: int
    reason: str
    row: str


def source_files(path: Path) -> list[Path]:
    """The data files that a path stands for: itself, a folder's files by name, or a saved Arrow data set's parts.

    Errors: DataError where nothing is there, or nothing that can be read.
    """
    if path.is_file():
        _check_kind(path)
        return [path]
    if not path.is_dir():
        there = [file.name for file in path.parent.iterdir()] if path.parent.is_dir() else []
        close = difflib.get_close_matches(path.name, there, n=1)
        raise DataError(f"{path}: no such file or folder" + (f"; did you mean {close[0]!r}?" if close else ""))
    if (path / "dataset_dict.json").is_file():
        splits = json.loads((path / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
        raise DataError(f"{path}: a data set of several splits; give one: {', '.join(str(path / s) for s in splits)}")
    if (path / "state.json").is_file():  # what datasets.save_to_disk writes; it names its parts in order
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        return [path / part["filename"] for part in state["_data_files"]]
    files = [
        file for file in sorted(path.iterdir()) if file.is_file() and file.name[0] != "." and _kind(file)[0] in KINDS
    ]
    if not files:
        raise DataError(f"{path}: no data file in this folder; {_READABLE}")
    return files


def fingerprint(paths: Sequence[Path]) -> str:
    """SHA-256 (hex) over every file's extension, size and bytes, in order. Names and folders do not count."""
    total = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        total.update(f"{'.'.join(_kind(path))} {path.stat().st_size} {digest}\n".encode())
    return total.hexdigest()


def open_source(path: Path) -> Iterator[Row | Rejected]:
    """The rows of one file, in order, read as they are asked for.

    A row that is broken by itself comes as Rejected. Errors: DataError naming file and line where the file cannot be
    read on, and where there is not one row in it.
    """
    file = str(path)
    _check_kind(path)
    try:
        with _open(path) as stream:
            rows = _rows(stream, file, _kind(path)[0])
            first = next(rows, None)
            if first is None:
                raise DataError(f"{file}: there is no row in it")
            yield first
            yield from rows
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{file}: cannot be read: {error}") from error


def _rows(stream: IO[bytes], file: str, kind: str) -> Iterator[Row | Rejected]:
    if kind in ("parquet", "arrow"):
        return _table(stream, file, kind)
    chunks = _text(stream, file)
    if kind == "txt":
        return _txt(chunks, file)
    if kind in ("csv", "tsv"):
        return _csv(chunks, file, kind)
    return _json(chunks, file, kind)


# ---- bytes → text


def _open(path: Path) -> IO[bytes]:
    compression = _kind(path)[1]
    if compression == ".gz":
        return gzip.open(path, "rb")  # type: ignore[return-value]
    if compression == ".zst":
        import pyarrow as pa  # rather than zstandard, which ends a cut file without an error

        return pa.CompressedInputStream(pa.OSFile(str(path)), "zstd")  # type: ignore[no-any-return]
    return path.open("rb")


def _text(stream: IO[bytes], file: str) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    line = 1
    data = b"."
    while data:
        data = stream.read(_CHUNK)
        try:
            text = decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            line += error.object.count(b"\n", 0, error.start)
            encoding = "UTF-16" if error.object.startswith((b"\xff\xfe", b"\xfe\xff")) else "GB18030"
            raise DataError(
                f"{file}:{line}: not UTF-8 (byte 0x{error.object[error.start]:02x}); convert the file, as with"
                f" `iconv -f {encoding} -t UTF-8 OLD > NEW` (or the encoding that it has)"
            ) from error
        line += text.count("\n")
        yield text


def _lines(chunks: Iterator[str]) -> Iterator[str]:
    """Lines without their "\\n". Only "\\n" ends one: str.splitlines would cut at U+2028 inside a JSON string."""
    begun: list[str] = []
    for chunk in chunks:
        first, *others = chunk.split("\n")
        begun.append(first)
        if others:
            yield "".join(begun)
            yield from others[:-1]
            begun = others[-1:]
    yield "".join(begun)


# ---- text → rows


def _txt(chunks: Iterator[str], file: str) -> Iterator[Row | Rejected]:
    for number, line in enumerate(_lines(chunks), 1):
        if line and not line.isspace():
            yield _checked({"text": line.rstrip("\r")}, file, number, line)


def _json(chunks: Iterator[str], file: str, kind: str) -> Iterator[Row | Rejected]:
    """An array or an object a line, whatever the extension. One object alone holds rows somewhere inside: refused."""
    beginning = next((chunk for chunk in chunks if chunk.strip()), "")
    chunks = chain([beginning], chunks)
    if beginning.lstrip().startswith("["):
        yield from (_from_json(values, file, line, text) for values, text, line in elements(chunks, file))
        return
    rows = _json_lines(chunks, file)
    head = list(islice(rows, 2))
    broken = [row.row for row in head if isinstance(row, Rejected)]
    alone = kind == "json" and len(head) == 1 and not broken
    over_lines = len(broken) == 2 and broken[0].endswith(("{", "[", ","))
    if alone or over_lines:
        key = _FIRST_KEY.match(beginning)
        what = "one JSON object" + (f" that begins with the key {key[1]!r}" if key else "")
        raise DataError(
            f"{file}:1: {what}, where rows are expected: an array [{{…}}, {{…}}], or one object {{…}} per line;"
            " keep only the list of rows"
        )
    yield from chain(head, rows)


def _json_lines(chunks: Iterator[str], file: str) -> Iterator[Row | Rejected]:
    decode = _DECODER.decode
    for number, line in enumerate(_lines(chunks), 1):
        if not line or line.isspace():
            continue
        try:
            values = decode(line)
        except (ValueError, RecursionError) as error:
            yield Rejected(file, number, _broken(error, line), line.strip()[:200])
            continue
        yield _from_json(values, file, number, line)


def _csv(chunks: Iterator[str], file: str, kind: str) -> Iterator[Row | Rejected]:
    last = ""

    def lines() -> Iterator[str]:
        nonlocal last
        for last in _lines(chunks):
            yield last + "\n"

    delimiter = "," if kind == "csv" else "\t"
    csv.field_size_limit(_LONGEST_FIELD)
    reader = csv.reader(lines(), delimiter=delimiter, strict=True)
    header: list[str] = []
    while True:
        line = reader.line_num + 1
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if "end of data" in str(error) or "field larger" in str(error):
                raise DataError(f"{file}:{line}: a quote that opens in this row is never closed") from error
            yield Rejected(file, line, f"broken {kind}: {error}", last[:200])
            continue
        if not fields:
            continue
        if not header:
            header = _header(fields, f"{file}:{line}", delimiter)
        elif len(fields) != len(header):
            reason = f"{len(fields)} fields, where the header has {len(header)}"
            yield Rejected(file, line, reason, delimiter.join(fields)[:200])
        else:
            yield _checked(dict(zip(header, fields, strict=True)), file, line, "")


def _header(fields: list[str], place: str, delimiter: str) -> list[str]:
    header = [name.strip() for name in fields]
    twice = [name for name in header if name and header.count(name) > 1]
    if twice:
        raise DataError(f"{place}: the header has the column {twice[0]!r} twice")
    if len(header) == 1 and (other := re.search(r"[;|\t]", header[0])):
        raise DataError(
            f"{place}: the header is one column, {header[0]!r}: fields are separated by {delimiter!r} here, not by"
            f" {other[0]!r}; write the file again with commas (.csv) or tabs (.tsv)"
        )
    return header


def _table(stream: IO[bytes], file: str, kind: str) -> Iterator[Row | Rejected]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        if kind == "arrow":
            table = pa.ipc.open_stream(stream)
        else:  # Parquet is read from its end
            whole = stream if isinstance(stream, BufferedReader) else pa.BufferReader(stream.read())
            table = pq.ParquetFile(whole).iter_batches(1024)
        # Python objects take many times the memory of an Arrow batch: 1,024 rows of it at once.
        slices = (batch.slice(start, 1024) for batch in table for start in range(0, batch.num_rows, 1024))
        rows = (values for part in slices for values in part.to_pylist())
        for number, values in enumerate(rows, 1):
            yield _checked(values, file, number, "")
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise DataError(f"{file}: not a whole {kind.capitalize()} file: {error}") from error


# ---- what a row must be


def _from_json(values: Any, file: str, line: int, text: str) -> Row | Rejected:
    # What no tokenizer takes stands in JSON only as an escape: most rows need no look at their values.
    if type(values) is dict and "\\u" not in text:
        return Row(values, file, line)
    return _checked(values, file, line, text)


def _checked(values: Any, file: str, line: int, text: str) -> Row | Rejected:
    """The row, or its rejection: not an object, or NUL or a lone surrogate in it, which no tokenizer takes."""
    if not isinstance(values, dict):
        return Rejected(file, line, "not an object {…}", text.strip()[:200])
    for column, value in values.items():
        character = _unusable(column) or _unusable(value)
        if character:
            shown = text.strip() or json.dumps(values, ensure_ascii=False, default=str)
            return Rejected(file, line, f"{character} in column {column!r}", shown[:200])
    return Row(values, file, line)


def _unusable(value: Any) -> str | None:
    if isinstance(value, str):
        found = _UNUSABLE.search(value)
        return found and ("NUL character" if found[0] == "\0" else "lone surrogate")
    if isinstance(value, dict):
        return _unusable([*value.keys(), *value.values()])
    if isinstance(value, list):
        return next(filter(None, map(_unusable, value)), None)
    return None


def _broken(error: Exception, text: str) -> str:
    if "\0" in text:
        return "NUL character"
    if isinstance(error, json.JSONDecodeError):
        return f"broken JSON: {error.msg} at column {error.colno}"
    return f"broken JSON: {error}"


# ---- names


def _kind(path: Path) -> tuple[str, str]:
    """("jsonl", ".gz") of rows.jsonl.gz."""
    name = path.name.lower()
    compression = next((ending for ending in (".gz", ".zst") if name.endswith(ending)), "")
    return Path(name.removesuffix(compression)).suffix.removeprefix("."), compression


def _check_kind(path: Path) -> None:
    if _kind(path)[0] not in KINDS:
        raise DataError(f"{path}: a file of this kind is not read; {_READABLE}")

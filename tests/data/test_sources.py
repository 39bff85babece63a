"""Every kind of file, every way in which one can be broken."""

from __future__ import annotations

import csv
import gzip
import json
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from luthier.data.sources import Rejected, Row, fingerprint, open_source, source_files
from luthier.errors import DataError

ROWS = [{"prompt": "a", "response": "一"}, {"prompt": 'b "q", c', "response": "🙂"}]


def write(folder: Path, name: str, text: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def values(path: Path) -> list[dict[str, object]]:
    rows = list(open_source(path))
    assert all(isinstance(row, Row) and row.file == str(path) for row in rows), rows
    return [row.values for row in rows if isinstance(row, Row)]


def lines(path: Path) -> list[int]:
    return [row.line for row in open_source(path)]


def refusal(path: Path) -> str:
    with pytest.raises(DataError) as error:
        list(open_source(path))
    return str(error.value)


def jsonl(rows: list[dict[str, str]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


# ---- every kind is read


def test_every_kind_gives_the_same_rows(tmp_path: Path) -> None:
    comma = 'prompt,response\na,一\n"b ""q"", c",🙂\n'
    table = pa.Table.from_pylist(ROWS)
    pq.write_table(table, tmp_path / "a.parquet")
    with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
        stream.write_table(table)
    files = [
        write(tmp_path, "array.json", json.dumps(ROWS, indent=2)),
        write(tmp_path, "lines.json", jsonl(ROWS)),
        write(tmp_path, "a.jsonl", jsonl(ROWS)),
        write(tmp_path, "array.jsonl", json.dumps(ROWS)),
        write(tmp_path, "escaped.jsonl", "\n".join(map(json.dumps, ROWS))),
        write(tmp_path, "windows.jsonl", jsonl(ROWS).replace("\n", "\r\n")),
        write(tmp_path, "blank.jsonl", "\n\n" + jsonl(ROWS) + " \n"),
        write(tmp_path, "a.csv", comma),
        write(tmp_path, "windows.csv", comma.replace("\n", "\r\n")),
        write(tmp_path, "a.tsv", 'prompt\tresponse\na\t一\n"b ""q"", c"\t🙂\n'),
        tmp_path / "a.parquet",
        tmp_path / "a.arrow",
        write(tmp_path, "UPPER.JSONL", jsonl(ROWS)),
    ]
    for file in list(files):
        files.append(write(tmp_path, file.name + ".gz", gzip.compress(file.read_bytes())))
        files.append(write(tmp_path, file.name + ".zst", pa.compress(file.read_bytes(), "zstd", asbytes=True)))
        if file.suffix not in (".parquet", ".arrow"):
            files.append(write(tmp_path, "bom-" + file.name, b"\xef\xbb\xbf" + file.read_bytes()))
    assert len(files) == 50
    for file in files:
        assert values(file) == ROWS, file


def test_text_is_a_row_a_line(tmp_path: Path) -> None:
    path = write(tmp_path, "a.txt", "first\r\n\n   \n zweite \nlast")
    assert values(path) == [{"text": "first"}, {"text": " zweite "}, {"text": "last"}]
    assert lines(path) == [1, 4, 5]


def test_a_saved_arrow_data_set_is_read_in_order(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = [{"messages": [{"role": "user", "content": str(i)}]} for i in range(10)]
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "saved"), num_shards=3)
    files = source_files(tmp_path / "saved")
    assert len(files) == 3
    assert [row for file in files for row in values(file)] == rows
    both = datasets.DatasetDict({"train": datasets.Dataset.from_list(rows), "test": datasets.Dataset.from_list(rows)})
    both.save_to_disk(str(tmp_path / "both"))
    with pytest.raises(DataError, match="give one: .*both/train, .*both/test"):
        source_files(tmp_path / "both")


def test_a_line_break_inside_a_string_does_not_end_the_row(tmp_path: Path) -> None:
    path = write(tmp_path, "a.jsonl", '{"text": "one\u2028two\x85three"}\n{"text": "four"}\n')
    assert values(path) == [{"text": "one\u2028two\x85three"}, {"text": "four"}]


# ---- places


def test_lines_of_csv_rows_with_line_breaks_inside(tmp_path: Path) -> None:
    path = write(tmp_path, "a.csv", 'a,b\n1,"x\ny\nz"\n\n2,w\n3,"\n"\n4,v\n')
    assert lines(path) == [2, 6, 7, 9]
    assert values(path)[0] == {"a": "1", "b": "x\ny\nz"}


def test_lines_of_array_elements_are_where_they_begin(tmp_path: Path) -> None:
    path = write(tmp_path, "a.json", '\n[\n {"a": "x\\ny"},\n\n {\n  "a": 2\n }, {"a": 3},\n{"a": 4}\n]\n')
    assert lines(path) == [3, 5, 7, 8]


def test_lines_of_jsonl_count_blank_ones(tmp_path: Path) -> None:
    assert lines(write(tmp_path, "a.jsonl", '{"a": 1}\n\n\n{"a": 2}')) == [1, 4]


def test_array_elements_larger_than_a_window(tmp_path: Path) -> None:
    rows = [{"a": "x" * n, "b": "é"} for n in (3, 2_500_000, 1, 1_100_000, 5)]
    path = write(tmp_path, "a.json", json.dumps(rows, indent=1, ensure_ascii=False))
    assert values(path) == rows
    assert lines(path) == [2, 6, 10, 14, 18]


def test_a_number_is_not_cut_by_a_window(tmp_path: Path) -> None:
    path = write(tmp_path, "a.json", "[" + ",".join(["123456"] * 400_000) + "]")
    assert {row.row for row in open_source(path) if isinstance(row, Rejected)} == {"123456"}


# ---- rows that are rejected


def test_broken_json_lines_are_rejected_with_their_place(tmp_path: Path) -> None:
    path = write(tmp_path, "a.jsonl", '{"a": 1}\n{"a": 1,}\n[1]\n"x"\n{"a": "\0"}\n{"a": 2}\n')
    first, *rejected, last = open_source(path)
    assert (first, last) == (Row({"a": 1}, str(path), 1), Row({"a": 2}, str(path), 6))
    assert rejected == [
        Rejected(
            str(path), 2, "broken JSON: Expecting property name enclosed in double quotes at column 9", '{"a": 1,}'
        ),
        Rejected(str(path), 3, "not an object {…}", "[1]"),
        Rejected(str(path), 4, "not an object {…}", '"x"'),
        Rejected(str(path), 5, "NUL character", '{"a": "\0"}'),
    ]


def test_deeply_nested_json_is_rejected(tmp_path: Path) -> None:
    _, rejected = open_source(write(tmp_path, "a.jsonl", '{"a": 1}\n{"a": ' + "[" * 100_000 + "\n"))
    assert isinstance(rejected, Rejected) and rejected.reason.startswith("broken JSON: ") and len(rejected.row) == 200


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ('"\\ud800"', "lone surrogate in column 'a'"),
        ('"x\\udfff\\ud83d\\ude00"', "lone surrogate in column 'a'"),
        ('"\\u0000"', "NUL character in column 'a'"),
        ('[{"role": "user", "content": "\\u0000"}]', "NUL character in column 'a'"),
        ('{"\\ud800": 1}', "lone surrogate in column 'a'"),
    ],
)
def test_characters_that_no_tokenizer_takes(tmp_path: Path, value: str, reason: str) -> None:
    text = f'{{"b": 1, "a": {value}}}'
    for name, content in (("a.jsonl", text), ("a.json", f"[{text}]")):
        path = write(tmp_path, name, content + "\n")
        assert list(open_source(path)) == [Rejected(str(path), 1, reason, text)]


def test_pairs_of_surrogates_and_written_out_backslashes_are_fine(tmp_path: Path) -> None:
    path = write(tmp_path, "a.jsonl", '{"a": "\\ud83d\\ude00 \\u4e00 \\\\u0000"}\n')
    assert values(path) == [{"a": "😀 一 \\u0000"}]


def test_nul_in_csv_and_parquet(tmp_path: Path) -> None:
    path = write(tmp_path, "a.csv", "a,b\n1,x\0y\n2,z\n")
    assert [type(row) for row in open_source(path)] == [Rejected, Row]
    pq.write_table(pa.table({"a": ["x\0", "y"]}), tmp_path / "a.parquet")
    rejected, row = open_source(tmp_path / "a.parquet")
    assert rejected == Rejected(str(tmp_path / "a.parquet"), 1, "NUL character in column 'a'", '{"a": "x\\u0000"}')
    assert row == Row({"a": "y"}, str(tmp_path / "a.parquet"), 2)


def test_csv_rows_that_do_not_fit_the_header(tmp_path: Path) -> None:
    path = write(tmp_path, "a.csv", 'a,b\n1\n1,2,3\n"x"y,2\n5,6\n')
    assert list(open_source(path)) == [
        Rejected(str(path), 2, "1 fields, where the header has 2", "1"),
        Rejected(str(path), 3, "3 fields, where the header has 2", "1,2,3"),
        Rejected(str(path), 4, "broken csv: ',' expected after '\"'", '"x"y,2'),
        Row({"a": "5", "b": "6"}, str(path), 5),
    ]


# ---- files that are refused


def test_not_utf8(tmp_path: Path) -> None:
    good = '{"text": "一二三"}\n' * 100_000  # the bad line lies behind the first chunk
    path = write(tmp_path, "a.jsonl", good.encode() + '{"text": "一二三"}\n'.encode("gb18030"))
    assert refusal(path) == (
        f"{path}:100001: not UTF-8 (byte 0xb6); convert the file, as with `iconv -f GB18030 -t UTF-8 OLD > NEW`"
        " (or the encoding that it has)"
    )
    assert "a.csv:1: not UTF-8 (byte 0xff); convert the file, as with `iconv -f UTF-16" in refusal(
        write(tmp_path, "a.csv", "a,b\n1,2\n".encode("utf-16"))
    )
    assert ":2: not UTF-8 (byte 0xe4)" in refusal(write(tmp_path, "cut.txt", b"ok\n\xe4\xb8"))


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('[{"a": 1},\n {"a" 2}]', ":2:7: broken JSON array: Expecting ':' delimiter"),
        ('[{"a": 1},\n', ":2:1: broken JSON array: Expecting value"),
        ('[{"a": 1}', ":1:10: broken JSON array: ']' is missing (the file ends)"),
        ('[{"a": 1} {"a": 2}]', ":1:11: broken JSON array: ']' is missing"),
        ('[{"a": 1}]\n[{"a": 2}]', ":2:1: broken JSON array: text behind the array's end"),
        ('[\n{"a": "x\ny"}]', ":2:9: broken JSON array: Invalid control character at"),
        ('[{"a": "x}]', ":1:8: broken JSON array: Unterminated string starting at"),
    ],
)
def test_a_broken_array_cannot_be_read_on(tmp_path: Path, text: str, problem: str) -> None:
    path = write(tmp_path, "a.json", text)
    assert refusal(path) == f"{path}{problem}"


def test_a_broken_array_stops_where_it_is_broken(tmp_path: Path) -> None:
    """Not at the end of the file: a large one must not be taken into memory first."""
    path = write(tmp_path, "a.json", '[{"a": 1},\n {"a" 2},\n' + '{"a": 1},\n' * 1_000_000 + "]")
    tracemalloc.start()
    assert ":2:7:" in refusal(path)
    assert tracemalloc.get_traced_memory()[1] < 6_000_000
    tracemalloc.stop()


def test_one_object_is_no_file_of_rows(tmp_path: Path) -> None:
    remedy = "where rows are expected: an array [{…}, {…}], or one object {…} per line; keep only the list of rows"
    wrapped = {"data": [{"a": "b"}, {"a": "c"}]}
    for name, text in (
        ("a.json", json.dumps(wrapped)),
        ("b.json", json.dumps(wrapped, indent=2)),
        ("c.jsonl", json.dumps(wrapped, indent=2)),
    ):
        path = write(tmp_path, name, text)
        assert refusal(path) == f"{path}:1: one JSON object that begins with the key 'data', {remedy}"
    assert values(write(tmp_path, "one.jsonl", '{"a": "b"}')) == [{"a": "b"}]


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.csv", "a.tsv", "a.txt", "b.csv", "b.json", "c.jsonl", "a.gz"])
def test_a_file_without_rows(tmp_path: Path, name: str) -> None:
    content = {"b.csv": b"a,b\n", "b.json": b"[ ]\n", "c.jsonl": b"\n\n"}.get(name, b"")
    if name == "a.gz":
        name, content = "a.csv.gz", gzip.compress(b"")
    path = write(tmp_path, name, content)
    assert refusal(path) == f"{path}: there is no row in it"


def test_csv_that_is_not_what_it_says(tmp_path: Path) -> None:
    path = write(tmp_path, "a.csv", 'a,b\n1,"x\n2,y\n3,z\n')
    assert refusal(path) == f"{path}:2: a quote that opens in this row is never closed"
    path = write(tmp_path, "b.csv", "a,b,a\n1,2,3\n")
    assert refusal(path) == f"{path}:1: the header has the column 'a' twice"
    path = write(tmp_path, "c.csv", "a;b\n1;2\n")
    assert refusal(path) == (
        f"{path}:1: the header is one column, 'a;b': fields are separated by ',' here, not by ';'; write the file"
        " again with commas (.csv) or tabs (.tsv)"
    )


def test_long_csv_fields_are_read(tmp_path: Path) -> None:
    with (tmp_path / "a.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["a"], ["x\n" * 200_000]])  # csv's own limit is 131,072 characters
    assert values(tmp_path / "a.csv") == [{"a": "x\n" * 200_000}]


def test_cut_and_broken_archives(tmp_path: Path) -> None:
    text = "".join(f'{{"a": "{i * 7919 % 100_003}"}}\n' for i in range(50_000)).encode()
    zipped, packed = gzip.compress(text), pa.compress(text, "zstd", asbytes=True)
    assert "Compressed file ended" in refusal(write(tmp_path, "a.jsonl.gz", zipped[:-100]))
    assert "Truncated compressed stream" in refusal(write(tmp_path, "a.jsonl.zst", packed[:-100]))
    assert "Not a gzipped file" in refusal(write(tmp_path, "b.jsonl.gz", text))
    assert "ZSTD decompress failed" in refusal(write(tmp_path, "b.jsonl.zst", text))
    path = write(tmp_path, "b.parquet", text)
    assert refusal(path).startswith(f"{path}: not a whole Parquet file: ")
    path = write(tmp_path, "b.arrow", text)
    assert refusal(path).startswith(f"{path}: not a whole Arrow file: ")


# ---- paths


def test_source_files(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.csv.gz", "README.md", ".hidden.jsonl", "weights.gz"):
        write(tmp_path, name, b"")
    assert source_files(tmp_path) == [tmp_path / "a.csv.gz", tmp_path / "b.jsonl"]
    assert source_files(tmp_path / "b.jsonl") == [tmp_path / "b.jsonl"]
    for path, message in (
        (tmp_path / "bb.jsonl", f"{tmp_path}/bb.jsonl: no such file or folder; did you mean 'b.jsonl'?"),
        (tmp_path / "x" / "y.csv", f"{tmp_path}/x/y.csv: no such file or folder"),
        (
            tmp_path / "README.md",
            f"{tmp_path}/README.md: a file of this kind is not read; what is read: json, jsonl, csv, tsv, parquet,"
            " txt, each also .gz or .zst, and folders of datasets.save_to_disk",
        ),
    ):
        with pytest.raises(DataError) as error:
            source_files(path)
        assert str(error.value) == message
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty: no data file in this folder; what is read: json"):
        source_files(tmp_path / "empty")


def test_fingerprint_is_of_content_order_and_kind(tmp_path: Path) -> None:
    a, b = write(tmp_path, "a.jsonl", "x"), write(tmp_path, "b.jsonl", "y")
    (tmp_path / "elsewhere").mkdir()
    same = write(tmp_path / "elsewhere", "other.jsonl", "x")
    assert fingerprint([a]) == fingerprint([same]) and len(fingerprint([a])) == 64
    others = [[b], [a, b], [b, a], [write(tmp_path, "a.txt", "x")], [write(tmp_path, "ab.jsonl", "xy")]]
    assert len({fingerprint([a]), *map(fingerprint, others)}) == 6


# ---- memory


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.txt", "a.jsonl.gz"])
def test_memory_is_flat(tmp_path: Path, name: str) -> None:
    size, body = 40_000, "y" * 1000
    row = body if name == "a.txt" else f"1,{body}" if name == "a.csv" else json.dumps({"a": body})
    text = ("a,b\n" if name == "a.csv" else "") + "\n".join([row] * size)
    if name == "a.json":
        text = "[" + ",".join([row] * size) + "]"
    path = write(tmp_path, name, gzip.compress(text.encode(), 1) if name.endswith("gz") else text)
    del text
    tracemalloc.start()
    count = sum(1 for _ in open_source(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == size and peak < 8_000_000, peak  # of 40 MB


def test_memory_is_flat_for_parquet(tmp_path: Path) -> None:
    with pq.ParquetWriter(tmp_path / "a.parquet", pa.schema({"a": pa.string()})) as writer:
        for part in range(20):
            writer.write_table(pa.table({"a": [f"{part} {i} " + "x" * 1000 for i in range(2000)]}))
    before = pa.total_allocated_bytes()
    held = [pa.total_allocated_bytes() - before for _ in open_source(tmp_path / "a.parquet")]
    assert len(held) == 40_000 and max(held) < 8_000_000


def test_the_rows_of_an_array_on_one_line_are_told_apart(tmp_path: Path) -> None:
    """A row is known by its file and line: sample, split and report count rows by them."""
    path = tmp_path / "rows.json"
    path.write_text('[{"a": "1"}, {"a": "2"},\n {"a": "3"}, {"a": "4"}]')
    assert lines(path) == [1, 2, 3, 4]

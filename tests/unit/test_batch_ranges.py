"""Ranges of files, compared with readers of whole files and with pyarrow's."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet as parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qadeploy.batch import ranges
from qadeploy.batch.ranges import Reader, scan
from qadeploy.batch.sources import Source, source_at
from qadeploy.data.fields import DataOptions
from qadeploy.data.formats import load_rows
from qadeploy.data.rows import RawRow
from qadeploy.errors import InputError

ROWS = [{"id": f"q{n}", "context": f"Ada keeps lamp {n}.", "question": "Who?"} for n in range(700)]
LINE = st.one_of(
    st.sampled_from(["", " ", "\t", "{", "[1]", "null", '{"a": 1}\r', '{"a": "\u2028"}', "\ufeff{}"]),
    st.dictionaries(st.text(max_size=3), st.text(max_size=9), max_size=2).map(lambda v: json.dumps(v)),
)


def all_rows(path: Path, step: int | None, data_options: DataOptions | None = None) -> list[RawRow]:
    """The rows of all ranges, each read by a reader of its own."""
    source = source_at(str(path))
    found = scan(source, step, data_options or DataOptions())
    assert [part.first for part in found.ranges] == list(range(0, found.rows, found.step))
    rows = [row for part in found.ranges for row in Reader(data_options or DataOptions()).rows(source, part)]
    assert len(rows) == found.rows
    return rows


@settings(max_examples=60, deadline=None)
@given(lines=st.lists(LINE, max_size=12), end=st.sampled_from(["", "\n"]), bom=st.booleans(), step=st.integers(1, 5))
def test_ranges_of_jsonl_hold_what_the_whole_reader_reads(lines, end, bom, step, tmp_path_factory):
    path = tmp_path_factory.mktemp("lines") / "x.jsonl"
    path.write_bytes((b"\xef\xbb\xbf" if bom else b"") + ("\n".join(lines) + end).encode())
    try:
        whole = list(load_rows(str(path)))
    except InputError:
        whole = []
    if not whole:
        with pytest.raises(InputError):
            all_rows(path, step)
        return
    rows = all_rows(path, step)
    assert [(r.number, r.fields) for r in rows] == [(r.number, r.fields) for r in whole]
    assert [bool(r.problem) for r in rows] == [bool(r.problem) for r in whole]


@pytest.mark.parametrize("group", [1000, 256, 97])
@pytest.mark.parametrize("step", [1, 97, 250, 1000])
def test_ranges_of_parquet_hold_what_pyarrow_reads(step, group, tmp_path):
    path = tmp_path / "x.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), path, row_group_size=group)
    whole = parquet.read_table(path, columns=["id", "context", "question"]).to_pylist()
    assert [row.fields for row in all_rows(path, step)] == whole
    assert [row.number for row in all_rows(path, step)] == list(range(1, 701))


def test_a_reader_keeps_its_place_and_finds_any_other(tmp_path, monkeypatch):
    path = tmp_path / "x.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), path, row_group_size=300)
    source, reader = source_at(str(path)), Reader(DataOptions())
    parts = scan(source, 100, DataOptions()).ranges
    opened: list[Source] = []
    real = Source.open
    monkeypatch.setattr(Source, "open", lambda source: opened.append(source) or real(source))
    for at, opens in ((0, 1), (1, 1), (4, 1), (2, 2), (3, 2)):
        found = [row.number for row in reader.rows(source, parts[at])]
        assert found == list(range(100 * at + 1, 100 * at + 101))
        assert len(opened) == opens
    next(reader.rows(source, parts[5]))  # abandoned half-way
    assert [row.number for row in reader.rows(source, parts[6])] == list(range(601, 701))
    assert len(opened) == 3


def test_only_the_columns_that_are_needed_are_read(tmp_path):
    path = tmp_path / "x.parquet"
    rows = [{"doc": "Ada.", "question": "Who?", "key": 3, "embedding": [0.0] * 9, "context": "other"}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    data_options = DataOptions(columns="context=doc,id=key")
    (row,) = all_rows(path, None, data_options)
    assert row.fields == {"doc": "Ada.", "question": "Who?", "key": 3, "context": "other"}


@pytest.mark.parametrize("name", ["x.json", "x.csv"])
def test_files_that_are_read_whole_are_cut_too(name, tmp_path):
    path = tmp_path / name
    if name.endswith("json"):
        path.write_text(json.dumps(ROWS[:7]))
    else:
        path.write_text("id,context,question\n" + "".join(f"{r['id']},{r['context']},Who?\n" for r in ROWS[:7]))
    assert [row.fields for row in all_rows(path, 3)] == ROWS[:7]


def test_ranges_are_joined_where_a_file_has_many(tmp_path, monkeypatch):
    monkeypatch.setattr(ranges, "FINEST", 1)
    path = tmp_path / "x.jsonl"
    rows = [{"id": n} for n in range(9001)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = scan(source_at(str(path)), None, DataOptions())
    assert found.step == 4  # at most 4,096 ranges
    assert [part.rows for part in found.ranges] == [4] * 2250 + [1]
    joined = found.coarser(4000)
    assert [part.rows for part in joined] == [4000, 4000, 1001]
    for parts in (found.ranges, joined):
        read = [row for part in parts for row in Reader(DataOptions()).rows(source_at(str(path)), part)]
        assert [row.fields for row in read] == rows


def test_lines_that_cannot_be_read_say_why(tmp_path):
    path = tmp_path / "x.jsonl"
    deep = b"[" * 100_000
    path.write_bytes(b'{"a": 1}\n{"a"\n"text"\n{"a": "\xe9"}\n' + deep + b"\n{}\n")
    problems = [row.problem for row in all_rows(path, 2)]
    assert problems[0] == problems[5] == ""
    assert problems[1].startswith("not valid JSON: Expecting ':' delimiter (column")
    assert problems[2] == "must be an object with context and question, not text"
    assert problems[3].startswith("not UTF-8 text (byte 7 of its line)")
    assert problems[4].startswith("not valid JSON: ")


def damaged(path: Path) -> None:
    """Three row groups of 100, the bytes of the second one's contexts overwritten."""
    parquet.write_table(pyarrow.Table.from_pylist(ROWS[:300]), path, row_group_size=100, compression="snappy")
    chunk = parquet.read_metadata(path).row_group(1).column(1)
    assert chunk.path_in_schema == "context"
    data = bytearray(path.read_bytes())
    begin = chunk.dictionary_page_offset or chunk.data_page_offset
    data[begin : begin + chunk.total_compressed_size] = b"\xff" * chunk.total_compressed_size
    path.write_bytes(data)


@pytest.mark.parametrize("step", [70, 100, 300])
def test_a_damaged_row_group_costs_its_own_rows(step, tmp_path):
    path = tmp_path / "x.parquet"
    damaged(path)
    rows = all_rows(path, step)
    assert [row.number for row in rows] == list(range(1, 301))
    assert [row.fields for row in rows if not row.problem] == ROWS[:100] + ROWS[200:300]
    assert all(row.problem.startswith("row group 2 cannot be read: ") for row in rows[100:200])


def test_text_that_is_no_utf8_costs_its_row(tmp_path):
    path = tmp_path / "x.parquet"
    values = pyarrow.array([b"Ada.", b"caf\xe9", b"Fay."]).cast(pyarrow.binary())
    context = pyarrow.StringArray.from_buffers(3, values.buffers()[1], values.buffers()[2])
    parquet.write_table(pyarrow.table({"context": context, "question": ["Who?"] * 3}), path)
    rows = all_rows(path, None)
    assert [row.fields.get("context") for row in rows] == ["Ada.", None, "Fay."]
    assert rows[1].problem.startswith("cannot be read: 'utf-8' codec")


def no_parquet(path: Path) -> None:
    path.write_text("these are no pages")


def other_columns(path: Path) -> None:
    parquet.write_table(pyarrow.table({"passage": ["a"], "query": ["b"]}), path)


@pytest.mark.parametrize(
    ("write", "name", "message"),
    [
        (no_parquet, "x.parquet", "x.parquet: not a readable parquet file"),
        (other_columns, "x.parquet", "column context is missing; the columns found are passage, query; did you mean"),
        (lambda p: p.write_text("\n \n"), "x.jsonl", "x.jsonl: holds no rows"),
        (
            lambda p: parquet.write_table(
                pyarrow.Table.from_pylist(
                    ROWS[:0], pyarrow.schema([("context", pyarrow.string()), ("question", pyarrow.string())])
                ),
                p,
            ),
            "x.parquet",
            "holds no rows",
        ),
        (lambda p: p.write_text("{"), "x.json", "not valid JSON"),
    ],
)
def test_files_without_usable_rows_are_named(write, name, message, tmp_path):
    write(tmp_path / name)
    with pytest.raises(InputError, match=message):
        scan(source_at(str(tmp_path / name)), None, DataOptions())


def test_only_files_that_can_be_cut_are_read_from_afar(tmp_path):
    (tmp_path / "x.json").write_text("[{}]")
    with pytest.raises(InputError, match="only parquet and JSONL can be read from there"):
        scan(source_at(f"file://{tmp_path}/x.json"), None, DataOptions())


def test_ranges_through_pyarrows_file_systems(tmp_path):
    lines = tmp_path / "x.jsonl"
    lines.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "x.parquet", row_group_size=300)
    for name in ("x.jsonl", "x.parquet"):
        source = source_at(f"file://{tmp_path}/{name}")
        parts = scan(source, 128, DataOptions()).ranges
        assert [row.fields for part in parts for row in Reader(DataOptions()).rows(source, part)] == ROWS

"""Packed files: decompression bombs end in a message, and dates beyond Python's range do not block other columns."""

from __future__ import annotations

import datetime
import decimal
import gzip
import io
import json
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qadeploy.batch.ranges import Reader, scan
from qadeploy.batch.sources import source_at
from qadeploy.data.arrow import read_table, to_rows
from qadeploy.data.fields import DataOptions
from qadeploy.data.formats import load_rows
from qadeploy.data.loading import read
from qadeploy.data.unpacking import FREE, LIMIT, MOST, RATIO, Budget
from qadeploy.errors import DataError, FailureError, InputError
from tests.data_for_tests import FLAT, SKY, WANTED, answers, found, lines, put

arrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")
ROW = {"context": SKY, "question": "?", "answer": "blue"}


def as_parquet(table: Any, **options: Any) -> bytes:
    stream = io.BytesIO()
    parquet.write_table(table, stream, write_statistics=False, **options)  # those of a long text take seconds
    return stream.getvalue()


def as_stream(table: Any, compression: str | None = None) -> bytes:
    return as_ipc(table, arrow.ipc.new_stream, compression)


def as_file(table: Any, compression: str | None = None) -> bytes:
    return as_ipc(table, arrow.ipc.new_file, compression)


def as_ipc(table: Any, make: Callable[..., Any], compression: str | None) -> bytes:
    stream = io.BytesIO()
    with make(stream, table.schema, options=arrow.ipc.IpcWriteOptions(compression=compression)) as writer:
        writer.write_table(table)
    return stream.getvalue()


def workbook(sheet: str) -> bytes:
    """An Excel file whose sheet is this XML."""
    openpyxl = pytest.importorskip("openpyxl")
    made, stream = io.BytesIO(), io.BytesIO()
    openpyxl.Workbook().save(made)
    head = '<worksheet xmlns="http://schemas.openxmlformats.org/spreadsheetml/2006/main"><sheetData>'
    with zipfile.ZipFile(made) as old, zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            is_sheet = name.endswith("sheet1.xml")
            new.writestr(name, f"{head}{sheet}</sheetData></worksheet>" if is_sheet else old.read(name))
    return stream.getvalue()


# ---------------------------------------------------------------- what it is worth


def test_a_budget_is_a_ratio_within_bounds(monkeypatch):
    monkeypatch.delenv(LIMIT, raising=False)
    assert (FREE, RATIO, MOST) == (268_435_456, 200, 4_294_967_296)
    assert [Budget("x", size).limit for size in (10, 10_000_000, 10**9)] == [FREE, 2_000_000_000, MOST]
    monkeypatch.setenv(LIMIT, "7")
    budget = Budget("x", 10**9)
    budget.take(7)
    with pytest.raises(InputError, match=r"^x: its 1,000,000,000 bytes unpack to more than 7, .* set QADEPLOY_MAX_"):
        budget.take(1)


@pytest.mark.parametrize("value", ["", "0", "-1", "1e9", "4G", "٣", "9" * 5000])
def test_a_limit_that_is_no_number_is_named(value, monkeypatch):
    monkeypatch.setenv(LIMIT, value)
    with pytest.raises(InputError, match=f"^{LIMIT} must be a whole number of bytes from 1, not '{value[:9]}"):
        Budget("x", 1).take(1)


# ---------------------------------------------------------------- bombs


def long_text(rows: int = 2000, size: int = 10**6) -> Any:
    """Texts of 2 GB in all, stored as one text and references to it."""
    column = arrow.DictionaryArray.from_arrays(arrow.array([0] * rows, arrow.int32()), ["x" * size])
    return arrow.table({"context": column})


def nested_text() -> Any:
    (column,) = long_text().columns[0].chunks
    return arrow.table({"answers": arrow.ListArray.from_arrays([0, len(column)], column)})


def many_numbers() -> Any:
    """One row with a list of 40 million zeros, run-length encoded."""
    zeros = arrow.array(np.zeros(4 * 10**7, np.int8))
    return arrow.table({"answers": arrow.ListArray.from_arrays([0, len(zeros)], zeros)})


BOMBS: dict[str, Callable[[], bytes]] = {
    "spaces.json.gz": lambda: gzip.compress(b" " * (FREE + 1), 1),
    "texts.parquet": lambda: as_parquet(long_text()),
    "nested.parquet": lambda: as_parquet(nested_text()),
    "plain.parquet": lambda: as_parquet(
        arrow.table({"context": ["x" * 3 * 10**8]}), compression="zstd", use_dictionary=False
    ),
    "rows.parquet": lambda: as_parquet(arrow.table({"context": arrow.nulls(2 * 10**6)})),
    "list.parquet": lambda: as_parquet(many_numbers()),
    "texts.arrow": lambda: as_stream(long_text()),
    "nested.arrow": lambda: as_stream(nested_text()),
    "stream.arrow": lambda: as_stream(arrow.table({"context": ["x" * 3 * 10**8]}), "zstd"),
    "file.arrow": lambda: as_file(arrow.table({"context": ["x" * 3 * 10**8]}), "lz4"),
    "spaces.xlsx": lambda: workbook(" " * FREE),
    "wide.xlsx": lambda: workbook('<row><c r="XFD1"><v>1</v></c></row>' * 3000),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_refused_with_the_limit_and_the_way_out(tmp_path, name):
    source = put(tmp_path, name, BOMBS[name]())
    size = (tmp_path / name).stat().st_size
    limit = max(FREE, RATIO * size)
    said = f"{source}: its {size:,} bytes unpack to more than {limit:,}, so it may be a decompression bomb. If you trust it, set {LIMIT}"
    with pytest.raises(InputError, match=re.escape(said)):
        load_rows(source)


SMALL = 10**7  # a limit that small bombs exceed
ASKED = {"context": ["x"], "question": ["?"]}
INPUTS: dict[str, Callable[[], Any]] = {
    "plain": lambda: arrow.table({**ASKED, "context": ["x" * 2 * SMALL]}),
    "list": lambda: arrow.table({**ASKED, "answers": arrow.array([np.zeros(SMALL // 4, np.int8)])}),
    "rows": lambda: arrow.table(dict.fromkeys(ASKED, arrow.nulls(SMALL // 100, arrow.string()))),
}


@pytest.mark.parametrize("name", INPUTS)
def test_a_bomb_is_no_input_of_a_batch(tmp_path, monkeypatch, name):
    """In any column: pages are counted before one of them is unpacked."""
    monkeypatch.setenv(LIMIT, str(SMALL))
    content = as_parquet(INPUTS[name](), compression="zstd", use_dictionary=name != "plain")
    source = source_at(put(tmp_path, f"{name}.parquet", content))
    said = (
        f"{name}.parquet: its {len(content):,} bytes unpack to more than {SMALL:,}, so it may be a decompression bomb"
    )
    with pytest.raises(InputError, match=re.escape(said)):
        scan(source, None, DataOptions())


def test_a_bomb_in_an_object_store_is_met_before_its_pages_are_unpacked(tmp_path, monkeypatch):
    """Only in the columns that are read, because each header is a request."""
    monkeypatch.setenv(LIMIT, str(SMALL))
    for name, wide in (("plain", "context"), ("other", "answers"), ("a.b", "a.b")):
        table = arrow.table({**ASKED, wide: ["x" * 2 * SMALL]})
        content = as_parquet(table, compression="zstd", use_dictionary=False)
        source = source_at(f"file://{put(tmp_path, f'{name}.parquet', content)}")
        options = DataOptions(columns="context=a.b" if name == "a.b" else None)
        (part,) = scan(source, None, options).ranges
        before = arrow.total_allocated_bytes()
        if name == "other":
            assert next(Reader(options).rows(source, part)).fields == {"context": "x", "question": "?"}
            continue
        with pytest.raises(FailureError, match=rf"{name}.parquet: its [0-9,]+ bytes unpack to more than {SMALL:,}, so"):
            next(Reader(options).rows(source, part))
        assert arrow.total_allocated_bytes() - before < SMALL


def test_a_damaged_page_in_an_object_store_is_its_rows_problem(tmp_path):
    content = bytearray(as_parquet(arrow.table(ASKED), compression="none", use_dictionary=False))
    content[4:12] = b"\xff" * 8  # the header of the first page
    source = source_at(f"file://{put(tmp_path, 'a.parquet', bytes(content))}")
    (part,) = scan(source, None, DataOptions()).ranges
    (row,) = Reader(DataOptions()).rows(source, part)
    assert row.problem.startswith("row group 1 cannot be read: ")


def test_rows_that_a_batch_holds_at_a_time_are_no_bomb(tmp_path, monkeypatch):
    """200 rows of 100 kB, stored as one text and a run of numbers, which page sizes do not show."""
    monkeypatch.setenv(LIMIT, str(SMALL))
    table = long_text(200, SMALL // 100).append_column("question", [["?"] * 200])
    source = source_at(put(tmp_path, "a.parquet", as_parquet(table)))
    (part,) = scan(source, None, DataOptions()).ranges
    before = arrow.total_allocated_bytes()
    with pytest.raises(FailureError, match=rf"a.parquet: its [0-9,]+ bytes unpack to more than {SMALL:,}, so"):
        next(Reader(DataOptions()).rows(source, part))
    assert arrow.total_allocated_bytes() - before < SMALL
    monkeypatch.setenv(LIMIT, str(3 * SMALL))
    assert sum(len(row.fields["context"]) for row in Reader(DataOptions()).rows(source, part)) == 2 * SMALL


def test_a_large_input_of_a_batch_may_unpack_to_more_than_memory_holds(monkeypatch):
    monkeypatch.delenv(LIMIT, raising=False)
    assert Budget("x", 10**9, streamed=True).limit == 200 * 10**9
    assert Budget("x", 10, streamed=True).limit == FREE


def saved(folder: Path, name: str, table: Any, compression: str | None = None) -> str:
    """A folder as ``save_to_disk`` writes it, with another table under a name."""
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list([ROW]).save_to_disk(str(folder))
    (folder / name).write_bytes(as_stream(table, compression))
    return str(folder)


def test_a_bomb_in_a_folder_of_datasets_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv(LIMIT, str(SMALL))
    source = saved(tmp_path / "a", "data-00000-of-00001.arrow", arrow.table({"context": ["x" * 2 * SMALL]}), "zstd")
    with pytest.raises(InputError, match=rf"-of-00001.arrow: its [0-9,]+ bytes unpack to more than {SMALL:,}, so"):
        load_rows(source)


def test_rows_of_a_file_that_a_folder_lists_many_times_are_counted(tmp_path, monkeypatch):
    source = saved(tmp_path / "a", "data-00000-of-00001.arrow", arrow.Table.from_pylist([ROW]))
    state = json.loads((tmp_path / "a/state.json").read_text())
    (tmp_path / "a/state.json").write_text(json.dumps({**state, "_data_files": state["_data_files"] * 300}))
    monkeypatch.setenv(LIMIT, "100000")
    assert len(list(load_rows(source))) == 300
    monkeypatch.setenv(LIMIT, "50000")
    with pytest.raises(InputError, match=r"a: its [0-9,]+ bytes unpack to more than 50,000, so"):
        load_rows(source)


def test_a_bomb_takes_no_more_memory_than_allowed(tmp_path):
    """Texts of 200 GB: if they were unpacked, even in part, memory would run out before they were counted."""
    source = put(tmp_path, "texts.parquet", as_parquet(long_text(200_000)))
    before = arrow.total_allocated_bytes()
    with pytest.raises(InputError, match="unpack to more than"):
        load_rows(source)
    assert arrow.total_allocated_bytes() - before < 2**27


@pytest.mark.parametrize("name", ["a.json.gz", "a.parquet", "a.arrow", "a.xlsx"])
def test_the_limit_can_be_chosen(tmp_path, monkeypatch, name):
    table = arrow.Table.from_pylist([ROW])
    sheet = "".join(
        "<row>" + "".join(f'<c t="inlineStr"><is><t>{cell}</t></is></c>' for cell in cells) + "</row>"
        for cells in (ROW, ROW.values())
    )
    made = {
        "a.json.gz": gzip.compress(json.dumps([ROW]).encode()),
        "a.parquet": as_parquet(table),
        "a.arrow": as_stream(table, "zstd"),
        "a.xlsx": workbook(sheet),
    }
    source = put(tmp_path, name, made[name])
    monkeypatch.setenv(LIMIT, "50")
    with pytest.raises(InputError, match=r"unpack to more than 50,"):
        load_rows(source)
    monkeypatch.setenv(LIMIT, "100000")
    assert answers(source) == [[("blue", 11)]]


def test_a_sheet_of_more_rows_than_excel_allows_is_refused(tmp_path):
    source = put(tmp_path, "rows.xlsx", workbook(f'<row r="1"/><row r="{10**15}"><c><v>1</v></c></row>'))
    with pytest.raises(InputError, match="its first sheet has more than the 1,048,576 rows that Excel allows"):
        load_rows(source)


# ---------------------------------------------------------------- what is no bomb


def typed() -> Any:
    """A table of many types, every value of which Python can hold."""
    day = datetime.datetime(2024, 2, 29, 12, 30)
    return arrow.table(
        {
            "text": ["a", None, "ü😀"],
            "large": arrow.array(["a", None, "bb"], arrow.large_string()),
            "bytes": [b"a", b"\xff", None],
            "fixed": arrow.array([b"ab", b"cd", None], arrow.binary(2)),
            "category": arrow.array(["x", "y", "x"]).dictionary_encode(),
            "numbers": arrow.array([1, None, 3]).dictionary_encode(),
            "decimal": [decimal.Decimal("1.5"), None, decimal.Decimal("-2.5")],
            "when": arrow.array([day, None, day], arrow.timestamp("us", "Europe/Berlin")),
            "day": [day.date(), None, day.date()],
            "time": [day.time(), None, day.time()],
            "took": [datetime.timedelta(days=-1), None, datetime.timedelta(0)],
            "nothing": arrow.nulls(3),
            "flag": [True, False, None],
            "list": [["a", "b"], [], None],
            "struct": [{"text": ["a"], "at": [1]}, None, {"text": [], "at": None}],
            "map": arrow.array([[("k", 1)], [], None], arrow.map_(arrow.string(), arrow.int64())),
        }
    )


def test_rows_are_those_that_pyarrow_makes():
    wanted = typed().to_pylist()
    assert read_table(as_parquet(typed()), "x", "parquet") == wanted
    assert read_table(as_parquet(typed(), row_group_size=1, use_dictionary=False), "x", "parquet") == wanted
    for make in (as_stream, as_file):
        for compression in (None, "lz4", "zstd"):
            assert read_table(make(typed().slice(1), compression), "x", "arrow") == wanted[1:]


def test_views_are_read(tmp_path):
    views = arrow.array(["short", None, "a text of more than twelve bytes"], arrow.string_view())
    wanted = [{"x": "short"}, {"x": None}, {"x": "a text of more than twelve bytes"}]
    assert read_table(as_stream(arrow.table({"x": views})), "x", "arrow") == wanted
    assert read_table(as_stream(arrow.table({"x": views.slice(2)})), "x", "arrow") == wanted[2:]


@pytest.mark.parametrize(
    "column",
    [
        arrow.RunEndEncodedArray.from_arrays(arrow.array([2**20], arrow.int32()), ["x"]),
        arrow.array([["x"]], arrow.list_view(arrow.string())),
    ],
)
def test_types_that_can_repeat_without_end_are_named(column):
    with pytest.raises(InputError, match=r"x: holds a column of type \w+.* which is not read: save it as plain"):
        read_table(as_stream(arrow.table({"c": column})), "x", "arrow")


def test_damaged_arrow_is_no_read_of_other_memory():
    content = as_stream(arrow.table({"x": ["abcdefgh", "ijklmnop"]}))
    offsets = b"\0\0\0\0\x08\0\0\0\x10\0\0\0"
    assert content.count(offsets) == 1
    damaged = content.replace(offsets, b"\0\0\0\0\x08\0\0\0\0\0\0\x7f")
    with pytest.raises(InputError, match="x: not a readable arrow file"):
        read_table(damaged, "x", "arrow")


# ---------------------------------------------------------------- dates


NOT_IN_PARQUET = (arrow.timestamp("s"), arrow.date64())  # which has milliseconds at most, and no date of this kind


@pytest.mark.parametrize(
    ("kind", "number"),
    [
        (arrow.timestamp("s"), 10**18),
        (arrow.timestamp("us"), -(2**62)),
        (arrow.timestamp("s", "No/Where"), 7),
        (arrow.timestamp("ms", "UTC"), 10**17),
        (arrow.date32(), 10**9),
        (arrow.date64(), 86_400_000 * 10**10),
        (arrow.duration("s"), 10**18),
        (arrow.duration("ms"), -(2**62)),
    ],
)
def test_a_date_that_python_cannot_hold_is_its_number(tmp_path, kind, number):
    column = arrow.array([number, None], kind)
    plain = arrow.table({"x": column})
    nested = arrow.table({"x": arrow.StructArray.from_arrays([arrow.ListArray.from_arrays([0, 1, 2], column)], ["y"])})
    assert to_rows(plain.to_batches()[0]) == [{"x": number}, {"x": None}]
    assert to_rows(nested.to_batches()[0]) == [{"x": {"y": [number]}}, {"x": {"y": [None]}}]
    table = arrow.Table.from_pylist(FLAT).append_column("created", column)
    assert found(put(tmp_path, "a.arrow", as_stream(table))) == WANTED
    if kind not in NOT_IN_PARQUET:
        assert found(put(tmp_path, "a.parquet", as_parquet(table))) == WANTED


def test_a_batch_reads_such_dates_too(tmp_path):
    ids = arrow.array([10**9, 7], arrow.date32())
    table = arrow.table({"context": [SKY, SKY], "question": ["a", "b"], "id": ids})
    source = source_at(put(tmp_path, "a.parquet", as_parquet(table)))
    (part,) = scan(source, None, DataOptions()).ranges
    rows = [*Reader(DataOptions()).rows(source, part)]
    assert [(row.fields["question"], row.fields["id"], row.problem) for row in rows] == [("a", 10**9, ""), ("b", 7, "")]


def test_a_date_in_place_of_a_text_is_named(tmp_path):
    table = arrow.table({**{name: [x] for name, x in ROW.items()}, "context": arrow.array([10**9], arrow.date32())})
    with pytest.raises(DataError, match=r"row 1, field context: must be text, not a number$"):
        read(put(tmp_path, "a.parquet", as_parquet(table)))


def test_text_that_is_not_utf8_names_the_file(tmp_path):
    table = arrow.table({"context": arrow.array([b"\xff"]).view(arrow.string())})
    for name, make in (("a.parquet", as_parquet), ("a.arrow", as_stream)):
        with pytest.raises(InputError, match=rf"{name}: not a readable \w+ file: "):
            load_rows(put(tmp_path, name, make(table)))


def test_an_empty_table_has_no_rows(tmp_path):
    table = arrow.Table.from_pylist([ROW]).slice(1)
    for name, make in (("a.parquet", as_parquet), ("a.arrow", as_stream)):
        with pytest.raises(InputError, match="holds no rows that can be used"):
            read(put(tmp_path, name, make(table)))


def test_gzip_that_is_cut_short_is_named(tmp_path):
    with pytest.raises(InputError, match="not a readable gzip file"):
        load_rows(put(tmp_path, "a.jsonl.gz", gzip.compress(lines(ROW).encode())[:-9]))

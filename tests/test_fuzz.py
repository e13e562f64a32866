"""Any JSON value in any place of the user's input: data in every known shape, files of every kind, config files.

Whatever a file holds, it is read or refused by one of qadeploy's own errors. The long tests are marked slow: pytest -m slow.
"""

from __future__ import annotations

import copy
import csv
import gzip
import io
import json
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qadeploy.cli import main
from qadeploy.cli.config import read_config
from qadeploy.data.check import check_rows
from qadeploy.data.check_file import write_fixed
from qadeploy.data.check_text import check_lines, check_summary
from qadeploy.data.fields import DataOptions
from qadeploy.data.formats import load_rows
from qadeploy.data.loading import read
from qadeploy.errors import DataWarning, InputError, QadeployError
from tests.data_for_tests import ARTICLE, FLAT, PARAGRAPHS, SEA, SKY
from tests.test_shapes import CMRC, COLUMNS, MRQA, MRQA_SEA

REGION = {"start": 11, "end": 15, "text": "blue", "labels": ["Answer"]}
HTML = {**REGION, "start": "/p[1]/text()[1]", "end": "/p[1]/text()[1]", "globalOffsets": {"start": 11, "end": 15}}
RESULT = {"type": "labels", "from_name": "label", "to_name": "text", "value": REGION}
SHAPES: dict[str, Any] = {
    "flat": FLAT,
    "triplets": [{"context": SKY, "question": "?", "answer": "blue", "answer_start": 11, "id": 1, "split": "train"}],
    "spans": [{"context": SKY, "question": "?", "answers": [{"start": 11, "end": 15}], "is_impossible": False}],
    "squad": {"version": "1.1", "data": [ARTICLE]},
    "article": ARTICLE,
    "paragraphs": PARAGRAPHS,
    "mrqa": [MRQA, MRQA_SEA],
    "cmrc": CMRC,
    "drop": {"p": {"passage": SKY, "qa_pairs": [{"question": "?", "query_id": "d", "answer": {"number": "", "spans": ["blue"]}}]}},
    "splits": {"train": FLAT[:1], "validation": {"data": [{"paragraphs": PARAGRAPHS[1:]}]}},
    "columns": COLUMNS,
    "pandas": {n: {str(i): x for i, x in enumerate(c)} for n, c in COLUMNS.items()},
    "split": {"columns": [*COLUMNS], "index": [0, 1], "data": [[*row.values()] for row in FLAT]},
    "index": {str(i): row for i, row in enumerate(FLAT)},
    "viewer": {"features": [], "rows": [{"row_idx": i, "row": r} for i, r in enumerate(FLAT)]},
    "haystack": [{"context": SKY, "question": "?", "answers": [{"text": "", "answer_start": 0, "answer_category": "NOT_GIVEN"}]}],
    "label studio": [{"id": 7, "data": {"text": SKY, "question": "?"}, "annotations": [{"result": [RESULT], "was_cancelled": False}]}],
    "hypertext": [{"id": 7, "data": {"text": f"<p>{SKY}</p>", "question": "?"}, "annotations": [{"result": [{**RESULT, "value": HTML}]}]}],
    "label studio min": [{"id": 7, "annotation_id": 9, "lead_time": 1.5, "text": SKY, "question": "?", "label": [{**REGION, "to_name": "text"}]}],
    "prodigy": [{"text": SKY, "question": "?", "meta": {"id": 1}, "spans": [{**REGION, "label": "A"}], "answer": "accept", "_task_hash": 1}],
    "doccano": [{"text": SKY, "question": "?", "label": [[11, 15, "A"]]}, {"text": SEA, "question": "?", "entities": [{"start_offset": 0, "end_offset": 3, "label": "A"}]}],
}  # fmt: skip
OPTIONS = (
    DataOptions(),
    DataOptions(columns="context=text,answers=label,span=answer_start", label="Answer", empty_answers="no-answer"),
    DataOptions(columns="answers=answer", no_answer_token="", on_ambiguous="first", empty_answers="reject"),
)  # fmt: skip

# Values that readers often mishandle, among values of any kind.
ODD = st.sampled_from(
    [
        *(None, True, "", " ", "-1", "1e400", "\0", "\ud800", "[{'a': 1}]", "(1, 2)", "array([1])", "'a' 'b'", "'\\d'", "1if 2else 3"),
        *("train", "accept", "NaN", "NaT", "2024-02-30", "²", "Ⅷ", "9" * 5000, "0x" + "f" * 5000, "(" * 300, "[" * 3000, "{" * 3000),
        *(0, -1, 2**31, 2**63, -(2**64), 10**400, 1.5, -0.0, 1e308, float("inf"), float("nan")),
        *([], {}, [[]], [{}], [None], [[1, 2, 3]], {"text": []}, {"text": None, "answer_start": {}}, {"start": [], "end": "x"}),
        *({"columns": [[]], "data": [[1]]}, {"rows": [{}]}, {"row": {}}, {"data": {}, "annotations": [[]]}, {"qas": [{}]}),
    ]
)  # fmt: skip
LEAF = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9) | ODD
NAMES = st.sampled_from(
    ["text", "start", "end", "answers", "context", "question", "id", "label", "value", "data", "result", "row"]
)
KEY = st.text(max_size=5) | NAMES
JSON = ODD | st.recursive(LEAF, lambda x: st.lists(x, max_size=3) | st.dictionaries(KEY, x, max_size=3), max_leaves=6)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths to every value inside a JSON value."""
    for key, x in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield (*path, key)
        yield from places(x, (*path, key))


def replaced(value: Any, path: tuple[Any, ...], new: Any, key: str | None) -> Any:
    """A copy with a new value at a path; with ``key`` under this name, beside the old one."""
    value = copy.deepcopy(value)
    at = value
    for step in path[:-1]:
        at = at[step]
    at[path[-1] if key is None or isinstance(at, list) else key] = new
    return value


@st.composite
def mutated(draw: st.DrawFn) -> Any:
    """A known shape with some of its values replaced by any others."""
    value = SHAPES[draw(st.sampled_from([*SHAPES]))]
    for _ in range(draw(st.integers(1, 3))):
        found = [*places(value)]
        if found:
            key = draw(st.none() | KEY)
            value = replaced(value, draw(st.sampled_from(found)), draw(JSON), key)
    return value


def use(source: Path, options: DataOptions) -> None:
    """Reads a file like ``train``, and checks and repairs it like ``check --fix``. Passes on no error but the expected ones."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DataWarning)
        try:
            data = read(str(source), options)
            assert all(e.context[a.start : a.start + len(a.text)] == a.text for e in data.examples for a in e.answers)
        except QadeployError as error:
            said(error)
        try:
            checked = check_rows(str(source), load_rows(str(source)), options)
            said("\n".join([*check_lines(checked), check_summary(checked)]))
            write_fixed(checked, source.with_name("fixed.jsonl"))
        except QadeployError as error:
            said(error)
            return
    if checked.usable():
        read(str(source.with_name("fixed.jsonl")))


def said(what: object) -> None:
    """A message can be printed and is not empty."""
    assert str(what).encode("utf-8")


def in_folder(name: str, content: bytes, options: DataOptions) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(content)
        use(path, options)


def as_csv(rows: list[dict[str, Any]]) -> bytes:
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, list(dict.fromkeys(key for row in rows for key in row)), restval="")
    writer.writeheader()
    writer.writerows({k: json.dumps(x) if isinstance(x, dict | list) else x for k, x in row.items()} for row in rows)
    return out.getvalue().encode("utf-8", "surrogatepass")


def one_value(value: Any, options: DataOptions) -> None:
    in_folder("a.json", json.dumps(value).encode(), options)
    rows = value if isinstance(value, list) else [value]
    in_folder("a.jsonl.gz", gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode(), 1), options)
    flat = [row for row in rows if isinstance(row, dict) and row]
    if flat:
        in_folder("a.csv", as_csv(flat), options)


def one_table(value: Any, options: DataOptions) -> None:
    arrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    rows = [row for row in (value if isinstance(value, list) else [value]) if isinstance(row, dict)]
    try:
        table = arrow.Table.from_pylist(rows)
    except (arrow.ArrowException, OverflowError, UnicodeError):  # arrow has no type for such columns
        return
    out = io.BytesIO()
    try:
        parquet.write_table(table, out)
        in_folder("a.parquet", out.getvalue(), options)
    except arrow.ArrowException:  # a struct without members
        pass
    out = io.BytesIO()
    with arrow.ipc.new_stream(out, table.schema) as writer:
        writer.write_table(table)
    in_folder("a.arrow", out.getvalue(), options)


def damaged(content: bytes, changes: list[tuple[int, int]], cut: int) -> bytes:
    found = bytearray(content)
    for at, byte in changes:
        found[at % len(found)] = byte
    return bytes(found[: len(found) - cut % len(found)])


FILES = ("a.json", "a.jsonl", "a.jsonl.gz", "a.csv", "a.tsv", "a.parquet", "a.arrow", "a.xlsx")


@cache
def sound(name: str) -> bytes:
    """A file of this kind without faults."""
    arrow = pytest.importorskip("pyarrow")
    openpyxl = pytest.importorskip("openpyxl")
    import pyarrow.parquet as parquet

    rows = [{"context": SKY, "question": "?", "answer": "blue"}, {"context": SEA, "question": "?", "answer": "cold"}]
    text, out = "".join(json.dumps(row) + "\n" for row in FLAT).encode(), io.BytesIO()
    if name == "a.parquet":
        parquet.write_table(arrow.Table.from_pylist(FLAT), out)
    elif name == "a.arrow":
        table, options = arrow.Table.from_pylist(FLAT), arrow.ipc.IpcWriteOptions(compression="zstd")
        with arrow.ipc.new_stream(out, table.schema, options=options) as writer:
            writer.write_table(table)
    elif name == "a.xlsx":
        book = openpyxl.Workbook()
        for cells in (rows[0], *(row.values() for row in rows)):
            book.active.append([*cells])
        book.save(out)
    table_text = as_csv(rows)
    texts = {"a.json": json.dumps(FLAT).encode(), "a.jsonl": text, "a.jsonl.gz": gzip.compress(text, mtime=0)}
    texts |= {"a.csv": table_text, "a.tsv": table_text.replace(b",", b"\t")}
    return texts.get(name) or out.getvalue()


def one_damaged(name: str, changes: list[tuple[int, int]], cut: int) -> None:
    in_folder(name, damaged(sound(name), changes, cut), OPTIONS[0])


# ---------------------------------------------------------------- config files

COMMANDS = sorted(main.commands)
TIMES = int(os.environ.get("QADEPLOY_FUZZ_TIMES", "200"))
TEXTS = st.text(max_size=40) | st.text("ab:-[]{}&*!<>|?'\"# \n01.~", max_size=30) | st.sampled_from(
    [
        *("a: !!timestamp x", "a: !!int ''", "a: !!float ''", "a: !!bool x", "a: !!binary é", "? !!set {a}\n: 1", "? !!binary YQ==\n: 1"),
        *("a: &a [*a]", "&a a: *a", "<<: 1", "<<: [{a: 1}, 2]", "a: 0x" + "f" * 5000, "0x" + "f" * 5000 + ": 1", "a: 1:2:99", "[" * 3000),
        *("a: 0001-01-01T00:00:00+23:59", "a: 9999-12-31T23:59:59-23:59", "--- 1\n--- 2", "%YAML 9.9\n---", "a: !!python/name:os.system", "{" * 3000),
    ]
)  # fmt: skip


@st.composite
def configs(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    """A command, and values for some of its options and others."""
    name = draw(st.sampled_from(COMMANDS))
    options = [each.name or "" for each in main.commands[name].params]
    keys = st.sampled_from(options) | st.text(max_size=5)
    return name, draw(st.dictionaries(keys, JSON, max_size=4))


def one_config(config: tuple[str, dict[str, Any]], as_json: bool) -> None:
    one_text(config[0], json.dumps(config[1]), as_json)


def one_text(command: str, text: str, as_json: bool) -> None:
    chosen = main.commands[command]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / ("run.json" if as_json else "run.yaml")
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        try:
            found = read_config(path, chosen, click.Context(chosen))
        except InputError as error:
            said(error)
            return
        assert set(found) <= {each.name for each in chosen.params}
        if command == "check" and not found.get("fix"):
            data = Path(folder) / "data.jsonl"
            data.write_text(json.dumps(FLAT[0]))
            arguments = ["check", str(data), "--config", str(path), "--base", "no/where"]
            ended = CliRunner().invoke(main, arguments, catch_exceptions=False)
            assert ended.exit_code in {0, 1, 2}, ended.output


# ---------------------------------------------------------------- the tests

CHANGES = st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=4)
CHOSEN = st.sampled_from(OPTIONS)
# What is drawn, what is done with it, and how often in the normal run.
CASES: dict[str, tuple[tuple[Any, ...], Callable[..., None], int]] = {
    "any value in any place of a data file": ((mutated(), CHOSEN), one_value, 80),
    "any value in any place of a table": ((mutated(), CHOSEN), one_table, 30),
    "any bytes in any place of a file": ((st.sampled_from(FILES), CHANGES, st.just(0) | st.integers(0, 10**6)), one_damaged, 80),
    "any value for any option of a config file": ((configs(), st.booleans()), one_config, 150),
    "any text of a config file": ((st.sampled_from(COMMANDS), TEXTS, st.booleans()), one_text, 100),
}  # fmt: skip


def fuzz(case: str, times: int) -> None:
    drawn, do, examples = CASES[case]
    rules = settings(
        max_examples=times * examples,
        deadline=None,
        derandomize=times == 1,
        database=None,
        suppress_health_check=[*HealthCheck],
    )
    rules(given(*drawn)(do))()


@pytest.mark.parametrize("case", CASES)
def test_it_is_read_or_refused_by_name(case):
    fuzz(case, 1)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_it_is_read_or_refused_by_name_many_times(case):
    fuzz(case, TIMES)

"""What ``--input`` names: files, folders and globs, here and through pyarrow's file systems."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from qadeploy.batch.sources import Source, expand, local_folder, source_at
from qadeploy.errors import InputError

TREE = ("a/2.jsonl", "a/10.jsonl", "a/_skip.jsonl", "a/.hidden.jsonl", "a/notes.txt", "a/deep/3.parquet", "b/1.jsonl")


@pytest.fixture(autouse=True)
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in TREE:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def paths(*patterns: str) -> list[str]:
    return [os.path.relpath(source.path) for source in expand(patterns)]


def uris(root: Path, *patterns: str) -> list[str]:
    found = [source.path for source in expand([f"file://{root}/{p}" for p in patterns])]
    return [path.removeprefix(f"file://{root}/") for path in found]


@pytest.mark.parametrize(
    ("patterns", "found"),
    [
        (("b/1.jsonl",), ["b/1.jsonl"]),
        (("a",), ["a/10.jsonl", "a/2.jsonl"]),
        (("a/*.jsonl",), None),
        (("*/[0-9].jsonl",), ["a/2.jsonl", "b/1.jsonl"]),
        (("**/*.parquet",), ["a/deep/3.parquet"]),
        (("a/**/[0-9]*",), ["a/10.jsonl", "a/2.jsonl", "a/deep/3.parquet"]),
        (("b/1.jsonl", "a", "b/*.jsonl"), ["b/1.jsonl", "a/10.jsonl", "a/2.jsonl"]),
    ],
)
def test_patterns_name_the_same_files_here_and_through_pyarrow(patterns, found, tree):
    """A glob that names an underscore finds files that begin with one; a folder leaves them out."""
    found = ["a/10.jsonl", "a/2.jsonl", "a/_skip.jsonl"] if found is None else found
    assert paths(*patterns) == found
    there = uris(tree, *patterns)
    assert [path for path in there if not path.endswith(".hidden.jsonl")] == found


def test_a_path_is_taken_as_it_stands_before_it_is_a_glob():
    Path("odd[1].jsonl").write_text("x")
    assert paths("odd[1].jsonl") == ["odd[1].jsonl"]


def test_names_need_no_quotes_through_pyarrow(tree):
    for name in ("two words.jsonl", "100%25.jsonl", "naïve#1.jsonl"):
        Path("b", name).write_text(name)
        (found,) = expand([f"file://{tree}/b/{name}"])
        with found.open() as stream:
            assert stream.read() == name.encode()
    assert len(uris(tree, "b/*.jsonl")) == 4


def test_names_tell_files_apart_below_the_folder_that_holds_them_all(tree):
    assert [s.name for s in expand(["b/1.jsonl"])] == ["1.jsonl"]
    assert [s.name for s in expand(["b/1.jsonl", "a/deep/3.parquet"])] == ["b/1.jsonl", "a/deep/3.parquet"]
    assert [s.name for s in expand([f"file://{tree}/a/deep/3.parquet"])] == ["3.parquet"]


@pytest.mark.parametrize("root", ["", "file://"])
def test_a_source_knows_its_size_and_opens(root, tree):
    (found,) = expand([f"{root}{tree}/b/1.jsonl"])
    assert (found.size, found.kind, found.remote) == (9, ".jsonl", bool(root))
    assert abs(found.modified - os.stat("b/1.jsonl").st_mtime_ns) < 1000
    with found.open() as stream:
        stream.seek(2)
        assert list(stream) == [b"1.jsonl"]
    assert found.stat() == found
    Path("b/1.jsonl").write_text("longer than it was")
    assert found.stat().size == 18
    Path("b/1.jsonl").unlink()
    with pytest.raises(InputError, match="no such file"):
        found.stat()


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("gone.jsonl", "gone.jsonl: no such file"),
        ("gone/*.jsonl", "gone/\\*.jsonl: no file matches"),
        (
            "a/notes.txt",
            "notes.txt: unknown ending '.txt': give files in .arrow, .csv, .gz, .json, .jsonl, .ndjson, .parquet",
        ),
        ("empty", "empty: the folder holds no file in"),
        ("zero.jsonl", "zero.jsonl: the file is empty"),
        ("file:///nowhere/gone.jsonl", "gone.jsonl: no such file"),
        ("file:///nowhere/*.jsonl", "no file matches"),
        ("zork://bucket/key.parquet", "zork://bucket/key.parquet: the file system cannot be opened"),
    ],
)
def test_what_names_nothing_usable_is_refused(pattern, message):
    Path("empty").mkdir()
    Path("zero.jsonl").touch()
    with pytest.raises(InputError, match=message):
        expand([pattern])


def test_nothing_is_refused():
    with pytest.raises(InputError, match="name at least one"):
        expand([])


def test_handbook_and_hub():
    (shipped,) = expand(["handbook"])
    assert shipped.path.endswith("/handbook.jsonl")
    assert shipped.size > 0
    assert expand(["hub:squad"]) == [Source("hub:squad", "hub:squad", 0, 0)]
    assert source_at("hub:squad").kind == ""


def test_answers_go_into_folders_of_this_system():
    assert local_folder("answers") == Path("answers")
    with pytest.raises(InputError, match="answers are written to a local folder"):
        local_folder("s3://bucket/answers")

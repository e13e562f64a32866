"""Small parts: files on disk, timing, and the stored settings."""

from __future__ import annotations

import hashlib
import json
import math
import os
import time

import pytest

from qadeploy.core.settings import QaSettings
from qadeploy.errors import InputError
from qadeploy.files import hash_file, sync_folder, write_json, write_text
from qadeploy.timing import Timing, interleave

# ---------------------------------------------------------------- files


@pytest.mark.parametrize("content", [b"", b"abc", bytes(range(256)) * 4096])
def test_the_hash_is_sha256(tmp_path, content):
    (tmp_path / "file").write_bytes(content)
    assert hash_file(tmp_path / "file") == hashlib.sha256(content).hexdigest()


def test_text_is_written_as_it_is_and_alone(tmp_path):
    text = "é 😀\r\n\n\u2028"
    write_text(tmp_path / "a.txt", "old")
    write_text(tmp_path / "a.txt", text)
    assert (tmp_path / "a.txt").read_bytes() == text.encode("utf-8")
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_json_reads_back_and_keeps_letters(tmp_path):
    value = {"b": [1, None, 0.5], "a": "é 😀"}
    write_json(tmp_path / "a.json", value)
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert json.loads(text) == value
    assert list(json.loads(text)) == ["b", "a"]
    assert '"é 😀"' in text
    assert text.endswith("}\n")


@pytest.mark.parametrize(
    ("broken", "text", "error"),
    [(None, "new \ud800", UnicodeEncodeError), ("fsync", "new", OSError), ("replace", "new", OSError)],
)
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, broken, text, error):
    def fail(*_):
        raise OSError("disk full")

    write_text(tmp_path / "a.txt", "old")
    if broken:
        monkeypatch.setattr(os, broken, fail)
    with pytest.raises(error) as caught:
        write_text(tmp_path / "a.txt", text)
    assert error is not OSError or caught.value.filename == str(tmp_path / "a.txt")  # which the system does not say
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"a.txt": "old"}


def test_the_bytes_are_flushed_before_they_take_the_name(tmp_path, monkeypatch):
    path, seen = tmp_path / "a.txt", []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (seen.append(("fsync", os.fstat(fd).st_size)), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (seen.append(("replace", b)), replace(a, b)))
    write_text(path, "four")
    assert seen == [("fsync", 4), ("replace", path)]


def test_a_folder_is_flushed_with_all_that_is_in_it(tmp_path, monkeypatch):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "file").write_text("1")
    seen, fsync = set(), os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (seen.add(os.readlink(f"/proc/self/fd/{fd}")), fsync(fd)))
    sync_folder(tmp_path / "a")
    assert seen == {str(tmp_path / name) for name in ("a", "a/b", "a/b/file")}


# ---------------------------------------------------------------- timing


@pytest.fixture
def clock(monkeypatch):
    """A clock that advances only when a test adds to its cell."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return now


def test_rounds_are_interleaved_after_a_warm_up_that_is_not_counted(clock):
    calls = []
    seconds = {"a": iter([90, 2, 4, 6, 8]), "b": iter([90, 1, 1, 3, 16]), "c": iter([90, 2, 2, 2, 2])}

    def variant(name):
        def run():
            calls.append(name)
            clock[0] += next(seconds[name])

        return run

    found = interleave({name: variant(name) for name in "abc"}, rounds=4)
    assert "".join(calls) == "abc" + "abc" + "bca" + "cab" + "abc"
    assert list(found) == ["a", "b", "c"]
    assert found["a"] == Timing(seconds=(2, 4, 6, 8), median=5, least=2, most=8, speedup=1, speedup_range=(1, 1))
    assert found["b"] == Timing(seconds=(1, 1, 3, 16), median=2, least=1, most=16, speedup=2, speedup_range=(0.5, 4))
    assert found["c"] == Timing(seconds=(2, 2, 2, 2), median=2, least=2, most=2, speedup=2.5, speedup_range=(1, 4))


def test_the_first_call_of_each_is_not_timed(clock):
    calls = []

    def variant(name):
        def run():
            calls.append(name)
            clock[0] += 2

        return run

    found = interleave({name: variant(name) for name in "ab"}, rounds=2)
    assert calls == ["a", "b", "a", "b", "b", "a"]
    assert found["a"].seconds == (2, 2)


def test_an_error_of_a_variant_is_not_swallowed(clock):
    with pytest.raises(ZeroDivisionError):
        interleave({"a": lambda: 1 / 0}, rounds=1)


# ---------------------------------------------------------------- settings


@pytest.mark.parametrize(
    "settings", [QaSettings(), QaSettings(64, 0, 1), QaSettings(64, 0, 1, -2.5, 0.75, True, "mixed", 0.5, 48)]
)
def test_settings_survive_json_with_keys_of_other_versions_beside_them(settings):
    stored = json.loads(json.dumps({**settings.to_dict(), "later": True}))
    assert QaSettings.from_dict(stored, "run.json") == settings


def test_settings_not_stored_take_their_defaults():
    assert QaSettings.from_dict({"doc_stride": 7, "max_seq_len": None}, "run.json") == QaSettings(doc_stride=7)
    before_thresholds = {"max_seq_len": 384, "doc_stride": 128, "max_answer_len": 15}
    assert QaSettings.from_dict(before_thresholds, "run.json") == QaSettings(384, 128, 15, None, 1.0, metric="squad")


@pytest.mark.parametrize("name", ["max_seq_len", "doc_stride", "max_answer_len"])
@pytest.mark.parametrize("value", [-1, 0, 1.5, 384.0, True, "384", [384]])
def test_settings_are_positive_whole_numbers_but_a_stride_may_be_0(name, value):
    if (name, value) == ("doc_stride", 0):
        assert QaSettings.from_dict({name: value}, "run.json").doc_stride == 0
        return
    with pytest.raises(InputError) as caught:
        QaSettings.from_dict({name: value}, "run.json")
    least = 0 if name == "doc_stride" else 1
    assert str(caught.value) == f"run.json: {name} must be a whole number of at least {least}, not {value!r}"


@pytest.mark.parametrize("value", [0, -1.5, math.nan, math.inf, True, "1", [1], 10**400])
@pytest.mark.parametrize(
    ("name", "needed"),
    [("temperature", "a number above 0"), ("bm25_weight", "a number of at least 0"), ("null_threshold", "a number")],
)
def test_thresholds_are_numbers_and_temperatures_above_0(name, needed, value):
    if value is not True and value in {"null_threshold": (0, -1.5), "bm25_weight": (0,)}.get(name, ()):
        assert getattr(QaSettings.from_dict({name: value}, "run.json"), name) == value
        return
    with pytest.raises(InputError) as caught:
        QaSettings.from_dict({name: value}, "run.json")
    assert str(caught.value) == f"run.json: {name} must be {needed}, not {value!r}"


@pytest.mark.parametrize("value", ["auto", "", "Squad", 1, True, ["mixed"]])
def test_a_stored_metric_is_one_of_two(value):
    with pytest.raises(InputError) as caught:
        QaSettings.from_dict({"metric": value}, "run.json")
    assert str(caught.value) == f"run.json: metric must be squad or mixed, not {value!r}"


def test_options_of_a_call_keep_threshold_temperature_and_metric():
    stored = QaSettings(384, 128, 15, -2.5, 0.75, metric="mixed")
    assert stored.changed(max_seq_len=60, max_answer_len=3) == QaSettings(60, 20, 3, -2.5, 0.75, metric="mixed")

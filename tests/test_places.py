"""One writer per place at a time: a second one or a kill loses nothing, and leftovers of dead writers are deleted."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from qadeploy import files
from qadeploy.errors import InputError
from qadeploy.files import holding, new_file, replace_folder, sweep, temporary_folder, write_text, writing
from tests.sessions_for_tests import until


def child(work: Callable[[], object]) -> int:
    """Runs ``work`` in a forked process and returns its id."""
    pid = os.fork()
    if pid:
        return pid
    try:
        work()
    finally:
        os._exit(0)


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def publish(place: Path, text: str) -> None:
    with holding(place), temporary_folder(place) as work:
        (work / "a").write_text(text)
        (work / "b").write_text(text)
        replace_folder(work, place)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_is_whole_after_a_kill_at_any_moment(tmp_path):
    place = tmp_path / "bundle"
    publish(place, "0")
    seen = set()

    def publish_on() -> None:
        number = 0
        while True:
            number += 1
            publish(place, f"{os.getpid()}.{number}")

    choose = random.Random(3)
    for _ in range(40):
        pid = child(publish_on)
        time.sleep(choose.uniform(0.002, 0.03))
        kill(pid)
        a, b = ((place / name).read_text() for name in ("a", "b"))
        assert a == b
        seen.add(a)
    assert len(seen) > 5
    publish(place, "last")
    assert (place / "a").read_text() == "last"
    assert names(tmp_path) == ["bundle"]  # what the killed ones left is gone


def test_without_an_exchange_a_kill_between_the_renames_is_undone(tmp_path, monkeypatch):
    place = tmp_path / "bundle"
    publish(place, "old")
    monkeypatch.setattr(files, "_renameat2", lambda: None)
    replace = os.replace

    def die(source: Path, target: Path) -> None:
        if target == place:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)

    def killed() -> None:
        monkeypatch.setattr(os, "replace", die)
        publish(place, "new")

    os.waitpid(child(killed), 0)
    assert not place.exists()
    with holding(place):
        assert (place / "a").read_text() == "old"
        assert len(names(tmp_path)) == 2  # and the lock
    publish(place, "new")
    assert (place / "a").read_text() == "new"
    assert names(tmp_path) == ["bundle"]


def test_a_second_writer_is_told_who_is_first(tmp_path):
    place = tmp_path / "out.jsonl"

    def hold() -> None:
        with holding(place):
            time.sleep(60)

    pid = child(hold)
    until(
        lambda: (tmp_path / ".out.jsonl.qadeploy-lock").exists() and (tmp_path / ".out.jsonl.qadeploy-lock").read_text()
    )
    try:
        with pytest.raises(
            InputError, match=rf"out\.jsonl: another command is writing it \(process {pid} on .+, since 20"
        ):
            holding(place).__enter__()
        with holding(tmp_path / "other.jsonl"):
            pass
    finally:
        kill(pid)
    with holding(place):  # the lock ends with its holder
        assert names(tmp_path) == [".out.jsonl.qadeploy-lock"]
    assert names(tmp_path) == []


def test_of_many_writers_at_once_one_writes(tmp_path):
    place, done = tmp_path / "out", tmp_path / "done"
    done.mkdir()

    def write() -> None:
        try:
            with new_file(place, "--output"), writing(place, new=True) as stream:
                time.sleep(0.2)
                stream.write(str(os.getpid()).encode())
        except InputError:
            return
        (done / str(os.getpid())).touch()

    for pid in [child(write) for _ in range(12)]:
        os.waitpid(pid, 0)
    assert names(done) == [place.read_text()]
    assert names(tmp_path) == ["done", "out"]


def test_temporaries_of_the_dead_go_and_those_of_the_living_stay(tmp_path):
    def write(name: str) -> None:
        with writing(tmp_path / name), temporary_folder(tmp_path / f"{name}s"):
            time.sleep(60)

    dead, alive = child(lambda: write("dead")), child(lambda: write("alive"))
    until(lambda: len(names(tmp_path)) == 4)
    kill(dead)
    try:
        for name in ("notes.txt", ".dead.1234.tmp", ".dead.qadeploy-12.tmp"):
            (tmp_path / name).write_text("not ours")
        sweep(tmp_path)
        kept = names(tmp_path)
        assert [name.split(".qadeploy")[0] for name in kept if "alive" in name] == [".alive", ".alives"]
        assert [name for name in kept if "alive" not in name] == [
            ".dead.1234.tmp",
            ".dead.qadeploy-12.tmp",
            "notes.txt",
        ]
    finally:
        kill(alive)


def test_two_containers_with_one_process_id_do_not_meet(tmp_path, monkeypatch):
    """Their temporary files have different names, so neither writes or publishes the other's."""
    monkeypatch.setattr(os, "getpid", lambda: 1)
    with writing(tmp_path / "a") as one:
        with writing(tmp_path / "a") as two:
            two.write(b"two")
        one.write(b"one")
    assert (tmp_path / "a").read_bytes() == b"one"
    assert names(tmp_path) == ["a"]


def test_a_file_that_has_appeared_is_not_overwritten(tmp_path, monkeypatch):
    for can in (True, False):
        if not can:
            monkeypatch.setattr(files, "_renameat2", lambda: None)
        place = tmp_path / f"{can}.txt"
        with pytest.raises(FileExistsError) as caught, writing(place, new=True) as stream:  # noqa: PT012
            stream.write(b"ours")
            place.write_text("theirs")
        assert caught.value.filename == str(place)
        assert place.read_text() == "theirs"
    assert names(tmp_path) == ["False.txt", "True.txt"]


def test_a_file_in_the_place_of_the_lock_is_left_alone(tmp_path):
    theirs = tmp_path / ".out.qadeploy-lock"
    theirs.write_text("a diary")
    with pytest.raises(InputError, match="is in the way and not a lock of qadeploy"):
        holding(tmp_path / "out").__enter__()
    theirs.unlink()
    theirs.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="symbolic links"):
        holding(tmp_path / "out").__enter__()
    assert not (tmp_path / "elsewhere").exists()


def test_without_locks_files_are_written_and_nothing_is_swept(tmp_path, monkeypatch):
    def refuse(*_: object) -> None:
        raise OSError("no locks here")

    stale = tmp_path / ".a.qadeploy-0123456789abcdef.tmp"
    stale.touch()
    monkeypatch.setattr(files.fcntl, "flock", refuse)
    with holding(tmp_path / "a"):
        write_text(tmp_path / "a", "text")
    assert (tmp_path / "a").read_text() == "text"
    assert stale.exists()

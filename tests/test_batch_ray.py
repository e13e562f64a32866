"""The Ray engine for real, on a Ray of this machine that the tests share: the same answers, whatever dies."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pyarrow
import pyarrow.parquet as parquet
import pytest

from qadeploy.batch import ray_engine
from qadeploy.batch.output import Counts
from qadeploy.batch.ray_engine import Cluster, Pool, share_out
from qadeploy.batch.run import BatchProgress, BatchRequest, answer_files
from qadeploy.errors import BundleError, FailureError, InputError
from tests.answerers_for_tests import BREAK, RAISE, SEGFAULT, PoisonedLoad
from tests.conftest import triplets, write_jsonl

ROWS = [{"context": row["context"], "question": row["question"]} for row in triplets(80)]
TWO = Cluster(actors=2, cpus_per_actor=1)


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    """A local Ray, which already runs when the engine starts and keeps running."""
    import ray

    with contextlib.ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setattr(ray_engine, "usable_cpus", lambda: 2)
        with ray_engine.running(Cluster()):
            yield
    assert not ray.is_initialized()


def write_questions(folder: Path) -> Path:
    """Two files of questions, in a folder that is made in ``folder``."""
    asked = folder / "asked"
    asked.mkdir()
    write_jsonl(asked / "a.jsonl", ROWS[:45])
    parquet.write_table(pyarrow.Table.from_pylist(ROWS[45:]), asked / "b.parquet", row_group_size=12)
    return asked


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of two files of questions, beside which the answers are written."""
    monkeypatch.chdir(tmp_path)
    return write_questions(tmp_path)


@pytest.fixture(scope="module")
def without_ray(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, object]]:
    """The answers to the questions of ``asked`` without Ray."""
    folder = tmp_path_factory.mktemp("without-ray")
    answer_files(request(bundle, write_questions(folder), output=str(folder / "out"), cluster=None))
    return answers(str(folder / "out"))


def request(
    bundle: Path, *inputs: Path, output: str = "out", cluster: Cluster | None = TWO, rows: int = 10
) -> BatchRequest:
    return BatchRequest(str(bundle), tuple(map(str, inputs)), output, device="cpu", shard_rows=rows, cluster=cluster)


def answers(folder: str = "out") -> list[dict[str, object]]:
    return parquet.read_table(folder).to_pylist()


def rejected(folder: str = "out") -> dict[int, str]:
    files = sorted(Path(folder, "rejected").glob("*"))
    rows = [json.loads(line) for path in files for line in path.read_text().splitlines()]
    return {row["row"]: row["reason"] for row in rows}


def test_both_engines_give_the_same_answers(bundle, asked):
    passages = [{"question": row["question"], "contexts": [ROWS[0]["context"], row["context"]]} for row in ROWS[:10]]
    write_jsonl(asked / "c.jsonl", passages)
    shown: list[int] = []
    found = answer_files(replace(request(bundle, asked), snippet=20), BatchProgress(advance=shown.append))
    assert found.counts == Counts(90, 0)
    assert sorted(shown) == [5, 5, *[10] * 8]
    answer_files(replace(request(bundle, asked, output="local", cluster=None), snippet=20))
    assert answers() == answers("local")
    assert [path.read_bytes() for path in sorted(Path("out").iterdir())] == [
        path.read_bytes() for path in sorted(Path("local").iterdir())
    ]


@pytest.mark.slow
def test_bad_rows_and_rows_that_kill_are_set_aside_and_nothing_else(bundle, asked):
    rows = [dict(row) for row in ROWS[:30]]
    rows[3]["question"] = " "
    rows[14]["question"] = SEGFAULT
    rows[15]["question"] = RAISE
    rows[24]["question"] = BREAK
    source = write_jsonl(asked.parent / "poison.jsonl", rows)
    found = answer_files(request(bundle, source), load=PoisonedLoad(str(bundle)))
    reasons = rejected()
    assert sorted(reasons) == [4, 15, 16, 25]
    assert found.counts == Counts(26, 4)
    assert reasons[4] == "is empty"
    assert reasons[16] == "RuntimeError: no kernel for this"
    for row in (15, 25):
        assert "its worker process ended 2 times while it answered this row alone" in reasons[row]
    answer_files(request(bundle, write_jsonl(asked.parent / "good.jsonl", ROWS[:30]), output="good", cluster=None))
    assert answers() == [row for n, row in enumerate(answers("good"), 1) if n not in reasons]
    assert not [name for name in os.listdir("out") if name.startswith(".")]


def test_a_killed_actor_loses_nothing_and_nothing_comes_twice(bundle, asked, without_ray):
    pids = asked.parent / "pids"
    pids.mkdir()
    killed: list[int] = []

    def kill(rows: int) -> None:
        if not killed:
            killed.append(int(os.listdir(pids)[0]))
            os.kill(killed[0], signal.SIGKILL)

    found = answer_files(
        request(bundle, asked), BatchProgress(advance=kill), PoisonedLoad(str(bundle), str(pids), 0.02)
    )
    assert killed
    assert len(os.listdir(pids)) > 2  # another process took its place
    assert found.counts == Counts(80, 0)
    assert answers() == without_ray
    assert not Path("out/rejected").exists()


def test_one_engine_goes_on_where_the_other_stopped(bundle, asked, without_ray):
    def stop(rows: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        answer_files(request(bundle, asked), BatchProgress(advance=stop), PoisonedLoad(str(bundle), seconds=0.02))
    done = {path.name: path.stat().st_mtime_ns for path in Path("out").glob("part-*")}
    assert 1 <= len(done) < 9
    found = answer_files(request(bundle, asked, cluster=None))
    assert found.counts == Counts(80, 0)
    assert found.before >= 5
    assert {name: Path("out", name).stat().st_mtime_ns for name in done} == done
    assert answers() == without_ray


@pytest.mark.slow
def test_what_stops_an_actor_is_one_clear_error(bundle, asked, tmp_path):
    with pytest.raises(FailureError, match=r"no such bundle folder.*each must see the bundle"):
        answer_files(request(bundle, asked), load=PoisonedLoad(str(tmp_path / "gone")))

    def vanish(rows: int) -> None:
        (asked / "b.parquet").unlink(missing_ok=True)

    with pytest.raises(FailureError, match=r"b.parquet: rows \d+ to \d+ cannot be read on .*input may be on s3"):
        answer_files(
            request(bundle, asked, output="second"), BatchProgress(advance=vanish), PoisonedLoad(str(bundle), "", 0.02)
        )


@pytest.mark.slow
def test_workers_that_never_get_to_a_row_end_the_run(bundle, asked):
    with pytest.raises(FailureError, match="5 worker processes ended one after the other before"):
        answer_files(request(bundle, asked / "a.jsonl", rows=100), load=_die)


def _die() -> None:
    os._exit(9)


def test_an_actor_that_does_not_load_in_time_ends_the_run(bundle, asked):
    hasty = replace(request(bundle, asked / "a.jsonl", rows=100), load_timeout=0.001)
    with pytest.raises(
        FailureError, match=r"keepers: was not loaded within 0.001 s: raise load_timeout \(--load-timeout\)$"
    ):
        answer_files(hasty)
    assert not list(Path("out").glob("*.parquet"))


@pytest.mark.parametrize(
    ("cluster", "cpus", "gpus", "pool"),
    [
        (Cluster(), 2, 0, Pool(2, 1, 0, 1)),
        (Cluster(), 64, 0, Pool(8, 8, 0, 8)),
        (Cluster(actors=2), 5, 0, Pool(2, 2, 0, 2)),
        (Cluster(actors=3), 2, 0, Pool(3, 0.6666, 0, 1)),
        (Cluster(cpus_per_actor=4), 16, 0, Pool(4, 4, 0, 4)),
        (Cluster("auto"), 100, 0, Pool(100, 1, 0, 1)),
        (Cluster("auto", gpus_per_actor=0.5), 16, 2, Pool(4, 1, 0.5, 1)),
        (Cluster(gpus_per_actor=1), 16, 2, Pool(2, 8, 1, 8)),
    ],
)
def test_cores_are_shared_out(cluster, cpus, gpus, pool):
    assert share_out(cluster, cpus, gpus) == pool


@pytest.mark.parametrize(
    ("cluster", "message"),
    [
        (Cluster(gpus_per_actor=1), "--gpus-per-actor 1 with 1 actors: Ray has 0 GPUs"),
        (Cluster(actors=3, cpus_per_actor=2), "3 actors of 2 CPUs each: Ray has 4 CPUs"),
        (Cluster("auto", actors=9), "9 actors of 1 CPUs each: Ray has 4 CPUs"),
    ],
)
def test_more_than_there_is_is_refused(cluster, message):
    with pytest.raises(InputError, match=message):
        share_out(cluster, 4, 0)


def test_a_damaged_bundle_is_found_before_anything_starts(bundle, asked, tmp_path):
    with pytest.raises((BundleError, InputError)):
        answer_files(request(tmp_path / "typo", asked))
    assert not Path("out").exists()

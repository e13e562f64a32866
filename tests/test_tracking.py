"""``train --report-to``: the figures of each epoch, as TensorBoard reads them back, and trackers that cannot be used."""

from __future__ import annotations

import http.server
import shutil
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from qadeploy.errors import FailureError, InputError, MissingExtraError
from qadeploy.training import tracking
from qadeploy.training.runs import check_replaceable, foreign_in, remove_unfinished
from qadeploy.training.train import RunResult, train
from tests.conftest import tiny_options, triplets, write_jsonl


@pytest.fixture(scope="module")
def tracked(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path) -> RunResult:
    """A run of two epochs reported to TensorBoard."""
    folder = tmp_path_factory.mktemp("tracked")
    data = write_jsonl(folder / "few.jsonl", triplets(24))
    options = tiny_options(data, tiny_checkpoint, folder / "run", epochs=2, report_to="tensorboard")
    return train(options, lambda line: None, progress=False)


def test_tensorboard_has_the_figures_of_each_epoch(tracked):
    events = EventAccumulator(str(tracked.folder / "tensorboard"))
    events.Reload()
    rows = tracked.metrics["epochs"]
    assert len(rows) == 3
    for name in ("loss", "f1", "exact_match", "accuracy"):
        points = events.Scalars(f"eval/{name}")
        assert [p.value for p in points] == pytest.approx([row[f"eval_{name}"] for row in rows], rel=1e-5)
        assert [p.step for p in points] == [0, *(p.step for p in events.Scalars("train/loss"))]


def test_a_tracked_run_is_a_run_and_nothing_else(tracked, tmp_path):
    check_replaceable(tracked.folder)
    run = shutil.copytree(tracked.folder, tmp_path / "run")
    (run / "tensorboard" / "notes.txt").write_text("mine")
    assert foreign_in(run) == ["tensorboard/notes.txt"]
    remove_unfinished(run)
    assert [p.name for p in (run / "tensorboard").iterdir()] == ["notes.txt"]


def test_a_tracker_that_is_not_installed_ends_the_run_before_data_are_read(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "mlflow", None)
    options = tiny_options(tmp_path / "no such file", tmp_path, tmp_path / "run", report_to="mlflow")
    with pytest.raises(MissingExtraError, match=r"--report-to mlflow needs .*: pip install 'qadeploy\[mlflow\]'$"):
        train(options, lambda line: None, progress=False)
    assert not (tmp_path / "run").exists()


def test_a_tracker_that_the_environment_turns_off_is_an_error(monkeypatch):
    monkeypatch.setattr(tracking, "get_available_reporting_integrations", list)
    with pytest.raises(InputError, match="--report-to tensorboard: the environment turns it off: unset WANDB_DISABLED"):
        tracking.check_tracker("tensorboard")


@pytest.mark.parametrize("there", [True, False])
def test_a_server_of_mlflow_that_is_not_there_ends_the_run_before_data_are_read(there, tmp_path, monkeypatch):
    with http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as server:  # answers 501
        threading.Thread(target=server.serve_forever).start()
        if not there:
            server.shutdown()
            server.server_close()
        uri = f"http://me:secret@127.0.0.1:{server.server_port}"
        monkeypatch.setitem(sys.modules, "mlflow", SimpleNamespace(get_tracking_uri=lambda: uri))
        monkeypatch.setattr(tracking, "get_available_reporting_integrations", lambda: ["mlflow"])
        options = tiny_options(tmp_path / "no such file", tmp_path, tmp_path / "run", report_to="mlflow")
        wanted = (
            (InputError, "no such file") if there else (FailureError, r"mlflow: 127\.0\.0\.1 cannot be reached within")
        )
        with pytest.raises(wanted[0], match=wanted[1]) as caught:
            train(options, lambda line: None, progress=False)
        server.shutdown()
    assert "secret" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_an_error_of_the_tracker_is_one_message_and_others_pass():
    class UsageError(Exception):
        __module__ = "wandb.errors.errors"

    with pytest.raises(FailureError, match="--report-to wandb: no API key: check"), tracking.tracker_errors("wandb"):
        raise UsageError("no API key")
    with pytest.raises(ZeroDivisionError), tracking.tracker_errors("wandb"):
        raise ZeroDivisionError

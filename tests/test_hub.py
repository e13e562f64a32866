"""Models of the hub: revision, token and commit against a server that speaks its protocol, and remote code."""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from transformers import AutoTokenizer

from qadeploy.cli import main
from qadeploy.errors import CheckpointError
from qadeploy.training.checkpoint import Hub, load_checkpoint
from qadeploy.training.train import train
from tests.cli_for_tests import run, well
from tests.conftest import tiny_options, triplets, write_jsonl
from tests.processes_for_tests import succeeded

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(tiny_checkpoint: Path) -> Iterator[tuple[str, list[tuple[str, str | None]]]]:
    """The address of a hub with the private model me/tiny at revision v2, and the requests' (path, authorization)."""
    asked: list[tuple[str, str | None]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            asked.append((self.path, self.headers["authorization"]))
            file = tiny_checkpoint / self.path.rpartition("/")[2]
            status = 200 if self.path.startswith("/me/tiny/resolve/v2/") and file.is_file() else 404
            if self.headers["authorization"] not in {"Bearer hf_flag", "Bearer hf_environment"}:
                status = 401
            body = file.read_bytes() if status == 200 else b""
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("ETag", f'"{file.name}"')
            self.send_header("X-Repo-Commit", COMMIT)
            if status != 200:
                self.send_header("X-Error-Code", "EntryNotFound" if status == 404 else "RepoNotFound")
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_GET = do_HEAD  # noqa: N815 - the name that http.server looks for

        def log_message(self, *args: Any) -> None:
            """Says nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    thread.join()
    server.server_close()


LOAD = """
import json
import sys
from qadeploy.training.checkpoint import Hub, load_checkpoint
from qadeploy.training.provenance import commit_of
from qadeploy.errors import CheckpointError

found = []
for token in ("hf_flag", None, "hf_wrong"):
    try:
        checkpoint = load_checkpoint("me/tiny", Hub(revision="v2", token=token))
        found.append([commit_of(checkpoint), checkpoint.new_head])
    except CheckpointError as error:
        found.append(str(error))
print(json.dumps(found))
"""


def test_revision_and_token_reach_the_hub_and_the_token_no_error(hub, tmp_path):
    address, asked = hub
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING_FACE"))}
    environment |= {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path), "HF_TOKEN": "hf_environment"}
    environment |= {"HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1"}
    command = [sys.executable, "-c", LOAD]
    done = succeeded(command, timeout=120, env=environment)
    by_flag, by_environment, refused = json.loads(done.stdout)
    assert by_flag == by_environment == [COMMIT, False]
    config = "/me/tiny/resolve/v2/config.json"
    assert {a for path, a in asked if path == config} == {"Bearer hf_flag", "Bearer hf_environment", "Bearer hf_wrong"}
    assert {path.split("/")[4] for path, _ in asked if "/resolve/" in path} == {"v2"}
    assert refused.startswith("me/tiny: no such folder, and no model of that name could be loaded from the hub")
    assert not any(secret in refused + done.stderr for secret in ("hf_flag", "hf_wrong", "hf_environment"))


CONFIGURATION = """
from transformers import BertConfig

class OwnConfig(BertConfig):
    model_type = "own-bert"
"""
MODEL = """
from pathlib import Path
from transformers import BertForQuestionAnswering
from .configuration_own import OwnConfig

class OwnForQuestionAnswering(BertForQuestionAnswering):
    config_class = OwnConfig
"""


def test_code_of_a_model_runs_only_when_asked_for(tiny_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    base = tmp_path / "own"
    base.mkdir()
    AutoTokenizer.from_pretrained(tiny_checkpoint).save_pretrained(base)
    (base / "model.safetensors").write_bytes((tiny_checkpoint / "model.safetensors").read_bytes())
    config = json.loads((tiny_checkpoint / "config.json").read_text())
    config |= {
        "model_type": "own-bert",
        "architectures": ["OwnForQuestionAnswering"],
        "auto_map": {
            "AutoConfig": "configuration_own.OwnConfig",
            "AutoModelForQuestionAnswering": "modeling_own.OwnForQuestionAnswering",
        },
    }
    (base / "config.json").write_text(json.dumps(config))
    ran = tmp_path / "ran"
    (base / "configuration_own.py").write_text(CONFIGURATION)
    (base / "modeling_own.py").write_text(MODEL + f"\nPath({str(ran)!r}).touch()\n")

    data = write_jsonl(tmp_path / "few.jsonl", triplets(16))
    options = tiny_options(data, base, tmp_path / "run", epochs=1)
    with pytest.raises(CheckpointError, match=r"own: comes with its own Python code, .* give --trust-remote-code"):
        train(options, lambda line: None, progress=False)
    assert not ran.exists()
    trusted = tiny_options(data, base, tmp_path / "run", epochs=1, trust_remote_code=True)
    train(trusted, lambda line: None, progress=False)
    assert ran.exists()
    with pytest.raises(CheckpointError, match="--trust-remote-code"):
        load_checkpoint(tmp_path / "run" / "checkpoint")
    loaded = load_checkpoint(tmp_path / "run" / "checkpoint", Hub(trust_remote_code=True))
    assert type(loaded.model).__name__ == "OwnForQuestionAnswering"

    bundle = str(tmp_path / "bundle")
    export = ["export", str(tmp_path / "run"), "--out", bundle, "--no-optimize"]
    refused = CliRunner().invoke(main, export)
    assert (refused.exit_code, "give --trust-remote-code" in refused.output) == (1, True)
    assert run(*export, "--trust-remote-code").exit_code == 0
    ask = ["ask", str(tmp_path / "run"), "--question", "Who keeps the lamp?", "--context", "Ada keeps the lamp."]
    assert CliRunner().invoke(main, ask).exit_code == 1
    assert run(*ask, "--trust-remote-code").exit_code == 0
    bench = ["bench", bundle, "--against", "pipeline,torch", "--data", str(data), "--questions", "4", "--rounds", "1"]
    result = well(*bench, "--trust-remote-code", "--latency-questions", "1", "--json")
    report = json.loads(result.stdout)
    assert [row["status"] for row in report["variants"]] == ["ok"] * 3

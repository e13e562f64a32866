"""Mutated bundles with matching hashes, for minutes (pytest -m slow): each answers or is refused with one error."""

from __future__ import annotations

import collections
import contextlib
import json
import os
import random
import shutil
import signal
import time
import warnings
from pathlib import Path

import onnx
import pytest

from qadeploy.errors import QadeployError
from qadeploy.inference.answerer import Answerer
from qadeploy.inference.bundle import open_bundle, seal
from tests.test_bundle import put_manifest
from tests.test_hostile_bundles import LONG, PAIRS, places

SECONDS = float(os.environ.get("QADEPLOY_FUZZ_SECONDS", "600"))
OUTCOMES = {0: "answered", 1: "refused", 2: "raw"}


def mutate_json(chosen: random.Random, path: Path) -> None:
    """Puts any value in some places of a JSON file."""
    value = json.loads(path.read_text())
    for _ in range(chosen.choice([1, 1, 1, 3])):
        place = chosen.choice(places(value))
        inner = value
        for key in place[:-1]:
            inner = inner[key]
        inner[place[-1]] = chosen.choice([None, True, -1, 0, 7, 10**30, 0.5, "", "x", "\ud800", [], {}, [0], {"a": 1}])
    path.write_bytes(json.dumps(value).encode("utf-8", "surrogatepass"))


def mutate_model(chosen: random.Random, path: Path) -> None:
    """Changes a node, a weight, an input or an output of a model, or some of its bytes."""
    data = bytearray(path.read_bytes())
    if chosen.random() < 0.3:
        for _ in range(chosen.choice([1, 8])):
            data[chosen.randrange(len(data))] = chosen.randrange(256)
        path.write_bytes(data)
        return
    proto = onnx.load_model_from_string(bytes(data))
    node, weight = chosen.choice(proto.graph.node), chosen.choice(proto.graph.initializer)
    value = chosen.choice([*proto.graph.input, *proto.graph.output])
    match chosen.randrange(7):
        case 0:
            node.op_type = chosen.choice(
                ["Neg", "Loop", "If", "Identity", "Shape", "Size", "Reshape", "Tile", "Nonsense"]
            )
        case 1:
            node.domain = chosen.choice(["com.microsoft", "ai.onnx.ml", "x"])
        case 2 if len(node.input):
            node.input[0] = chosen.choice([*(i.name for i in proto.graph.input), weight.name, "nothing"])
        case 3:
            weight.dims.append(chosen.choice([0, 1, 2**40]))
        case 4:
            weight.data_type = chosen.choice([1, 6, 7, 8, 10, 99])
        case 5:
            value.type.tensor_type.elem_type = chosen.choice([1, 6, 7, 8, 10])
        case _:
            value.name = chosen.choice(["input_ids", "start_logits", "x"])
    path.write_bytes(proto.SerializeToString())


def outcome(folder: Path) -> int:
    """The result of a bundle in a child process: answered, refused or raw; or minus a signal, or -100 if it hangs."""
    child = os.fork()
    if not child:
        status = 2
        with contextlib.suppress(BaseException), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # some warn of another machine, as they should
            try:
                loaded = Answerer.load(folder, device="cpu", threads=1)
                sound = all(LONG[a.start : a.end] == a.text for a in loaded.answer(PAIRS[0][0], LONG, top_k=3))
                status = 0 if sound else 2
            except QadeployError:
                status = 1
        os._exit(status)
    end = time.monotonic() + 60
    while time.monotonic() < end:
        gone, status = os.waitpid(child, os.WNOHANG)
        if gone:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return -100


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:This process.*is multi-threaded, use of fork:DeprecationWarning")  # Python 3.12
def test_mutated_bundles_end_in_an_answer_or_one_error(bundle, tmp_path, capsys):
    """The hashes of all of them match, with and without the probe."""
    chosen = random.Random(16)
    counts: collections.Counter[str] = collections.Counter()
    bad: list[str] = []
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        number = counts.total()
        folder = shutil.copytree(bundle, tmp_path / "case")
        values = {k: v for k, v in open_bundle(bundle).manifest.items() if k not in {"schema", "files"}}
        if chosen.random() < 0.5:
            values.pop("probe")
        (folder / "manifest.json").unlink()
        name, change = chosen.choice(
            [("tokenizer.json", mutate_json), ("model.onnx", mutate_model), ("manifest.json", mutate_json)]
        )
        if name != "manifest.json":
            change(chosen, folder / name)
        seal(folder, values)
        if name == "manifest.json":
            change(chosen, folder / name)
            manifest = json.loads((folder / name).read_text(errors="surrogatepass"))
            put_manifest(folder, {key: value for key, value in manifest.items() if key != "manifest_sha256"})
        found = outcome(folder)
        counts[f"{name}: {OUTCOMES.get(found, found)}"] += 1
        if found not in {0, 1}:
            bad.append(f"case {number}, {name}: {OUTCOMES.get(found, found)}")
            shutil.move(folder, tmp_path / f"bad{number}")
        else:
            shutil.rmtree(folder)
    with capsys.disabled():
        print(dict(counts))
    assert not bad

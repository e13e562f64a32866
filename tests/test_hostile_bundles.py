"""Bundles with matching hashes and bad content: refused with one error, or harmless."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from tokenizers import Tokenizer, models, processors

from qadeploy.cli import main
from qadeploy.core.settings import Options
from qadeploy.core.windows import pad_batch
from qadeploy.errors import BundleError, InputError, LoadTimeoutError, QadeployError
from qadeploy.files import replace_folder
from qadeploy.inference.answerer import Answerer
from qadeploy.inference.bundle import manifest_text, open_bundle, seal
from qadeploy.inference.graph_model import GraphModel
from qadeploy.inference.load_timeout import within
from tests.conftest import sealed_copy, triplets, write_jsonl
from tests.processes_for_tests import ended
from tests.test_bundle import put_manifest
from tests.test_session_answerer import crafted, run_script

PAIRS = [(str(row["question"]), str(row["context"])) for row in triplets(24)]
LONG = " ".join(context for _, context in PAIRS)
NAMES = ("input_ids", "attention_mask", "token_type_ids")
ANY = ["batch", "sequence"]


@pytest.fixture
def copy(bundle: Path, tmp_path: Path) -> Path:
    return shutil.copytree(bundle, tmp_path / "copy")


# ---------------------------------------------------------------- the manifest

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([-1, 0, 1, 10**30, 2**63]),
    st.floats(allow_nan=False),
    st.text(max_size=5),
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=4), inner, max_size=2)
)


def places(value: object, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of all values inside a value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [p for key, each in inner for p in ((*path, key), *places(each, (*path, key)))]


@pytest.fixture(scope="module")
def scratch(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shutil.copytree(bundle, tmp_path_factory.mktemp("scratch") / "copy")


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_value_in_any_place_of_a_manifest_is_refused_or_harmless(data, bundle, scratch):
    manifest = open_bundle(bundle).manifest
    used = {name: manifest[name] for name in manifest if name not in {"measured", "parity", "tuning", "versions"}}
    path = data.draw(st.sampled_from(places(used)))
    inner: Any = manifest
    for key in path[:-1]:
        inner = inner[key]
    if isinstance(inner, dict) and data.draw(st.booleans()):
        del inner[path[-1]]
    else:
        inner[path[-1]] = data.draw(VALUES)
    put_manifest(scratch, manifest)
    try:
        loaded = Answerer.load(scratch, device="cpu", threads=1)
    except QadeployError:
        return
    try:
        answers = loaded.answer(*PAIRS[0])
    except QadeployError:
        return
    assert all(PAIRS[0][1][a.start : a.end] == a.text for a in answers)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("settings", "temperature"), 1e400, "Infinity is no JSON value"),
        (("settings", "max_seq_len"), 10**30, r"settings\.max_seq_len must be at most 1048576"),
        (("encoder", "segments"), 10**30, r"encoder\.segments must be at most 256"),
        (("encoder", "position_limit"), 10**30, r"encoder\.position_limit must be at most"),
        (("files", "model.onnx", "size"), 1.5, r"files\.model\.onnx\.size must be a whole number of bytes"),
        (("in_graph",), "text", "in_graph must be an object, not 'text'"),
        (("in_graph",), {"kind": "text", "k": 3}, r"made\.from must be a name|in_graph"),
        (("in_graph",), {"kind": ["text"]}, r"in_graph\.kind must be spans or text"),
        (("session",), {"layout": {"one": ["wide"]}}, r"session\.layout\.one must be wide or narrow"),
        (("session",), {"disabled_optimizers": ["a\nb"]}, r"session\.disabled_optimizers must be a list of names"),
        (("machine", "instruction_sets"), [{}], r"machine\.instruction_sets must be a list of names"),
        (("probe", "start_logits"), [1.0], r"probe\.start_logits must be a list of \d+ numbers"),
        (("probe", "input_ids"), ["a"], r"probe\.input_ids must be a list of token ids"),
        (("drift",), [1], r"drift must be an object"),
        (("drift", "score"), 1, r"drift\.score must be an object"),
        (("drift", "score", "bounds"), [0.2, 0.1], r"drift\.score\.bounds must be an ascending list of numbers"),
        (("drift", "score", "bounds"), list(range(101)), r"drift\.score\.bounds must be"),
        (("drift", "score", "counts"), [1, -1], r"drift\.score\.counts must be a list of 12 numbers of questions"),
        (("drift", "no_answer", "counts"), [0, 0], r"drift\.no_answer\.counts must be a list of 2 .*, not all 0"),
    ],
)
def test_values_that_used_to_end_raw(copy, path, value, message):
    manifest = open_bundle(copy).manifest
    manifest.setdefault("made", {}).pop("from", None)
    inner = manifest
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    put_manifest(copy, manifest)
    with pytest.raises(BundleError, match=message):
        Answerer.load(copy, device="cpu")


def test_a_number_that_no_float_holds(copy):
    text = manifest_text({**open_bundle(copy).manifest, "more": 123456789.5}).replace("123456789.5", "1e400")
    (copy / "manifest.json").write_text(text)
    with pytest.raises(BundleError, match="the number 1e400 is out of range"):
        open_bundle(copy)


def test_a_manifest_is_hashed_as_its_bytes(copy):
    data = (copy / "manifest.json").read_bytes()
    (copy / "manifest.json").write_bytes(data.replace(b"\n", b"\r\n"))
    with pytest.raises(BundleError, match="does not match its own SHA-256"):
        open_bundle(copy)


@pytest.mark.skipif(sys.platform == "darwin", reason="its file names are UTF-8")
def test_a_name_on_disk_that_is_not_utf8(copy):
    Path(os.fsdecode(os.fsencode(copy) + b"/\xff")).write_text("x")
    with pytest.raises(BundleError, match=r"holds '\\udcff', which the manifest does not list") as caught:
        open_bundle(copy)
    str(caught.value).encode()


def test_a_pipe_is_no_file_of_a_bundle(copy):
    (copy / "README.md").unlink()
    os.mkfifo(copy / "README.md")
    with pytest.raises(BundleError, match=r"README\.md: is missing or not a plain file"):
        open_bundle(copy)


# ---------------------------------------------------------------- the bundle that is meant


def test_only_the_bundle_that_is_meant_is_loaded(bundle, tmp_path):
    meant = open_bundle(bundle).hash
    assert Answerer.load(bundle, device="cpu", sha256=meant).answer(*PAIRS[0])
    other = sealed_copy(bundle, tmp_path / "other", name="other")  # intact, and its hashes match
    assert Answerer.load(other, device="cpu").answer(*PAIRS[0])
    with pytest.raises(BundleError, match=f"not {meant}: this is not the expected bundle"):
        Answerer.load(other, device="cpu", sha256=meant)
    with pytest.raises(InputError, match="must be 64 hexadecimal digits, not 'abc'"):
        Answerer.load(bundle, sha256="abc")


@pytest.mark.parametrize("command", ["ask", "evaluate", "answer", "serve"])
def test_every_command_that_answers_can_be_told_which(bundle, tmp_path, command):
    rows = write_jsonl(tmp_path / "rows.jsonl", triplets(2))
    more = {
        "ask": ["--question", "Who keeps the lamp?", "--context", "Ada keeps the lamp."],
        "evaluate": ["--data", str(rows)],
        "answer": ["--input", str(rows), "--output", str(tmp_path / "out.jsonl")],
        "serve": ["--port", "0"],
    }[command]
    done = CliRunner().invoke(main, [command, str(bundle), *more, "--bundle-sha256", "0" * 64])
    assert (done.exit_code, "this is not the expected bundle" in done.stderr) == (1, True)
    if command != "serve":
        assert (
            CliRunner()
            .invoke(main, [command, str(bundle), *more, "--bundle-sha256", open_bundle(bundle).hash])
            .exit_code
            == 0
        )


def test_a_checkpoint_is_not_the_bundle_that_is_meant(tiny):
    done = CliRunner().invoke(
        main, ["ask", str(tiny.run), "--question", "Who?", "--context", "Ada.", "--bundle-sha256", "0" * 64]
    )
    assert (done.exit_code, "is not a bundle, which --bundle-sha256 requires" in done.stderr) == (2, True)


# ---------------------------------------------------------------- the time for loading

LOADS_FOR_EVER = """
import sys
from qadeploy import Answerer
from qadeploy.cli import main

load = Answerer._load
def forever(*given):
    print("loading", file=sys.stderr, flush=True)
    while True:
        load(*given)
Answerer._load = forever
main(sys.argv[1:])
"""


@pytest.mark.parametrize("command", ["ask", "answer", "bench", "evaluate", "export", "label", "serve", "train", "tune"])
def test_every_command_that_loads_a_bundle_ends_in_time(bundle, tiny_checkpoint, tmp_path, command):
    rows = str(write_jsonl(tmp_path / "rows.jsonl", triplets(8)))
    out = ("--out", str(tmp_path / "out.jsonl"))
    models = ["--base", str(tiny_checkpoint), "--teacher", str(bundle)]
    given = {
        "label": [rows, "--bundle", str(bundle), "--annotator", "ada", "--port", "0", *out],
        "train": ["--data", rows, *models, "--precision", "fp32", *out],
    }
    more = {
        "ask": ["--question", "Who keeps the lamp?", "--context", "Ada keeps the lamp."],
        "answer": ["--input", rows, "--output", str(tmp_path / "out.jsonl")],
        "bench": ["--data", rows, "--against", ""],
        "evaluate": ["--data", rows],
        "export": ["--text-in-graph", *out],
        "serve": ["--port", "0"],
        "tune": ["--data", rows, "--dry-run"],
    }
    arguments = given.get(command) or [str(bundle), *more[command]]
    done = ended([sys.executable, "-c", LOADS_FOR_EVER, command, *arguments, "--load-timeout", "0.5"], timeout=60)
    message = f"Error: {bundle}: was not loaded within 0.5 s: raise load_timeout (--load-timeout)"
    assert (done.returncode, done.stderr.splitlines()[-1]) == (1, message)


def test_ctrl_c_ends_a_load(bundle):
    command = [sys.executable, "-c", LOADS_FOR_EVER, "ask", str(bundle), "--question", "Who?", "--context", "Ada."]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr.readline() == "loading\n"
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        assert (process.wait(20), process.stderr.read().strip()) == (1, "Aborted!")


def test_a_load_that_never_ends_is_left_behind_and_its_own_errors_come_through(bundle):
    released = threading.Event()
    with pytest.raises(
        LoadTimeoutError, match=r"^x: was not loaded within 0.05 s: raise load_timeout \(--load-timeout\)$"
    ):
        within(0.05, released.wait, "x")
    released.set()
    for error in (TimeoutError("mine"), BundleError("damaged"), KeyboardInterrupt()):
        with pytest.raises(type(error)) as caught:
            within(60, partial(_raise, error), "x")
        assert caught.value is error
    assert within(1e300, lambda: "answerer", "x") == within(None, lambda: "answerer", "x") == "answerer"
    with pytest.raises(InputError, match=r"^load_timeout must be a number of seconds above 0, not nan$"):
        Answerer.load(bundle, load_timeout=float("nan"))
    assert Answerer.load(bundle, load_timeout=60).answer(*PAIRS[0])


def _raise(error: BaseException) -> None:
    raise error


# ---------------------------------------------------------------- the model


def model(
    nodes: list[onnx.NodeProto],
    outputs: list[onnx.ValueInfoProto] | None = None,
    *,
    shape: list[Any] | None = None,
    functions: list[onnx.FunctionProto] | None = None,
    domains: tuple[str, ...] = (),
    rows: int = 1,
) -> bytes:
    """A model with the inputs of a BERT, and ``x`` for its tokens as floats."""
    inputs = [helper.make_tensor_value_info(name, TensorProto.INT64, shape or ANY) for name in NAMES]
    outputs = outputs or [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("start_logits", "end_logits")
    ]
    weights = [
        numpy_helper.from_array(np.int64([1]), "one"),
        numpy_helper.from_array(np.int64([7]), "seven"),
        numpy_helper.from_array(np.arange(rows, dtype=np.float32), "table"),
        numpy_helper.from_array(np.array(2**62), "turns"),
        numpy_helper.from_array(np.array(True), "yes"),
    ]
    graph = helper.make_graph(
        [helper.make_node("Cast", ["input_ids"], ["x"], to=TensorProto.FLOAT), *nodes], "g", inputs, outputs, weights
    )
    opsets = [helper.make_opsetid(domain, 17 if not domain else 1) for domain in ("", *domains)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10, functions=functions or []).SerializeToString()


def each(operator: str, *inputs: str, **attributes: Any) -> list[onnx.NodeProto]:
    return [helper.make_node(operator, list(inputs), [name], **attributes) for name in ("start_logits", "end_logits")]


def text_outputs() -> list[onnx.ValueInfoProto]:
    return [helper.make_tensor_value_info(name, TensorProto.STRING, ANY) for name in ("start_logits", "end_logits")]


def looping() -> list[onnx.NodeProto]:
    body = helper.make_graph(
        [helper.make_node("Identity", ["go"], ["on"]), helper.make_node("Identity", ["held"], ["kept"])],
        "body",
        [
            helper.make_tensor_value_info("turn", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            helper.make_tensor_value_info("held", TensorProto.FLOAT, None),
        ],
        [
            helper.make_tensor_value_info("on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("kept", TensorProto.FLOAT, None),
        ],
    )
    return [helper.make_node("Loop", ["turns", "yes", "x"], ["start_logits"], body=body), *each("Identity", "x")[1:]]


def nested() -> list[onnx.FunctionProto]:
    """Thirty functions, each calling the previous one twice: 2^30 nodes."""
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("", 17)]
    calls = [("Neg", ""), *((f"f{i}", "own") for i in range(29))]
    return [
        helper.make_function(
            "own", f"f{i}", ["a"], ["c"],
            [helper.make_node(name, ["a"], ["b"], domain=domain), helper.make_node(name, ["b"], ["c"], domain=domain)],
            [*opsets[:1], helper.make_opsetid("own", 1)],
        )
        for i, (name, domain) in enumerate(calls)
    ]  # fmt: skip


MODELS = {
    "another-shape": (model(each("Concat", "x", "x", axis=1)), r"start_logits must be numbers \[1, \d+\], not float32 \[1, \d+\]"),
    "another-rank": (model(each("Unsqueeze", "x", "one")), r"start_logits must be numbers \[1, \d+\], not float32 \[1, 1, \d+\]"),
    "whole-numbers": (
        model(each("Identity", "input_ids"), [helper.make_tensor_value_info(n, TensorProto.INT64, ANY) for n in ("start_logits", "end_logits")]),
        "must be numbers .* not int64",
    ),
    "strings": (model(each("Cast", "input_ids", to=TensorProto.STRING), text_outputs()), r"must be numbers .*, not (object|str)"),
    "sequences": (
        model(
            each("SequenceConstruct", "x"),
            [helper.make_tensor_sequence_value_info(n, TensorProto.FLOAT, None) for n in ("start_logits", "end_logits")],
        ),
        "must be numbers .* not list",
    ),
    "fixed-shape": (model(each("Identity", "x"), shape=[1, 384]), r"input_ids has the shape \[1, 384\], not any number"),
    "third-dimension": (model(each("Identity", "x"), shape=["a", "b", "c"]), "input_ids has the shape"),
    "fails-when-run": (model(each("Reshape", "x", "seven")), "ONNX Runtime cannot run it: "),
    "loop": (model(looping()), "has Loop nodes, which a bundle may not have"),
    "functions": (model(each("f29", "x", domain="own"), functions=nested(), domains=("own",)), "defines functions"),
    "foreign-domain": (model(each("Neg", "x", domain="evil"), domains=("evil",)), "operators of the domain 'evil'"),
    "reads-a-file": (
        model(each("EPContext", "x", domain="com.microsoft", ep_cache_context="/etc/passwd", embed_mode=0), domains=("com.microsoft",)),
        "has EPContext nodes",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", MODELS)
def test_models_that_are_refused_when_loaded(bundle, tmp_path, kind):
    crafted_model, message = MODELS[kind]
    folder = sealed_copy(bundle, tmp_path / "copy", crafted_model)
    begun = time.monotonic()
    with pytest.raises(BundleError, match=message):
        Answerer.load(folder, device="cpu", threads=1)
    assert time.monotonic() - begun < 30


@pytest.mark.parametrize("missing", [0, 1])
def test_a_model_must_know_every_token_of_its_tokenizer(bundle, tmp_path, missing):
    rows = open_bundle(bundle).load_encoder().vocabulary - missing
    folder = sealed_copy(bundle, tmp_path / "copy", model(each("Gather", "table", "input_ids"), rows=rows))
    if missing:
        with pytest.raises(BundleError, match=f"does not accept token {rows}, the last of its tokenizer"):
            Answerer.load(folder, device="cpu")
    else:
        Answerer.load(folder, device="cpu")


def test_another_model_with_the_same_inputs_is_noticed(bundle, tmp_path):
    probe = open_bundle(bundle).manifest["probe"]
    folder = sealed_copy(bundle, tmp_path / "copy", crafted(0.01), probe=probe)
    with pytest.raises(
        BundleError, match=r"from those at export, but at most .* is allowed: the model is damaged or not the exported"
    ):
        Answerer.load(folder, device="cpu")


def test_the_probe_lets_another_machine_round_otherwise(bundle, tmp_path):
    probe = open_bundle(bundle).manifest["probe"]
    moved = {**probe, "start_logits": [x + 0.02 for x in probe["start_logits"]]}
    assert np.ptp(probe["start_logits"]) > 1
    assert Answerer.load(sealed_copy(bundle, tmp_path / "copy", probe=moved), device="cpu").answer(*PAIRS[0])


# ---------------------------------------------------------------- the tokenizer


def without_template(tokenizer: Tokenizer) -> None:
    tokenizer.post_processor = processors.TemplateProcessing(single="$A", pair="$A $B:1", special_tokens=[])


def without_unknown(tokenizer: Tokenizer) -> None:
    vocabulary = {token: number for token, number in tokenizer.get_vocab().items() if token != "[UNK]"}
    tokenizer.model = models.WordPiece(vocabulary, unk_token="[UNK]")


def with_other_ids(tokenizer: Tokenizer) -> None:
    vocabulary = tokenizer.get_vocab()
    vocabulary["the"], vocabulary["lamp"] = vocabulary["lamp"], vocabulary["the"]
    tokenizer.model = models.WordPiece(vocabulary, unk_token="[UNK]")


def with_a_template_of_no_token(tokenizer: Tokenizer) -> None:
    """The template names a token that it does not describe, at which the library panics."""
    value = json.loads(tokenizer.to_str())
    value["post_processor"]["special_tokens"] = {}
    tokenizer.__setstate__(json.dumps(value).encode())


@pytest.mark.parametrize("change", [without_template, without_unknown, with_other_ids, with_a_template_of_no_token])
def test_a_tokenizer_that_is_not_the_one_of_the_export(bundle, tmp_path, change):
    folder = shutil.copytree(bundle, tmp_path / "copy")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    change(tokenizer)
    values = {k: v for k, v in open_bundle(bundle).manifest.items() if k not in {"schema", "files"}}
    (folder / "manifest.json").unlink()
    (folder / "tokenizer.json").write_text(tokenizer.to_str())
    seal(folder, values)
    with pytest.raises(
        BundleError,
        match=r"does not split the manifest's probe|its tokenizer cannot be used: .* Missing \[UNK\]|tokenizer\.json: cannot be used: no entry found",
    ):
        Answerer.load(folder, device="cpu")


# ---------------------------------------------------------------- replaced while in use


@pytest.fixture
def replaced(bundle: Path, tmp_path: Path) -> tuple[Answerer, Answerer]:
    """An answerer whose bundle was replaced and deleted before its second session was made, and one of the same bundle."""
    folder = shutil.copytree(bundle, tmp_path / "copy")
    loaded = Answerer.load(folder, device="cpu", threads=2)
    replace_folder(sealed_copy(bundle, tmp_path / "other", crafted(3.0)), folder)
    shutil.rmtree(folder)
    return loaded, Answerer.load(bundle, device="cpu", threads=2)


def test_an_answerer_goes_on_with_the_bundle_it_verified(replaced):
    loaded, intact = replaced
    expected = intact.answer_batch(PAIRS)
    assert loaded.answer_batch(PAIRS) == expected  # the narrow session, which is made now
    assert list(loaded.answer_stream(PAIRS)) == expected
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda pair: loaded.answer(*pair), PAIRS[:4]))
    # Alone, not in a batch: a window is padded to another length, and the scores' last bits may differ.
    assert found == [intact.answer(*pair) for pair in PAIRS[:4]]


@pytest.mark.filterwarnings("ignore:This process.*is multi-threaded, use of fork:DeprecationWarning")  # Python 3.12
def test_a_forked_child_too(replaced):
    loaded, intact = replaced
    expected = intact.answer_batch(PAIRS)
    child = os.fork()
    if not child:
        status = 1
        try:
            status = 0 if loaded.answer_batch(PAIRS) == expected else 3
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_bundle_replaced_again_and_again_always_opens(bundle, tmp_path):
    """Every load sees a complete bundle."""
    place = shutil.copytree(bundle, tmp_path / "place")
    others = [sealed_copy(bundle, tmp_path / f"other{i}", name=f"other{i}") for i in range(2)]
    done = threading.Event()

    def replace() -> None:
        for i in range(60):
            replace_folder(shutil.copytree(others[i % 2], tmp_path / f"next{i}"), place)
        done.set()

    thread = threading.Thread(target=replace)
    thread.start()
    names = set()
    try:
        while not done.is_set():
            names.add(open_bundle(place).manifest["name"])
    finally:
        thread.join()
    assert names


# ---------------------------------------------------------------- forks in the middle of runs

FORKS = """
import os, sys, threading, time, warnings
warnings.simplefilter("ignore")
from qadeploy.inference.answerer import Answerer
from qadeploy.core.settings import Options

answerer = Answerer.load(sys.argv[1], device="cpu", threads=2)
question, context = "Who keeps the lamp?", "Ada keeps the lamp in room 3. " * 20
expected = answerer.answer(question, context)
done = False

def ask():
    while not done:
        answerer.answer_batch([(question, context)] * 8)

threads = [threading.Thread(target=ask, daemon=True) for _ in range(3)]
for thread in threads:
    thread.start()
children = {}
for _ in range(int(sys.argv[2])):
    held = answerer.read(question, context, Options())  # logits, freed in the child
    child = os.fork()
    if not child:
        del held
        os._exit(0 if answerer.answer(question, context) == expected else 3)
    children[child] = time.monotonic()
    while len(children) > 8 or (children and _ == int(sys.argv[2]) - 1):
        for child in list(children):
            gone, status = os.waitpid(child, os.WNOHANG)
            if gone:
                assert os.waitstatus_to_exitcode(status) == 0, status
                del children[child]
            elif time.monotonic() - children[child] > 60:
                sys.exit(f"child {child} hangs")
        time.sleep(0.002)
done = True
"""


def owner(array: np.ndarray) -> Any:
    """The object that owns the memory of an array."""
    while isinstance(array, np.ndarray) and array.base is not None:
        array = array.base
    return array


def test_no_logits_belong_to_onnx_runtime(bundle):
    """ONNX Runtime frees its arrays under a lock that another thread may have held at a fork."""
    loaded = Answerer.load(bundle, device="cpu", threads=2)
    windows = loaded.read("Who keeps the lamp?", LONG, Options()).windows
    runs = [loaded.model.run(windows), loaded.model.run_batch(windows), loaded.model.start(windows).result()]
    graph = GraphModel(open_bundle(bundle).read("model.onnx")).run(pad_batch(windows, 0))
    arrays = [array for run in runs for pair in run for array in pair] + list(graph.values())
    assert len(arrays) == 6 * len(windows) + 2
    assert all(isinstance(owner(array), np.ndarray) for array in arrays)


@pytest.mark.parametrize("children", [30, pytest.param(300, marks=pytest.mark.slow)])
def test_no_child_hangs_that_was_forked_in_the_middle_of_runs(children, bundle, tmp_path):
    run_script(tmp_path, FORKS, bundle, children, seconds=300)

"""Shared by all tests: no network, and a tiny question-answering model that is trained once, whatever the number of workers."""

from __future__ import annotations

import contextlib
import fcntl
import gc
import json
import os
import pickle
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pytest

Made = TypeVar("Made")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # threads only make tiny models wait

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN and threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGINT, signal.default_int_handler)  # otherwise children ignore Ctrl-C, as after nohup

NAMES = ("Ada", "Bela", "Cora", "Dora", "Elin", "Fay", "Gail", "Hilde", "Ines", "Judith", "Kaya", "Lena")
THINGS = ("lamp", "boat", "ladder", "kettle", "piano", "bell", "rope", "clock")


def triplets(count: int = 96) -> list[dict[str, object]]:
    """Rows that a tiny model can learn: who keeps which thing; each row its own passage."""
    rows: list[dict[str, object]] = []
    for i in range(count):
        thing, other = THINGS[i % 8], THINGS[(i * 3 + 1) % 8 if (i * 3 + 1) % 8 != i % 8 else (i + 1) % 8]
        name, wrong = NAMES[i % 12], NAMES[(i + 5) % 12]
        context = f"{name} keeps the {thing} in room {i}. {wrong} keeps the {other} outside."
        context += " The hall is quiet." * (i % 3)
        rows.append({"context": context, "question": f"Who keeps the {thing}?", "answer": name})
    return rows


def unanswerable(count: int = 96) -> list[dict[str, object]]:
    """The triplets; every third asks for a thing that its context does not mention, and a few are annotated wrongly."""
    rows = triplets(count)
    for i, row in enumerate(rows):
        if i % 3 == 2:
            absent = next(thing for thing in THINGS[i % 5 :] if thing not in str(row["context"]))
            row |= {"question": f"Who keeps the {absent}?", "answer": None, "is_impossible": True}
        elif i % 6 == 1:  # so that no model can be sure
            row["answer"] = NAMES[(i + 5) % 12]
    return rows


def write_jsonl(path: Path, rows: list[dict[str, object]]) -> Path:
    """Writes rows as JSONL and returns the path."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def make_tiny_checkpoint(folder: Path) -> Path:
    """A BERT of two layers with random weights and a WordPiece tokenizer trained on the triplets."""
    import torch
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import BertConfig, BertForQuestionAnswering, PreTrainedTokenizerFast

    from tests.tokenizers_for_tests import set_wordpiece

    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    texts = [str(row[key]) for row in triplets() for key in ("context", "question")]
    set_wordpiece(tokenizer, texts, 300, specials, "[UNK]")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    torch.manual_seed(5)
    config = BertConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=96,
        max_position_embeddings=160,
    )
    BertForQuestionAnswering(config).save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_max_length=160,
    ).save_pretrained(folder)
    return folder


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Places unit tests where workers 2 and 3 begin, so that they need not wait for the first to make the fixtures."""
    unit = [item for item in items if "unit" in item.path.parts]
    others = [item for item in items if "unit" not in item.path.parts]
    third = len(items) // 3
    items[:] = [*others[:third], *unit, *others[third:]]


def pytest_collection_finish() -> None:
    """Freezes imported objects: training and export collect garbage often, and going through them takes 0.3 s each time."""
    gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def later_imports_frozen() -> None:
    """Freezes also what the modules before have imported."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def same_threads() -> Iterator[None]:
    """Restores PyTorch's thread count, which ``bench`` changes: with another number, results round differently."""
    yield
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that all workers of pytest-xdist share."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session", autouse=True)
def cache(shared_folder: Path) -> Iterator[Path]:
    """A separate cache for the tests, so that they neither read nor change the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QADEPLOY_CACHE", str(shared_folder / "cache"))
        yield shared_folder / "cache"


Once = Callable[[str, Callable[[Path], Made]], Made]


@pytest.fixture(scope="session")
def once(shared_folder: Path) -> Once[Any]:
    """Calls ``build`` once for all workers, in a folder with this name; its result must be picklable.

    The other workers wait and use the same folder, so tests must not change it.
    """

    def get(name: str, build: Callable[[Path], Made]) -> Made:
        folder, returned = shared_folder / name, shared_folder / f"{name}.pickle"
        with (shared_folder / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not returned.exists():
                shutil.rmtree(folder, ignore_errors=True)  # left by a worker that failed
                folder.mkdir()
                value = pickle.dumps(build(folder))
                returned.write_bytes(value)
        made: Made = pickle.loads(returned.read_bytes())
        return made

    return get


@pytest.fixture(scope="session")
def brief() -> Iterator[None]:
    """Exports measure speeds with few questions, because a tiny model's speed means nothing."""
    from qadeploy.export import reference
    from qadeploy.export.quantize import search

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "_SECONDS", 1.0)
        patch.setattr(reference, "_TIMED_QUESTIONS", 4)
        patch.setattr(search, "_TIMED", 4)
        yield


@pytest.fixture(scope="session")
def tiny_checkpoint(once: Once[Path]) -> Path:
    """A question-answering checkpoint with random weights."""
    return once("tiny", lambda folder: make_tiny_checkpoint(folder / "checkpoint"))


@dataclass(frozen=True)
class Tiny:
    """A tiny model's data, run and bundles. All files are in ``root``; tests must not change them."""

    root: Path
    data: Path
    run: Path
    metrics: dict[str, Any]
    said: list[str]

    def bundle(self, kind: str = "") -> Path:
        """The bundle of a kind: plain fp32, "fused" or "int8" (these two exist after ``tiny_export``)."""
        return self.root / "bundles" / (f"keepers-{kind}" if kind else "keepers")


@pytest.fixture(scope="session")
def tiny(once: Once[Tiny], tiny_checkpoint: Path, brief: None) -> Tiny:
    """A finished run, trained once through the real ``train``."""

    def build(root: Path) -> Tiny:
        from qadeploy.training.train import train

        data = write_jsonl(root / "keepers.jsonl", triplets())
        said: list[str] = []
        result = train(tiny_options(data, tiny_checkpoint, root / "runs" / "keepers"), said.append, progress=False)
        return Tiny(root, data, result.folder, result.metrics, said)

    return once("keepers", build)


def tiny_options(data: Path, base: Path, out: Path, **changes: Any) -> Any:
    """Options under which the tiny model learns its task in seconds."""
    from qadeploy.training.options import TrainOptions

    options: dict[str, Any] = {
        "data": str(data),
        "base": str(base),
        "out": str(out),
        "dev_fraction": 0.2,
        "epochs": 3,
        "learning_rate": 3e-3,
        "batch_size": 8,
        "precision": "fp32",
        "negatives": 0,
        "crops": 0,
    }
    return TrainOptions(**{**options, **changes})


def tiny_arguments(data: Path, base: Path, out: Path, *more: str) -> list[str]:
    """``qadeploy train`` on the command line, with the options of ``tiny_options``, but two epochs."""
    return [
        *("train", "--data", str(data), "--base", str(base), "--out", str(out)),
        *("--epochs", "2", "--batch-size", "8", "--learning-rate", "0.003", "--precision", "fp32"),
        *("--dev-fraction", "0.2", "--negatives", "0", "--crops", "0", "--no-progress", *more),
    ]


@dataclass(frozen=True)
class Folded:
    """A run with folds on data of which a third has no answer. Tests must not change it."""

    data: Path
    run: Path
    output: dict[str, Any]
    remarks: str


@dataclass(frozen=True)
class Said:
    """What a command wrote."""

    stdout: str
    stderr: str


def command(*arguments: object) -> Said:
    """Runs a command that must succeed."""
    from tests.cli_for_tests import well

    result = well(*arguments)
    return Said(result.stdout, result.stderr)


@pytest.fixture(scope="session")
def folded(once: Once[Folded], tiny_checkpoint: Path, brief: None) -> Folded:
    """``qadeploy train --folds 3`` on 72 questions, 24 of them without an answer."""

    def build(root: Path) -> Folded:
        data = write_jsonl(root / "some.jsonl", unanswerable(72))
        out = root / "runs" / "some"
        said = command(*tiny_arguments(data, tiny_checkpoint, out, "--folds", "3", "--json"))
        return Folded(data, out, json.loads(said.stdout), said.stderr)

    return once("folds", build)


@pytest.fixture(scope="session")
def tiny_export(once: Once[Said], tiny: Tiny) -> Said:
    """The output of ``qadeploy export --quantize`` for the tiny run; its bundles are under ``root``."""

    def build(_: Path) -> Said:
        shutil.rmtree(tiny.root / "bundles", ignore_errors=True)
        with contextlib.chdir(tiny.root):
            return command("export", tiny.run, "--quantize", "--json")

    return once("export", build)


@pytest.fixture(scope="session")
def bundle(tiny: Tiny, tiny_export: Said) -> Path:
    """The tiny fp32 bundle."""
    return tiny.bundle()


@pytest.fixture(scope="module")
def answerer(request: pytest.FixtureRequest, bundle: Path) -> Any:
    """An answerer of the tiny bundle for a module, on one thread or on as many as its ``THREADS`` says."""
    from qadeploy import Answerer

    return Answerer.load(bundle, device="cpu", threads=getattr(request.module, "THREADS", 1))


@pytest.fixture(scope="module")
def server(answerer: Any) -> Iterator[Any]:
    """A server of that answerer in this process."""
    from tests.servers_for_tests import serving

    with serving(answerer) as local:
        yield local


@pytest.fixture(scope="session")
def plain_int8(once: Once[Path], tiny: Tiny) -> Path:
    """The tiny model in plain int8, ``keepers-int8``; the recipe that ``tiny_export`` chooses depends on the machine."""

    def build(root: Path) -> Path:
        recipe = ("--quantize", "--recipe", "int8", "--max-f1-drop", 100)
        command("export", tiny.run, "--no-optimize", *recipe, "--out", root / "keepers")
        return root / "keepers-int8"

    return once("plain", build)


@pytest.fixture(scope="module")
def reference(tiny: Tiny) -> Any:
    """The tiny run, judged on few questions to be quick."""
    from qadeploy.export.reference import make_reference
    from qadeploy.training.runs import HeldOut, dev_set, find_run

    run = find_run(tiny.run)
    return make_reference(run, HeldOut("keepers", dev_set(run)[:6]))


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """The Chromium of this machine, driven by playwright."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs the test in an empty working directory."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")


@pytest.fixture
def sessions(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The ONNX Runtime sessions that a test creates."""
    from tests.sessions_for_tests import Sessions

    watched = Sessions(monkeypatch)
    yield watched
    watched.release()


def sealed_copy(bundle: Path, folder: Path, model: bytes | None = None, **manifest: Any) -> Path:
    """A copy of a bundle with another model or other values in its manifest, sealed like a real one."""
    from qadeploy.inference.bundle import MANIFEST, MODEL, open_bundle, seal

    values = {k: v for k, v in open_bundle(bundle).manifest.items() if k not in {"schema", "files"}}
    shutil.copytree(bundle, folder)
    (folder / MANIFEST).unlink()
    if model is not None:
        (folder / MODEL).write_bytes(model)
        values.pop("probe", None)  # another model has other logits
    seal(folder, {**values, **manifest})
    return folder

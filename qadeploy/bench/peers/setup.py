"""The input of every peer: the checkpoint, the bundle that it is compared with, and a folder to write to."""

from __future__ import annotations

import logging
import math
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qadeploy.errors import FailureError
from qadeploy.extras import import_extra
from qadeploy.inference.bundle import Bundle
from qadeploy.records import Example


@dataclass(frozen=True, slots=True)
class Setup:
    """The input from which a peer is prepared.

    ``checkpoint`` is the PyTorch checkpoint folder; ``bundle`` provides its settings and, to peers that are only a
    runtime, its tokenizer; ``calibration`` are examples that are not in the workload; ``folder`` is for temporary
    files; ``trust_remote_code`` allows the checkpoint's own code.
    """

    checkpoint: Path
    bundle: Bundle
    device: str
    threads: int
    allow_no_answer: bool
    calibration: Sequence[Example]
    folder: Path
    trust_remote_code: bool = False

    def found_checkpoint(self) -> str:
        """The checkpoint folder's path. Raises FailureError if it does not exist."""
        if not (self.checkpoint / "config.json").is_file():
            raise FailureError(f"{self.checkpoint}: the bundle's source checkpoint no longer exists")
        return str(self.checkpoint)

    def given(self, *names: str) -> dict[str, Any]:
        """Some fields by name, as arguments of a loader."""
        return {name: getattr(self, name) for name in names}


@contextmanager
def quiet() -> Iterator[None]:
    """Silences deprecation and tracer warnings of the libraries, and keeps their output off stdout."""
    for name in ("transformers", "optimum", "onnxruntime", "nncf"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with warnings.catch_warnings(), redirect_stdout(sys.stderr):
        warnings.simplefilter("ignore")
        yield


def exported(setup: Setup) -> Path:
    """A folder with the checkpoint as fp32 ``model.onnx``, exported by optimum once for all peers of a bench.

    Raises FailureError (no checkpoint), MissingExtraError, and what optimum raises.
    """
    checkpoint, folder = setup.found_checkpoint(), setup.folder / "fp32"
    if (folder / "model.onnx").is_file():
        return folder
    optimum = import_extra("optimum.exporters.onnx", "a peer that runs ONNX", "optimum", "optimum-onnx")
    from qadeploy.training.checkpoint import refuse_pickle

    refuse_pickle(checkpoint)
    work = setup.folder / "fp32.tmp"
    with quiet():
        optimum.main_export(
            checkpoint, work, task="question-answering", do_validation=False, trust_remote_code=setup.trust_remote_code
        )
    os.replace(work, folder)
    return folder


def weights_bytes(checkpoint: str, itemsize: int) -> int:
    """The bytes of a checkpoint's weights at ``itemsize`` bytes each, read from the headers of its safetensors files.

    Raises MissingExtraError, and FailureError if the checkpoint has no such files.
    """
    library = import_extra("safetensors", "a PyTorch peer", "train", "transformers")
    from qadeploy.training.checkpoint import weight_files

    files = weight_files(Path(checkpoint))
    if not files or any(file.suffix != ".safetensors" for file in files):
        raise FailureError(f"{checkpoint}: has no weights as safetensors: save the checkpoint with them")
    shapes = []
    for file in files:
        with library.safe_open(file, "np") as weights:
            shapes += [weights.get_slice(name).get_shape() for name in weights.keys()]  # noqa: SIM118 - no mapping
    return itemsize * sum(map(math.prod, shapes))


def torch_with(threads: int) -> Any:
    """PyTorch, using ``threads`` threads. Raises MissingExtraError."""
    torch = import_extra("torch", "a PyTorch peer", "train")
    torch.set_num_threads(threads)
    return torch

"""ONNX Runtime sessions: providers, threads, and running windows.

On a CPU each window runs alone and unpadded. One window uses a session with all threads; many
windows run in parallel on a session with one thread a run, which measures faster than one wide run.
On CUDA windows of like length run in padded batches.
"""

from __future__ import annotations

import ctypes
import os
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from qadeploy.errors import BundleError, DeviceError, InputError, MissingExtraError
from qadeploy.qa.windows import pad_batch
from qadeploy.records import FloatArray, Window

Logits = tuple[FloatArray, FloatArray]
CUDA_BATCH_TOKENS = 16_384
_INPUTS = frozenset({"input_ids", "attention_mask", "token_type_ids"})
_OUTPUTS = ("start_logits", "end_logits")
_creating = threading.Lock()  # concurrent session creation has been reported racy
_live: weakref.WeakSet[Any] = weakref.WeakSet()  # the sessions of this process


def _abandon_sessions() -> None:
    """In a forked child: keeps the parent's sessions for ever, by a reference that nobody gives back.

    Their threads do not exist here, so destroying one hangs or crashes, at the child's exit at the latest.
    """
    global _creating
    _creating = threading.Lock()  # a thread of the parent may have held the old one
    for session in list(_live):
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(session))
    _live.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_abandon_sessions)


def onnxruntime() -> Any:
    """The onnxruntime module. Raises MissingExtraError where no build of it is installed.

    Its telemetry, on by default since 1.29, sends events to Microsoft from a thread of its own, which
    also makes every forked child hang at exit; it stays off unless ORT_DISABLE_TELEMETRY says otherwise.
    """
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # read once, while the module is imported
    try:
        import onnxruntime as ort
    except ImportError as error:
        raise MissingExtraError("answering", "onnxruntime", "cpu") from error
    return ort


def usable_cpus() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass
class _Sessions:
    """The sessions of one process, made when first needed."""

    pid: int = field(default_factory=os.getpid)
    wide: Any = None
    narrow: Any = None
    pool: ThreadPoolExecutor | None = None


class OnnxModel:
    """A model file as a function from windows to logits. Safe under threads, and after a fork.

    ``read`` gives the model's bytes; it is called once a session. Raises InputError on an unknown
    device or thread count, DeviceError, BundleError on a graph that is no question-answering model.
    """

    def __init__(
        self,
        read: Callable[[], bytes],
        *,
        device: str = "auto",
        threads: int | None = None,
        pad_token_id: int = 0,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        if threads is not None and threads < 1:
            raise InputError(f"threads {threads} is below 1")
        self._read = read
        self._pad_token_id = pad_token_id
        self._options = dict(options or {})
        self.threads = threads or usable_cpus()
        self._lock = threading.Lock()
        self._sessions = _Sessions()
        self._providers = _providers(device)
        wide = self._session(self.threads)
        self.device = "cuda" if wide.get_providers()[0] == "CUDAExecutionProvider" else "cpu"
        if device.startswith("cuda") and self.device != "cuda":
            raise DeviceError(
                "CUDA was asked for, but ONNX Runtime could not start it and fell back to the CPU: the driver or the "
                "CUDA and cuDNN libraries are missing. Run qadeploy doctor, or pip install 'qadeploy[gpu]'"
            )
        self.inputs = tuple(i.name for i in wide.get_inputs())
        outputs = tuple(o.name for o in wide.get_outputs())
        if not set(self.inputs) <= _INPUTS or "input_ids" not in self.inputs or outputs[:2] != _OUTPUTS:
            raise BundleError(
                f"model.onnx: inputs {', '.join(self.inputs)} and outputs {', '.join(outputs)} are not those of a "
                "question-answering model: export it with qadeploy export"
            )
        self._sessions.wide = wide

    def run(self, windows: Sequence[Window]) -> list[Logits]:
        """Start and end logits of each window, float32 ``[tokens]`` each, in order."""
        if not windows:
            return []
        if self.device == "cuda":
            return self._run_batches(windows)
        if len(windows) == 1 or self.threads == 1:
            session = self._get("wide")
            return [self._run_one(session, window) for window in windows]
        session, pool = self._get("narrow"), self._pool()
        order = sorted(range(len(windows)), key=lambda i: -len(windows[i]))
        futures = {i: pool.submit(self._run_one, session, windows[i]) for i in order}
        return [futures[i].result() for i in range(len(windows))]

    def run_batch(self, windows: Sequence[Window]) -> list[Logits]:
        """Like ``run``, as one padded batch; the padding's logits are cut off."""
        starts, ends = self._call(self._get("wide"), pad_batch(windows, self._pad_token_id))
        return [(starts[i, : len(w)], ends[i, : len(w)]) for i, w in enumerate(windows)]

    def _run_batches(self, windows: Sequence[Window]) -> list[Logits]:
        order = sorted(range(len(windows)), key=lambda i: -len(windows[i]))
        logits: dict[int, Logits] = {}
        while order:
            size = max(1, CUDA_BATCH_TOKENS // len(windows[order[0]]))
            batch, order = order[:size], order[size:]
            logits.update(zip(batch, self.run_batch([windows[i] for i in batch]), strict=True))
        return [logits[i] for i in range(len(windows))]

    def _run_one(self, session: Any, window: Window) -> Logits:
        batch = {"input_ids": window.input_ids[None], "attention_mask": np.ones((1, len(window)), dtype=np.int64)}
        if window.token_type_ids is not None:
            batch["token_type_ids"] = window.token_type_ids[None]
        starts, ends = self._call(session, batch)
        return starts[0], ends[0]

    def _call(self, session: Any, batch: Mapping[str, Any]) -> Logits:
        starts, ends = session.run(list(_OUTPUTS), {name: batch[name] for name in self.inputs})
        return starts.astype(np.float32, copy=False), ends.astype(np.float32, copy=False)

    def _mine(self) -> _Sessions:
        if self._sessions.pid != os.getpid():
            self._lock = threading.Lock()
            self._sessions = _Sessions()
        return self._sessions

    def _get(self, kind: str) -> Any:
        sessions = self._mine()
        session = getattr(sessions, kind)
        if session is None:
            with self._lock:
                session = getattr(sessions, kind)
                if session is None:
                    session = self._session(self.threads if kind == "wide" else 1)
                    setattr(sessions, kind, session)
        return session

    def _pool(self) -> ThreadPoolExecutor:
        sessions = self._mine()
        with self._lock:
            if sessions.pool is None:
                sessions.pool = ThreadPoolExecutor(self.threads, thread_name_prefix="qadeploy")
            return sessions.pool

    def _session(self, threads: int) -> Any:
        ort = onnxruntime()
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        on_cpu = self._providers == ["CPUExecutionProvider"]  # the stored settings were measured on a CPU
        try:
            with _creating:
                session = ort.InferenceSession(
                    self._read(),
                    options,
                    providers=self._providers,
                    disabled_optimizers=self._options.get("disabled_optimizers") if on_cpu else None,
                )
                _live.add(session)
                return session
        except (DeviceError, BundleError):
            raise
        except Exception as error:  # the binding raises one class a status code, all of them bare
            reason = " ".join(str(error).split())[:300]
            if not on_cpu:
                raise DeviceError(f"ONNX Runtime cannot start the model on CUDA: {reason}") from error
            raise BundleError(f"model.onnx: ONNX Runtime cannot load it: {reason}") from error


def check_device(device: str) -> str:
    """``auto``, ``cpu`` or ``cuda``, the kind of a device name. Raises InputError on any other name."""
    kind, _, number = device.partition(":")
    if kind not in {"auto", "cpu", "cuda"} or (number and (kind != "cuda" or not number.isdigit())):
        raise InputError(f"device is {device!r}: choose auto, cpu, cuda or cuda:N")
    return kind


def _providers(device: str) -> list[Any]:
    """The provider list of a device name: auto, cpu, cuda or cuda:N. Raises InputError, DeviceError."""
    kind, number = check_device(device), device.partition(":")[2]
    ort = onnxruntime()
    if kind == "cpu":
        return ["CPUExecutionProvider"]
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        if kind == "auto":
            return ["CPUExecutionProvider"]
        raise DeviceError(
            f"CUDA was asked for, but the installed onnxruntime {ort.__version__} is a CPU build: "
            "pip uninstall onnxruntime onnxruntime-gpu, then pip install 'qadeploy[gpu]'"
        )
    if hasattr(ort, "preload_dlls"):
        ort.preload_dlls()
    return [("CUDAExecutionProvider", {"device_id": int(number or 0)}), "CPUExecutionProvider"]

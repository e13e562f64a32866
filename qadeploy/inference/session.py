"""ONNX Runtime sessions: providers, threads, and running windows.

On a CPU each window runs alone and unpadded, on one of two sessions: the wide one gives a run all threads,
the narrow one gives it one thread and runs as many windows side by side. Many questions run narrow, which has
no idle threads; one question is awaited, and ``layout`` says how its windows run soonest. On CUDA windows run in
batches, as ``cuda`` says.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from copy import copy
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from qadeploy.core.windows import pad_batch
from qadeploy.errors import BundleError, DeviceError, InputError, MissingExtraError
from qadeploy.inference.cuda import DeviceRunner, Place, batches
from qadeploy.inference.devices import CPU, CUDA, Device, parse_device, providers, refuse
from qadeploy.inference.layout import SessionSettings
from qadeploy.records import FloatArray, IntArray, Window

Logits = tuple[FloatArray, FloatArray]
# A call is large if the squares of its windows' tokens add up to this: one of 1,024 tokens, eight of 384. After
# large calls idle sessions give their arenas' memory back, which costs milliseconds; what smaller ones
# leave is small, and asked for again at once.
LARGE = 2**20
_SHRINK_BY = 8  # tokens of the run that does it
_INPUTS = frozenset({"input_ids", "attention_mask", "token_type_ids"})
_OUTPUTS = ("start_logits", "end_logits")
_TYPES = {"tensor(int64)": np.dtype(np.int64), "tensor(int32)": np.dtype(np.int32)}
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
    ort.set_default_logger_severity(
        4
    )  # what goes wrong is raised too; on CUDA every session brought a remark on stderr
    return ort


def usable_cpus() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass
class _Sessions:
    """The sessions of one process, made when first needed, the calls under way, and whether any was large."""

    pid: int = field(default_factory=os.getpid)
    wide: Any = None
    narrow: Any = None
    runner: DeviceRunner | None = None  # of CUDA
    pool: ThreadPoolExecutor | None = None
    calls: int = 0
    large: bool = False


class Pending:
    """Windows on their way through a model: ``result`` waits for their logits, ``cancel`` drops what has not begun.

    Without ``futures``, and in a child forked meanwhile, which has not the parent's threads, ``run`` is
    called when the result is asked for.
    """

    def __init__(
        self,
        run: Callable[[], list[Logits]],
        futures: Sequence[Future[list[Logits]]] = (),
        settle: Callable[[], object] = lambda: None,
    ) -> None:
        self._run = run
        self._futures = futures
        self._settle = settle
        self._pid = os.getpid()

    def result(self) -> list[Logits]:
        """Start and end logits of each window, in order. Raises what the run raised. To be called once."""
        if not self._futures or self._pid != os.getpid():
            return self._run()
        try:
            return [logits for future in self._futures for logits in future.result()]
        finally:
            self.cancel()  # the rest, where one failed

    def cancel(self) -> None:
        """Drops the windows that no thread has begun. Does nothing the second time."""
        if self._futures and self._pid == os.getpid():
            for future in self._futures:
                future.cancel()
            self._settle()
        self._futures = ()


class OnnxModel:
    """A model file as a function from windows to logits. Safe under threads, and after a fork.

    ``read`` gives the model's bytes; it is called once a session. ``options`` are the ``SessionSettings`` as a
    manifest holds them, ``longest`` is the model's longest input in tokens. Raises InputError on an unknown device or thread count, DeviceError, BundleError
    on a graph that is no question-answering model and on wrong settings.
    """

    def __init__(
        self,
        read: Callable[[], bytes],
        *,
        device: str = "auto",
        threads: int | None = None,
        pad_token_id: int = 0,
        options: Mapping[str, Any] | None = None,
        longest: int | None = None,
    ) -> None:
        if threads is not None and threads < 1:
            raise InputError(f"threads {threads} is below 1")
        self._read = read
        self._pad_token_id = pad_token_id
        self._longest = longest
        self._settings = SessionSettings.from_manifest(options)
        self.threads = threads or usable_cpus()
        self._lock = threading.Lock()
        self._sessions = _Sessions()
        asked = parse_device(device)
        self._providers = providers(onnxruntime(), asked)
        wide = self._first_session(asked)
        self.device = "cuda" if wide.get_providers()[0] == CUDA else "cpu"
        self._kinds = {i.name: _TYPES.get(i.type) for i in wide.get_inputs()}
        self.inputs = tuple(self._kinds)
        outputs = tuple(o.name for o in wide.get_outputs())
        known = set(self.inputs) <= _INPUTS and "input_ids" in self.inputs and None not in self._kinds.values()
        if not known or outputs[:2] != _OUTPUTS:
            raise BundleError(
                f"model.onnx: inputs {', '.join(self.inputs)} and outputs {', '.join(outputs)} are not those of a "
                "question-answering model: export it with qadeploy export"
            )
        self._ones = np.ones((1, 512), dtype=np.int64)
        self._sample: Window | None = None

    def with_layout(self, one: str | None) -> OnnxModel:
        """The same sessions with another layout of one question's windows."""
        model = copy(self)
        model._settings = replace(self._settings, one=one, threads=None)
        return model

    def run(self, windows: Sequence[Window]) -> list[Logits]:
        """Start and end logits of each window, float32 ``[tokens]`` each, in order, as soon as can be.

        On a CPU windows run alone, side by side or wide as the layout says.
        """
        if not windows:
            return []
        self._count(windows)
        try:
            if self.device == "cuda":
                return self._on_device().run(windows)
            threads = self.threads
            narrow = self._settings.narrow_windows(len(windows), threads) if threads > 1 else 0
            order = _longest_first(windows)  # the shortest run wide: they gain least from a thread of their own
            futures = self._submit([windows[i] for i in order[:narrow]])
            logits = dict(zip(order, [f.result()[0] for f in futures], strict=False))
            session = self._get("wide") if narrow < len(windows) else None
            logits.update({i: self._run_one(session, windows[i]) for i in order[narrow:]})
            return [logits[i] for i in range(len(windows))]
        finally:
            self._settle()

    def start(self, windows: Sequence[Window]) -> Pending:
        """Begins to run many windows and returns at once, so that the caller can prepare the next ones meanwhile.

        On a CPU each runs on one thread, behind those started before; ``threads=1`` runs them when the result
        is asked for. CUDA works on its batches in the background, the next ones padded meanwhile.
        """
        if not windows or (self.device != "cuda" and self.threads == 1):
            return Pending(partial(self.run, windows))
        self._count(windows)
        on_cuda = self.device == "cuda"
        futures = [self._pool().submit(self._on_device().run, windows)] if on_cuda else self._submit(windows)
        return Pending(partial(self.run, windows), futures, self._settle)

    def run_batch(self, windows: Sequence[Window]) -> list[Logits]:
        """Like ``run``, as one padded batch; the padding's logits are cut off.

        A model without ``attention_mask`` cannot tell padding from text: its windows run in one batch a length.
        """
        if self.device == "cuda":
            return self._on_device().run_many(windows)
        if "attention_mask" in self.inputs:
            return self._run_padded(windows)
        logits: dict[int, Logits] = {}
        for rows in batches([len(w) for w in windows], tokens=sys.maxsize, masked=False):
            logits.update(zip(rows, self._run_padded([windows[i] for i in rows]), strict=True))
        return [logits[i] for i in range(len(windows))]

    def warm_up(self, window: Window) -> None:
        """On CUDA captures the graphs of one window's run, of every length; it is about a second's work. Else nothing."""
        if self.device == "cuda":
            self._on_device().warm_up(window)

    def notes(self) -> list[str]:
        """On CUDA which paths windows take, and why not the faster ones; nothing on a CPU."""
        return self._on_device().notes() if self.device == "cuda" else []

    def _run_padded(self, windows: Sequence[Window]) -> list[Logits]:
        starts, ends = self._call(self._get("wide"), pad_batch(windows, self._pad_token_id))
        return [(starts[i, : len(w)], ends[i, : len(w)]) for i, w in enumerate(windows)]

    def _on_device(self) -> DeviceRunner:
        sessions = self._mine()
        with self._lock:
            if sessions.runner is None:  # in a forked child
                sessions.runner = self._runner()
            return sessions.runner

    def _runner(self) -> DeviceRunner:
        """The runner of the CUDA device. Raises DeviceError where CUDA does not start."""
        number = self._providers[0][1]["device_id"]
        return DeviceRunner(
            onnxruntime(),
            partial(self._session, self.threads),
            place=Place("cuda", int(number)),
            pad_token_id=self._pad_token_id,
            longest=self._longest,
        )

    def _submit(self, windows: Sequence[Window]) -> list[Future[list[Logits]]]:
        if not windows:
            return []
        session, pool = self._get("narrow"), self._pool()
        futures = {i: pool.submit(self._run_alone, session, windows[i]) for i in _longest_first(windows)}
        return [futures[i] for i in range(len(windows))]

    def _run_alone(self, session: Any, window: Window) -> list[Logits]:
        return [self._run_one(session, window)]

    def _run_one(self, session: Any, window: Window) -> Logits:
        starts, ends = self._call(session, self._single(window.input_ids, window.token_type_ids))
        return starts[0], ends[0]

    def _single(self, ids: IntArray, types: IntArray | None) -> dict[str, IntArray]:
        ones = self._ones  # shared: a window that runs alone has no padding, whatever its length
        if len(ids) > ones.shape[1]:
            ones = self._ones = np.ones((1, len(ids)), dtype=np.int64)
        batch = {"input_ids": ids[None], "attention_mask": ones[:, : len(ids)]}
        if types is not None:
            batch["token_type_ids"] = types[None]
        return batch

    def _call(self, session: Any, batch: Mapping[str, Any], options: Any = None) -> Logits:
        feeds = {name: batch[name].astype(kind, copy=False) for name, kind in self._kinds.items()}
        starts, ends = session.run(_OUTPUTS, feeds, options)
        return starts.astype(np.float32, copy=False), ends.astype(np.float32, copy=False)

    def _count(self, windows: Sequence[Window]) -> None:
        sessions = self._mine()
        with self._lock:
            sessions.calls += 1
            sessions.large |= sum(len(w) ** 2 for w in windows) >= LARGE
            self._sample = windows[0]  # any will do

    def _settle(self) -> None:
        """Ends a call. The last one of several gives back the memory that large inputs made the arenas take."""
        sessions = self._mine()
        with self._lock:
            sessions.calls = max(sessions.calls - 1, 0)
            if sessions.calls or not sessions.large or self.device == "cuda" or self._sample is None:
                return
            sessions.large = False
        options = onnxruntime().RunOptions()
        options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
        ids, types = self._sample.input_ids[:_SHRINK_BY], self._sample.token_type_ids
        for session in (sessions.wide, sessions.narrow):
            if session is not None:  # the arena shrinks when a run ends, so this takes a run: a short one
                self._call(session, self._single(ids, None if types is None else types[:_SHRINK_BY]), options)

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
                workers = 2 if self.device == "cuda" else self.threads  # one pads its batch while the other's runs
                sessions.pool = ThreadPoolExecutor(workers, thread_name_prefix="qadeploy")
            return sessions.pool

    @property
    def _on_cpu(self) -> bool:
        return bool(self._providers == [CPU])

    def _first_session(self, asked: Device) -> Any:
        """The wide session: on CUDA, its runner's, where that is its first provider, else for ``auto`` on the CPU."""
        reason = ""
        if not self._on_cpu:
            try:
                runner = self._runner()
                if runner.session.get_providers()[0] == CUDA:
                    self._sessions.runner = runner
                    return runner.session
            except DeviceError as error:
                reason = str(error)
            refuse(onnxruntime(), asked, reason)
            self._providers = [CPU]  # anew, with the settings for a CPU
        self._sessions.wide = self._session(self.threads)
        return self._sessions.wide

    def _session(self, threads: int, graphs: bool = False) -> Any:
        """A session; with ``graphs``, one that can capture CUDA graphs."""
        ort = onnxruntime()
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 4
        on_cpu = self._on_cpu
        settings = self._settings if on_cpu else SessionSettings()
        chosen = self._providers
        if graphs and not on_cpu:
            (name, values), *rest = chosen
            chosen = [(name, {**values, "enable_cuda_graph": "1"}), *rest]
            options.enable_mem_pattern = False  # it would allocate while a graph is captured
        try:
            for name, value in settings.config.items():
                options.add_session_config_entry(name, value)
            with _creating:
                session = ort.InferenceSession(
                    self._read(),
                    options,
                    providers=chosen,
                    disabled_optimizers=list(settings.disabled_optimizers) or None,
                    enable_fallback=0,  # which prints on stdout, and hides what went wrong
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


def _longest_first(windows: Sequence[Window]) -> list[int]:
    """Indices by length: so that what ends last is short, and neighbours are of like length."""
    return sorted(range(len(windows)), key=lambda i: -len(windows[i]))

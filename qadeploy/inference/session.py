"""ONNX Runtime sessions: providers, threads, and running windows.

On a CPU each window runs alone and unpadded, in one of two sessions: the wide session uses all threads for one window,
the narrow session uses one thread per window and runs windows side by side. Many questions run narrow, which leaves
no thread idle; for a single question, ``narrow_windows`` decides what is fastest. On CUDA windows run in batches: see ``cuda``.
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
from qadeploy.errors import BundleError, DeviceError, InputError, one_line
from qadeploy.extras import import_extra
from qadeploy.inference.cuda import DeviceRunner, batches, in_batches, unpadded
from qadeploy.inference.devices import CPU, CUDA, Device, parse_device, providers, refuse
from qadeploy.inference.manifest import SessionSettings
from qadeploy.machine import usable_cpus
from qadeploy.records import LOGIT_NAMES, FloatArray, IntArray, Logits, Window

# A call is large if the squared lengths of its windows add up to this: one window of 1,024 tokens, or eight of 384. After
# large calls, idle sessions free the memory of their arenas, which takes milliseconds. Smaller calls leave little memory
# behind, and the next call needs it again.
LARGE = 2**20
_SHRINK_TOKENS = 8  # length of the run that shrinks an arena
_INPUTS = frozenset({"input_ids", "attention_mask", "token_type_ids"})
_TYPES: dict[str, np.dtype[Any]] = {"tensor(int64)": np.dtype(np.int64), "tensor(int32)": np.dtype(np.int32)}
# An estimate of the share of a run that a wide session does in parallel (Amdahl 1967). With two threads, any share leads to
# the same choice.
PARALLEL_SHARE = 0.8
_creating = threading.Lock()  # creating sessions concurrently was reported to race
_live: weakref.WeakSet[Any] = weakref.WeakSet()  # the objects that hold sessions in this process


def _abandon_sessions() -> None:
    """In a forked child: leaks a reference to each object that holds the parent's sessions, so that these are never freed.

    The threads of a session do not exist here, so destroying one would hang or crash, at exit at the latest; and a thread of
    the parent may have held the lock of its memory. For the same reason, logits are copied out of that memory after each run.
    """
    global _creating
    _creating = threading.Lock()  # a thread of the parent may have held the old one
    for holder in list(_live):
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(holder))
    _live.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_abandon_sessions)


def onnxruntime() -> Any:
    """The onnxruntime module. Raises MissingExtraError if no build of it is installed.

    Its telemetry, on by default since 1.29, sends events to Microsoft from a thread of its own, which
    makes every forked child hang at exit. It is turned off unless ORT_DISABLE_TELEMETRY is already set.
    """
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # read once, during the import
    ort = import_extra("onnxruntime", "answering", "cpu")
    ort.set_default_logger_severity(4)  # errors are raised as well
    return ort


def session_options(threads: int = 0, config: Mapping[str, str] | None = None) -> Any:
    """``SessionOptions`` for ``threads`` threads per run (0: ``usable_cpus``), with ``config`` entries, without warnings."""
    options = onnxruntime().SessionOptions()
    options.intra_op_num_threads = threads or usable_cpus()
    options.inter_op_num_threads = 1
    options.log_severity_level = 4
    for name, value in (config or {}).items():
        options.add_session_config_entry(name, value)
    return options


def outlives_forks(holder: Any) -> None:
    """Keeps ``holder``, and with it the sessions and buffers that it refers to, from being freed in a forked child."""
    _live.add(holder)


def runtime_error(what: str, error: Exception) -> BundleError:
    """Converts an error that ONNX Runtime raised when it had to ``what`` (load or run) a model: one bare class per status code."""
    return BundleError(f"model.onnx: ONNX Runtime cannot {what} it: {one_line(error, 300)}")


def cpu_session(model: bytes, settings: SessionSettings | None = None, *, optimize: bool = True) -> Any:
    """A session on one CPU thread. Raises BundleError if ONNX Runtime cannot load the model."""
    settings = settings or SessionSettings()
    options = session_options(1, settings.config)
    if not optimize:
        options.graph_optimization_level = onnxruntime().GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        return onnxruntime().InferenceSession(
            model,
            options,
            providers=[CPU],
            disabled_optimizers=list(settings.disabled_optimizers) or None,
        )
    except Exception as error:
        raise runtime_error("load", error) from error


def differences(some: Sequence[Logits], others: Sequence[Logits]) -> FloatArray:
    """The absolute differences of all logits of the same windows, in one row."""
    pairs = zip(some, others, strict=True)
    return np.concatenate([np.abs(a - b) for one, other in pairs for a, b in zip(one, other, strict=True)])


@dataclass(eq=False)
class _Sessions:
    """The sessions of one process, created when first needed, the number of running calls, and whether any was large."""

    pid: int = field(default_factory=os.getpid)
    wide: Any = None
    narrow: Any = None
    wide_used: bool = False  # besides the checks of a model that is being loaded
    runner: DeviceRunner | None = None  # on CUDA
    pool: ThreadPoolExecutor | None = None
    calls: int = 0
    large: bool = False

    def __post_init__(self) -> None:
        outlives_forks(self)


class Pending:
    """Windows that a model runs: ``result`` waits for their logits, ``cancel`` drops those that have not started.

    Args:
        run: Runs them now; used without ``futures``, and in a forked child, where the parent's threads do not exist.
        futures: The futures of the logits.
        settle: Called once when the call has ended.
        places: The indices of the windows in the order of ``futures``; empty if that is the order of the windows.
    """

    def __init__(
        self,
        run: Callable[[], list[Logits]],
        futures: Sequence[Future[list[Logits]]] = (),
        settle: Callable[[], object] = lambda: None,
        places: Sequence[int] = (),
    ) -> None:
        self._run = run
        self._futures = futures
        self._settle = settle
        self._places = places
        self._pid = os.getpid()

    def result(self) -> list[Logits]:
        """Start and end logits of each window, in order. Raises what the run raised. Call it once."""
        if not self._futures or self._pid != os.getpid():
            return self._run()
        try:
            found = [logits for future in self._futures for logits in future.result()]
        finally:
            self.cancel()  # if one failed, drops the rest
        by_place = dict(zip(self._places or range(len(found)), found, strict=True))
        return [by_place[i] for i in range(len(found))]

    def cancel(self) -> None:
        """Drops the windows that no thread has started. A second call does nothing."""
        if self._futures and self._pid == os.getpid():
            for future in self._futures:
                future.cancel()
            self._settle()
        self._futures = ()


class OnnxModel:
    """A model file as a function from windows to logits. Safe under threads and after a fork.

    Args:
        read: Returns the bytes of the model or the path of its file; called once per session.
        device: auto, cpu, cuda or cuda:N.
        threads: CPU threads; None uses all CPUs.
        pad_token_id: The id that fills batches.
        settings: The session settings on a CPU; None means the defaults.
        longest: The longest input of the model in tokens; None for no limit.

    Raises:
        InputError: The device is unknown, or ``threads`` is below 1.
        DeviceError: CUDA was requested but is not available.
        BundleError: The graph is not a question-answering model.
    """

    def __init__(
        self,
        read: Callable[[], bytes | str],
        *,
        device: str = "auto",
        threads: int | None = None,
        pad_token_id: int = 0,
        settings: SessionSettings | None = None,
        longest: int | None = None,
    ) -> None:
        if threads is not None and threads < 1:
            raise InputError(f"threads {threads} is below 1")
        self._read = read
        self._pad_token_id = pad_token_id
        self._longest = longest
        self._settings = settings or SessionSettings()
        self.threads = threads or usable_cpus()
        self._lock = threading.Lock()
        self._sessions = _Sessions()
        requested = parse_device(device)
        self._providers = providers(onnxruntime(), requested)
        wide = self._first_session(requested)
        self.device = "cuda" if wide.get_providers()[0] == CUDA else "cpu"
        self._kinds = _input_types(wide)
        self.inputs = tuple(self._kinds)
        self._ones = np.ones((1, 512), dtype=np.int64)
        self._sample: Window | None = None

    def with_layout(self, one: str | None) -> OnnxModel:
        """A model with the same sessions and another layout for the windows of one question."""
        model = copy(self)
        model._settings = replace(self._settings, one=one, threads=None)
        return model

    def run(self, windows: Sequence[Window]) -> list[Logits]:
        """Start and end logits of each window, float32 ``[tokens]`` each, in order, with the least delay.

        On a CPU each window runs alone; the layout decides which run narrow and which wide.
        """
        if not windows:
            return []
        self._begin_call(windows)
        try:
            if self.device == "cuda":
                return self._on_device().run(windows)
            threads = self.threads
            narrow = narrow_windows(self._settings, len(windows), threads) if threads > 1 else 0
            order = _longest_first(windows)  # the shortest run wide: they gain least from running side by side
            futures = self._submit([windows[i] for i in order[:narrow]])
            logits = dict(zip(order, [f.result()[0] for f in futures], strict=False))
            if narrow < len(windows):
                self._own_sessions().wide_used = True
                session = self._session("wide")
                logits.update({i: self._run_one(session, windows[i]) for i in order[narrow:]})
            return [logits[i] for i in range(len(windows))]
        finally:
            self._end_call()

    def start(self, windows: Sequence[Window]) -> Pending:
        """Starts to run many windows and returns at once, so that the caller can prepare the next ones.

        On a CPU each window runs on one thread, after windows that were started earlier; with ``threads=1`` they run when the
        result is requested. On CUDA batches run in the background, while the next ones are padded.
        """
        if not windows or (self.device != "cuda" and self.threads == 1):
            return Pending(partial(self.run, windows))
        self._begin_call(windows)
        try:
            on_cuda = self.device == "cuda"
            futures = [self._pool().submit(self._on_device().run, windows)] if on_cuda else self._submit(windows)
        except BaseException:
            self._end_call()
            raise
        return Pending(partial(self.run, windows), futures, self._end_call)

    def run_batch(self, windows: Sequence[Window]) -> list[Logits]:
        """Like ``run``, as one padded batch or, on CUDA, in batches by length; logits of padding are removed.

        A model without ``attention_mask`` cannot tell padding from text: its windows run in one batch per length.
        """
        if self.device == "cuda":
            return self._on_device().run_many(windows)
        if "attention_mask" in self.inputs:
            return self._run_padded(windows)
        rows = batches([len(w) for w in windows], tokens=sys.maxsize, masked=False)
        return in_batches(windows, rows, self._run_padded)

    def warm_up(self, window: Window) -> None:
        """On CUDA, captures the graphs for one window of any length, in about a second. On a CPU it does nothing."""
        if self.device == "cuda":
            self._on_device().warm_up(window)

    def notes(self) -> list[str]:
        """On CUDA, how windows run and what keeps them from running faster; empty on a CPU."""
        return self._on_device().notes() if self.device == "cuda" else []

    def _run_padded(self, windows: Sequence[Window]) -> list[Logits]:
        return unpadded(self._call(self._session("wide"), pad_batch(windows, self._pad_token_id)), windows)

    def _on_device(self) -> DeviceRunner:
        sessions = self._own_sessions()
        with self._lock:
            if sessions.runner is None:  # only in a forked child
                sessions.runner = self._new_runner()
            return sessions.runner

    def _new_runner(self) -> DeviceRunner:
        """The runner of the CUDA device. Raises DeviceError if CUDA does not start."""
        number = self._providers[0][1]["device_id"]
        return DeviceRunner(
            onnxruntime(),
            partial(self._new_session, self.threads),
            place=("cuda", int(number)),
            pad_token_id=self._pad_token_id,
            longest=self._longest,
        )

    def _submit(self, windows: Sequence[Window]) -> list[Future[list[Logits]]]:
        if not windows:
            return []
        session, pool = self._session("narrow"), self._pool()
        futures = {i: pool.submit(lambda w: [self._run_one(session, w)], windows[i]) for i in _longest_first(windows)}
        return [futures[i] for i in range(len(windows))]

    def _run_one(self, session: Any, window: Window) -> Logits:
        starts, ends = self._call(session, self._single(window.input_ids, window.token_type_ids))
        return starts[0], ends[0]

    def _single(self, ids: IntArray, types: IntArray | None) -> dict[str, IntArray]:
        ones = self._ones  # shared, because a window that runs alone has no padding
        if len(ids) > ones.shape[1]:
            ones = self._ones = np.ones((1, len(ids)), dtype=np.int64)
        batch = {"input_ids": ids[None], "attention_mask": ones[:, : len(ids)]}
        if types is not None:
            batch["token_type_ids"] = types[None]
        return batch

    def _call(self, session: Any, batch: Mapping[str, Any], options: Any = None) -> Logits:
        feeds = {name: batch[name].astype(kind, copy=False) for name, kind in self._kinds.items()}
        try:
            found = session.run(LOGIT_NAMES, feeds, options)
        except Exception as error:
            raise runtime_error("run", error) from error
        shape = batch["input_ids"].shape
        for name, logits in zip(LOGIT_NAMES, found, strict=True):
            is_array = isinstance(logits, np.ndarray)
            if not is_array or logits.dtype.kind != "f" or logits.shape != shape:
                what = f"{logits.dtype} {list(logits.shape)}" if is_array else type(logits).__name__
                raise BundleError(
                    f"model.onnx: {name} must be numbers {list(shape)}, not {what}: export it with qadeploy export"
                )
        # Copied, because an array whose memory belongs to ONNX Runtime must not be freed in a forked child.
        starts, ends = (np.array(logits, dtype=np.float32) for logits in found)
        return starts, ends

    def _begin_call(self, windows: Sequence[Window]) -> None:
        sessions = self._own_sessions()
        with self._lock:
            sessions.calls += 1
            sessions.large |= sum(len(w) ** 2 for w in windows) >= LARGE
            self._sample = windows[0]  # any window

    def _end_call(self) -> None:
        """Ends a call; the last one running frees the memory that the arenas allocated for large inputs."""
        sessions = self._own_sessions()
        with self._lock:
            sessions.calls = max(sessions.calls - 1, 0)
            if sessions.calls or not sessions.large or self.device == "cuda" or self._sample is None:
                return
            sessions.large = False
        options = onnxruntime().RunOptions()
        options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
        ids, types = self._sample.input_ids[:_SHRINK_TOKENS], self._sample.token_type_ids
        for session in (sessions.wide, sessions.narrow):
            if session is not None:  # an arena shrinks at the end of a run, so this needs a short run
                self._call(session, self._single(ids, None if types is None else types[:_SHRINK_TOKENS]), options)

    def _own_sessions(self) -> _Sessions:
        """The sessions of this process; a forked child gets new ones."""
        if self._sessions.pid != os.getpid():
            self._lock = threading.Lock()
            self._sessions = _Sessions()
        return self._sessions

    def _session(self, kind: str) -> Any:
        """The session ``wide`` or ``narrow`` of this process, created when first needed."""
        sessions = self._own_sessions()
        session = getattr(sessions, kind)
        if session is None:
            with self._lock:
                session = getattr(sessions, kind)
                if session is None:
                    if not sessions.wide_used:  # a batch job needs no second copy of the weights
                        sessions.wide = None
                    session = self._new_session(self.threads if kind == "wide" else 1)
                    setattr(sessions, kind, session)
        return session

    def _pool(self) -> ThreadPoolExecutor:
        sessions = self._own_sessions()
        with self._lock:
            if sessions.pool is None:
                workers = 2 if self.device == "cuda" else self.threads  # one worker pads a batch while the other's runs
                sessions.pool = ThreadPoolExecutor(workers, thread_name_prefix="qadeploy")
            return sessions.pool

    def _first_session(self, requested: Device) -> Any:
        """The wide session: the runner's if its first provider is CUDA; otherwise, with ``auto``, one on the CPU."""
        reason = ""
        if self._providers != [CPU]:
            try:
                runner = self._new_runner()
                if runner.session.get_providers()[0] == CUDA:
                    self._sessions.runner = runner
                    return runner.session
            except DeviceError as error:
                reason = str(error)
            refuse(onnxruntime(), requested, reason)
            self._providers = [CPU]  # so that the settings for a CPU apply
        self._sessions.wide = self._new_session(self.threads)
        return self._sessions.wide

    def _new_session(self, threads: int, graphs: bool = False) -> Any:
        """A new session; with ``graphs``, one that can capture CUDA graphs."""
        on_cpu = self._providers == [CPU]
        settings = self._settings if on_cpu else SessionSettings()
        chosen = self._providers
        if graphs and not on_cpu:
            (name, values), *rest = chosen
            chosen = [(name, {**values, "enable_cuda_graph": "1"}), *rest]
        try:
            options = session_options(threads, settings.config)
            if graphs and not on_cpu:
                options.enable_mem_pattern = False  # it would allocate memory while a graph is captured
            with _creating:
                session = onnxruntime().InferenceSession(
                    self._read(),
                    options,
                    providers=chosen,
                    disabled_optimizers=list(settings.disabled_optimizers) or None,
                    enable_fallback=0,  # a fallback prints to stdout and hides the error
                )
            session._model_bytes = None  # kept for set_providers, which is not used: a copy of the whole model
            return session
        except (DeviceError, BundleError):
            raise
        except Exception as error:  # the binding raises one bare class per status code
            if not on_cpu:
                raise DeviceError(f"ONNX Runtime cannot start the model on CUDA: {one_line(error, 300)}") from error
            raise runtime_error("load", error) from error


def narrow_windows(settings: SessionSettings, windows: int, threads: int) -> int:
    """How many windows of one question run side by side on one thread each; the others run wide, one by one.

    As many run side by side as fill all threads in full rounds. The remaining r windows would leave threads idle: they run
    wide if that is faster than one more round. With s = 1 / (1 - p + p / threads), the speedup of a wide run (Amdahl's law,
    p = ``PARALLEL_SHARE``), they take r / s of the time of a narrow run.
    """
    if settings.one is not None and settings.threads in {None, threads}:
        return windows if settings.one == "narrow" else 0
    rest = windows % threads
    speedup = 1 / (1 - PARALLEL_SHARE + PARALLEL_SHARE / threads)
    return windows - rest if rest < speedup else windows


def _input_types(session: Any) -> dict[str, np.dtype[Any]]:
    """The inputs of a question-answering model with their types. Raises BundleError if it is not such a model."""
    inputs, outputs = session.get_inputs(), session.get_outputs()
    names, given = {each.name for each in inputs}, tuple(each.name for each in outputs)
    if (
        not names <= _INPUTS
        or "input_ids" not in names
        or not {each.type for each in inputs} <= _TYPES.keys()
        or given[:2] != LOGIT_NAMES
    ):
        raise BundleError(
            f"model.onnx: inputs {', '.join(each.name for each in inputs)} and outputs {', '.join(given)} are not those of a "
            "question-answering model: export it with qadeploy export"
        )
    for each in inputs:
        if len(each.shape) != 2 or any(isinstance(size, int) and size >= 0 for size in each.shape):
            raise BundleError(
                f"model.onnx: {each.name} has the shape {each.shape}, not any number of windows of any length: "
                "export it with qadeploy export"
            )
    return {each.name: _TYPES[each.type] for each in inputs}


def _longest_first(windows: Sequence[Window]) -> list[int]:
    """Indices by length, longest first: the run that ends last is short, and neighbours have similar lengths."""
    return sorted(range(len(windows)), key=lambda i: -len(windows[i]))

"""Windows on a GPU: captured CUDA graphs for few windows, batches by length for many.

Few windows (one question) are padded to a shape of ``GRAPH_ROWS`` rows and a multiple of ``STEP`` tokens. Each shape has its own
buffers on the device, so a graph that was captured once (ONNX Runtime's ``gpu_graph_id``) can be replayed: one launch
instead of hundreds. Many windows are sorted by length and run in padded batches of at most ``TOKENS`` tokens, in a second
session, created when first needed: a session that captures graphs cannot use memory patterns, without which batches were
a fifth slower on an H200 (``benchmarks/results/gpu.json``).

A captured graph is compared with a plain run of the same windows before it is used. If capturing fails or the
logits differ by more than ``APART``, no graphs are used from then on, and ``notes`` says why.

One thread of the process does everything that touches a GPU. ONNX Runtime's CUDA provider keeps a graph with the thread
that captured it (its ``PerThreadContext``): any other thread would capture and keep every shape again. It also
captures in CUDA's global mode (``cudaStreamCaptureModeGlobal``), in which an allocation or a copy by another thread breaks the
capture.

The same code runs on the CPU provider, which has no graphs to capture; the tests do so.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from qadeploy.core.windows import pad_batch
from qadeploy.errors import DeviceError, one_line
from qadeploy.records import LOGIT_NAMES, FloatArray, Logits, Window

_T = TypeVar("_T")
TOKENS = 16_384  # per batch of many windows, padding included
STEP = 32
GRAPH_ROWS = (1, 2, 4, 8)
LONGEST = 512  # longer windows gain little from a graph and run in batches
APART = 0.1  # the tolerance of fp16, see ``export/parity.py``
_MULTIPLE = 8  # fp16 matmuls are fastest at lengths that are multiples of 8
_NO_GRAPH = "-1"  # ONNX Runtime's id for a run that neither captures nor replays
_GRAPH_ID = "gpu_graph_id"
# From the messages of bfc_arena.cc, CUDA (cudaErrorMemoryAllocation) and cuBLAS when memory runs out.
_NO_MEMORY = ("failed to allocate memory", "available memory of", "out of memory", "cublas_status_alloc_failed")
_NUMPY: dict[str, np.dtype[Any]] = {
    "tensor(int64)": np.dtype(np.int64),
    "tensor(int32)": np.dtype(np.int32),
    "tensor(float)": np.dtype(np.float32),
    "tensor(float16)": np.dtype(np.float16),
}


def _new_thread() -> None:
    global _thread
    _thread = ThreadPoolExecutor(1, thread_name_prefix="qadeploy-device")


_thread: ThreadPoolExecutor
_new_thread()  # the thread itself starts with its first work
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_new_thread)


def _on_its_thread(work: Callable[..., _T], *given: Any) -> _T:
    """Calls ``work`` in the device thread of this process. The device thread itself must not call this."""
    return _thread.submit(work, *given).result()


@dataclass(frozen=True, slots=True)
class Shape:
    """The shape of a captured graph's inputs."""

    rows: int
    tokens: int


class _OutOfMemoryError(Exception):
    """A batch does not fit into the memory of the GPU."""


def round_up(number: int, step: int, most: int | None = None) -> int:
    """The next multiple of ``step``, but at most ``most`` (and at least ``number``)."""
    rounded = -(-number // step) * step
    return rounded if most is None else max(number, min(rounded, most))


def graph_shape(lengths: Sequence[int], longest: int | None = None) -> Shape | None:
    """The captured shape for windows of these lengths; None if they are too many or too long.

    ``longest`` is the longest input of the model in tokens.
    """
    if not lengths or len(lengths) > GRAPH_ROWS[-1] or max(lengths) > LONGEST:
        return None
    rows = next(rows for rows in GRAPH_ROWS if rows >= len(lengths))
    return Shape(rows, round_up(max(lengths), STEP, longest))


def batches(lengths: Sequence[int], *, tokens: int = TOKENS, masked: bool = True) -> list[list[int]]:
    """Indices of windows in batches of at most ``tokens`` tokens, padding included, longest first.

    A longer window runs alone. Without an attention mask, only windows of equal length share a batch.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    found: list[list[int]] = []
    for i in order:
        batch = found[-1] if found else []
        longest = lengths[batch[0]] if batch else 0
        if batch and longest * (len(batch) + 1) <= tokens and (masked or lengths[i] == longest):
            batch.append(i)
        else:
            found.append([i])
    return found


def in_batches(
    windows: Sequence[Window], rows: Sequence[Sequence[int]], run: Callable[[Sequence[Window]], list[Logits]]
) -> list[Logits]:
    """The logits of each window, in order; ``rows`` holds the indices of each batch, as ``batches`` returns them."""
    logits: dict[int, Logits] = {}
    for own in rows:
        logits.update(zip(own, run([windows[i] for i in own]), strict=True))
    return [logits[i] for i in range(len(windows))]


def unpadded(logits: Sequence[FloatArray], windows: Sequence[Window]) -> list[Logits]:
    """Cuts the start and end logits of each window out of those of a padded batch, ``[windows, tokens]`` each."""
    starts, ends = logits
    return [(starts[i, : len(w)], ends[i, : len(w)]) for i, w in enumerate(windows)]


class _Slot:
    """A captured shape with its buffers on the device, which are bound to a session once."""

    def __init__(self, ort: Any, session: Any, shape: Shape, place: tuple[str, int], number: int) -> None:
        size = (shape.rows, shape.tokens)

        def buffer(kind: str) -> Any:
            return ort.OrtValue.ortvalue_from_shape_and_type(size, _NUMPY[kind].type, *place)

        self.session = session
        self.inputs = {i.name: buffer(i.type) for i in session.get_inputs()}
        self.outputs = {o.name: buffer(o.type) for o in session.get_outputs() if o.name in LOGIT_NAMES}
        self.binding = session.io_binding()
        for name, value in self.inputs.items():
            self.binding.bind_ortvalue_input(name, value)
        for name, value in self.outputs.items():
            self.binding.bind_ortvalue_output(name, value)
        self.options = ort.RunOptions()
        self.options.add_run_config_entry(_GRAPH_ID, str(number))
        self.proven = False

    def run(self, batch: Mapping[str, Any]) -> Logits:
        """Start and end logits ``[rows, tokens]``, float32."""
        for name, value in self.inputs.items():
            value.update_inplace(batch[name])
        self.session.run_with_iobinding(self.binding, self.options)
        starts, ends = (_copied(self.outputs[name].numpy()) for name in LOGIT_NAMES)
        return starts, ends


class DeviceRunner:
    """Runs windows on one device. Safe under threads: callers pad their batches, the device thread runs one at a time.

    Args:
        ort: The onnxruntime module.
        make: Creates a session that can capture graphs (True) or one that cannot (False).
        place: The device of the buffers, as ONNX Runtime names it: ``cuda`` or ``cpu``, and the number of the device.
        pad_token_id: The id that fills batches.
        longest: The model's longest input in tokens, None for no limit.

    Raises:
        DeviceError: Whatever ``make(False)`` raises.
    """

    def __init__(
        self,
        ort: Any,
        make: Callable[[bool], Any],
        *,
        place: tuple[str, int],
        pad_token_id: int = 0,
        longest: int | None = None,
    ) -> None:
        self._ort, self._make, self._place = ort, make, place
        self._pad, self._longest = pad_token_id, longest
        self._slots: dict[Shape, _Slot] = {}
        self._captured = 0
        self._tokens = TOKENS  # per batch; fewer once the device's memory has run out
        self._no_graphs = ""
        self._capturing: Any = None
        self._plain: Any = None  # created when first needed for many windows
        self.session: Any = _on_its_thread(self._first_session)
        self._kinds = {i.name: _NUMPY[i.type] for i in self.session.get_inputs() if i.type in _NUMPY}
        self.masked = "attention_mask" in {i.name for i in self.session.get_inputs()}
        if not self.masked:
            self._no_graphs = self._no_graphs or "the model takes no attention_mask, so its windows cannot be padded"

    @property
    def graphs(self) -> bool:
        """Whether few windows run as captured graphs."""
        return not self._no_graphs

    def notes(self) -> list[str]:
        """How windows run and what keeps them from running faster: one line for few windows, one for many."""
        few = f"CUDA graphs ({self._captured} shapes captured)" if self.graphs else f"plain runs: {self._no_graphs}"
        many = f"batches by length of at most {self._tokens} tokens"
        if self._tokens < TOKENS:
            many += ", since the GPU's memory ran out"
        return [f"one question: {few}", f"many questions: {many}"]

    def warm_up(self, window: Window) -> None:
        """Captures the shapes of one row, with windows made of this one's tokens; others are captured when first needed."""
        most = min(LONGEST, self._longest or LONGEST)
        for tokens in range(STEP, round_up(most, STEP) + 1, STEP):
            if self.graphs:
                self.run([_stretched(window, min(tokens, most))])

    def run(self, windows: Sequence[Window]) -> list[Logits]:
        """Start and end logits of each window, float32 ``[tokens]`` each, in order, for few windows with the least delay.

        Raises DeviceError as ``run_many`` does.
        """
        shape = graph_shape([len(w) for w in windows], self._longest) if self.graphs else None
        if shape is None:
            return self.run_many(windows)
        found = _on_its_thread(self._replayed, shape, self._padded(windows, shape.rows, shape.tokens))
        return unpadded(found, windows) if found is not None else self.run_many(windows)

    def run_many(self, windows: Sequence[Window]) -> list[Logits]:
        """Like ``run``, in batches by length. When memory runs out, batches become smaller and stay so.

        Raises DeviceError if not even the longest window alone fits into memory, or if a run fails.
        """
        while True:
            tokens = self._tokens
            try:
                lengths = [len(w) for w in windows]
                return in_batches(windows, batches(lengths, tokens=tokens, masked=self.masked), self._run_batch)
            except _OutOfMemoryError as error:
                longest = max(len(w) for w in windows)
                if tokens <= longest:
                    raise DeviceError(
                        f"one window of {longest} tokens does not fit into the memory of the GPU: stop other programs that use "
                        f"the GPU, or give another --device ({error})"
                    ) from error
                self._tokens = min(self._tokens, tokens // 2)  # other threads may have run out of memory too

    def _run_batch(self, windows: Sequence[Window]) -> list[Logits]:
        """The logits of one batch, longest window first."""
        longest = len(windows[0])
        tokens = round_up(longest, _MULTIPLE, self._longest) if self.masked else longest
        batch = self._padded(windows, len(windows), tokens)  # may overlap with another thread's batch on the GPU
        return unpadded(_on_its_thread(self._batch, batch), windows)

    def _padded(self, windows: Sequence[Window], rows: int, tokens: int) -> dict[str, Any]:
        """The session's inputs, padded to this size and in its types; unused rows repeat the last window."""
        batch = pad_batch([*windows, *[windows[-1]] * (rows - len(windows))], self._pad, tokens=tokens)
        return {name: np.ascontiguousarray(batch[name], dtype=kind) for name, kind in self._kinds.items()}

    # Only the device thread calls the methods below.

    def _first_session(self) -> Any:
        try:
            self._capturing = self._make(True)
        except DeviceError as error:
            self._no_graphs = str(error)
            self._plain = self._make(False)
        return self._capturing or self._plain

    def _batch(self, batch: Mapping[str, Any]) -> Logits:
        """The logits of one batch. Raises _OutOfMemoryError, DeviceError."""
        try:
            self._plain = self._plain or self._make(False)
            starts, ends = self._plain.run(LOGIT_NAMES, batch)
        except DeviceError:
            raise
        except Exception as error:  # the binding raises one bare class per status code
            raise _converted(error) from error
        return _copied(starts), _copied(ends)

    def _replayed(self, shape: Shape, batch: Mapping[str, Any]) -> Logits | None:
        """The logits of a graph, which is captured first if needed; None if graphs are no longer used."""
        if not self.graphs:  # another call has just turned them off
            return None
        try:
            slot = self._slots.get(shape)
            if slot is None:
                slot = self._slots[shape] = _Slot(self._ort, self._capturing, shape, self._place, 1 + len(self._slots))
            found = slot.run(batch)
            if slot.proven:
                return found
            found = slot.run(batch)  # the first run captures, after two warm-up runs by ONNX Runtime; this one replays
            options = self._ort.RunOptions()
            options.add_run_config_entry(_GRAPH_ID, _NO_GRAPH)
            plain = self._capturing.run(LOGIT_NAMES, batch, options)
            apart = _apart(found, (plain[0], plain[1]), batch)
            if apart <= APART:
                slot.proven = True
                self._captured += 1
                return found
            self._no_graphs = f"a captured graph's logits were {apart:.2g} from those of a plain run"
        except Exception as error:  # the binding raises one bare class per status code
            self._no_graphs = f"capturing {shape.rows} x {shape.tokens} tokens failed: {one_line(error, 200)}"
        self._slots.clear()
        # Dropped at once: while the stream of this session captures, a new session would get no memory.
        self._capturing = self.session = None
        return None


def _converted(error: Exception) -> _OutOfMemoryError | DeviceError:
    """Converts an error of ONNX Runtime by its message, since its class does not tell when memory ran out."""
    said = one_line(error, 200)
    if any(words in said.lower() for words in _NO_MEMORY):
        return _OutOfMemoryError(said)
    return DeviceError(f"a run on the GPU failed: {said}")


def _copied(logits: Any) -> FloatArray:
    """A float32 copy of logits, which no later run overwrites and whose memory does not belong to ONNX Runtime."""
    copied: FloatArray = np.array(logits, dtype=np.float32)
    return copied


def _apart(found: Logits, plain: Logits, batch: Mapping[str, Any]) -> float:
    """The largest difference between logits outside the padding; infinite if one is not finite."""
    inside = np.asarray(batch["attention_mask"], dtype=bool)
    largest = max(float(np.abs(a - b)[inside].max()) for a, b in zip(found, plain, strict=True))
    return largest if np.isfinite(largest) else float("inf")


def _stretched(window: Window, tokens: int) -> Window:
    """A window of this many tokens, made by repeating the tokens of another one."""
    ids = np.resize(window.input_ids, tokens)
    types = None if window.token_type_ids is None else np.resize(window.token_type_ids, tokens)
    return Window(ids, types, 0, 0, 0, 0)

"""Windows on a GPU: buffers that stay on the device, CUDA graphs for few windows, packed rows for many.

Few windows (one question) go through a shape of ``GRAPH_ROWS`` rows and a multiple of ``STEP`` tokens. Each shape has buffers
of its own on the device, so a graph captured once (ONNX Runtime's ``gpu_graph_id``) can be replayed: one launch in place
of hundreds. Many windows go by length in batches of about ``TOKENS`` tokens through the graph that leaves padding out, where the
bundle has one, else padded.

Neither is taken on trust: a captured graph is compared with a plain run of the same windows, a packed graph with the padded one, on the
first windows that come. What fails, or differs by more than ``APART``, is left off for good, and ``notes`` says so.

One thread of the process does all that touches a GPU, whoever asks. ONNX Runtime's CUDA provider keeps a graph with the thread
that captured it (its ``PerThreadContext``): any other would capture every shape anew, and keep that too. And it captures in
CUDA's global mode (``cudaStreamCaptureModeGlobal``), where an allocation or a copy by another thread breaks the capture.

The same code runs on the CPU provider, which has no graphs to capture: so the tests do.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from qadeploy.errors import DeviceError
from qadeploy.qa.windows import pad_batch
from qadeploy.records import FloatArray, Window

Logits = tuple[FloatArray, FloatArray]
_T = TypeVar("_T")
TOKENS = 16_384  # of a batch of many windows
STEP = 32
GRAPH_ROWS = (1, 2, 4, 8)
LONGEST = 512  # windows beyond it take the plain path: they gain least from a graph
APART = 0.1  # the tolerance of fp16, see ``build/half.py``
PACKING = "padding left out"
_PLAIN_STEP = 8  # fp16 matrix products want lengths that 8 divides
_SLOTS = 96  # shapes that keep buffers: 16 lengths x 4 rows of graphs, and the batches of many windows
_NO_GRAPH = "-1"  # ONNX Runtime's id for a run that neither captures nor replays
_GRAPH_ID = "gpu_graph_id"
_OUTPUTS = ("start_logits", "end_logits")
# Of bfc_arena.cc, CUDA (cudaErrorMemoryAllocation) and cuBLAS.
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
_new_thread()  # it starts with its first work
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_new_thread)


def _on_its_thread(work: Callable[..., _T], *given: Any) -> _T:
    """What ``work`` returns or raises, done by the thread of this process that touches GPUs. Not to be called by that one."""
    return _thread.submit(work, *given).result()


@dataclass(frozen=True, slots=True)
class Place:
    """Where buffers lie, as ONNX Runtime names it: ``cuda`` and the device's number, or ``cpu``."""

    name: str
    number: int = 0


@dataclass(frozen=True, slots=True)
class Shape:
    """A batch's shape; ``graph`` where it is one of those that are captured."""

    rows: int
    tokens: int
    graph: bool = False


def round_up(number: int, step: int, most: int | None = None) -> int:
    """The next multiple of ``step``, ``most`` where that is less."""
    rounded = -(-number // step) * step
    return rounded if most is None else max(number, min(rounded, most))


def graph_shape(lengths: Sequence[int], longest: int | None = None) -> Shape | None:
    """The captured shape that windows of these lengths fit into; None where they are too many or too long.

    ``longest`` is the longest input that the model takes, in tokens.
    """
    if not lengths or len(lengths) > GRAPH_ROWS[-1] or max(lengths) > LONGEST:
        return None
    rows = next(rows for rows in GRAPH_ROWS if rows >= len(lengths))
    return Shape(rows, round_up(max(lengths), STEP, longest), graph=True)


def batches(
    lengths: Sequence[int], *, tokens: int = TOKENS, masked: bool = True, packed: bool = False
) -> list[list[int]]:
    """Indices of windows, by length, in batches of at most ``tokens`` tokens; a longer window has one to itself.

    Padding counts, unless ``packed``, where it costs little more than its place: then the batch may be twice as large
    with it. Not ``masked`` windows share a batch with those of their own length only.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    found: list[list[int]] = []
    own = 0
    for i in order:
        batch = found[-1] if found else []
        longest = lengths[batch[0]] if batch else 0
        padded = longest * (len(batch) + 1)
        fits = (own + lengths[i] <= tokens and padded <= 2 * tokens) if packed else padded <= tokens
        if batch and fits and (masked or lengths[i] == longest):
            batch.append(i)
            own += lengths[i]
        else:
            found.append([i])
            own = lengths[i]
    return found


class _OutOfMemoryError(Exception):
    """The GPU's memory does not hold a batch."""


class _Slot:
    """The buffers of one shape on the device, bound to a session once."""

    def __init__(self, ort: Any, session: Any, shape: Shape, place: Place, number: int | None) -> None:
        size = (shape.rows, shape.tokens)

        def buffer(kind: str) -> Any:
            return ort.OrtValue.ortvalue_from_shape_and_type(size, _NUMPY[kind].type, place.name, place.number)

        self.session = session
        self.kinds = {i.name: _NUMPY[i.type] for i in session.get_inputs()}
        self.inputs = {i.name: buffer(i.type) for i in session.get_inputs()}
        self.outputs = {o.name: buffer(o.type) for o in session.get_outputs() if o.name in _OUTPUTS}
        self.binding = session.io_binding()
        for name, value in self.inputs.items():
            self.binding.bind_ortvalue_input(name, value)
        for name, value in self.outputs.items():
            self.binding.bind_ortvalue_output(name, value)
        self.options = ort.RunOptions()
        self.options.add_run_config_entry(_GRAPH_ID, _NO_GRAPH if number is None else str(number))
        self.proven = number is None

    def run(self, batch: Mapping[str, Any]) -> Logits:
        """Start and end logits ``[rows, tokens]``, float32."""
        for name, value in self.inputs.items():
            value.update_inplace(np.ascontiguousarray(batch[name], dtype=self.kinds[name]))
        self.session.run_with_iobinding(self.binding, self.options)
        starts, ends = (_copied(self.outputs[name].numpy()) for name in _OUTPUTS)
        return starts, ends


class DeviceRunner:
    """Windows to logits on one device. Safe under threads: batches are padded side by side and run one by one, by one thread.

    ``make`` makes the session, with graphs to be captured or without; ``make_packed`` the one that leaves padding out (None:
    the bundle has none). ``longest`` is the model's longest input in tokens. Raises what ``make(False)`` raises.
    """

    def __init__(
        self,
        ort: Any,
        make: Callable[[bool], Any],
        *,
        place: Place,
        pad_token_id: int = 0,
        longest: int | None = None,
        make_packed: Callable[[], Any] | None = None,
        no_packing: str = "the bundle has no packed.onnx",
    ) -> None:
        self._ort, self._make, self._place = ort, make, place
        self._pad, self._longest = pad_token_id, longest
        self._slots: OrderedDict[tuple[str, Shape], _Slot] = OrderedDict()
        self._captured = 0
        self._tokens = TOKENS  # of a batch; fewer once the device's memory has run out
        self._no_graphs = ""
        self._no_packing = "" if make_packed else no_packing
        self.session: Any = _on_its_thread(self._first_session)
        self._make_packed = make_packed
        self._packed: Any = None  # made when many windows first come
        self._packed_proven = False
        self._kinds = {i.name: _NUMPY[i.type] for i in self.session.get_inputs() if i.type in _NUMPY}
        self.masked = "attention_mask" in {i.name for i in self.session.get_inputs()}
        if not self.masked:
            self._no_graphs = self._no_graphs or "the model takes no attention_mask, so its windows cannot be padded"

    @property
    def graphs(self) -> bool:
        """Whether few windows run as captured graphs."""
        return not self._no_graphs

    @property
    def packed(self) -> bool:
        """Whether many windows run without padding."""
        return not self._no_packing

    def notes(self) -> list[str]:
        """Which paths windows take, and why not the faster ones: a line each for few windows and for many."""
        few = f"CUDA graphs ({self._captured} shapes captured)" if self.graphs else f"plain runs: {self._no_graphs}"
        many = PACKING if self.packed else f"padded batches: {self._no_packing}"
        if self._tokens < TOKENS:
            many += f" (at most {self._tokens} tokens per batch: memory ran out)"
        if self.packed and not self._packed_proven:
            many += " (not run yet)"
        return [f"one question: {few}", f"many questions: {many}"]

    def warm_up(self, window: Window, rows: Sequence[int] = GRAPH_ROWS[:1], longest: int = LONGEST) -> int:
        """Captures the shapes of these numbers of rows up to ``longest`` tokens with windows made of this one's tokens.

        The rest is captured when first met. Returns how many shapes there are now.
        """
        most = min(longest, self._longest or longest)
        for count in rows:
            for tokens in range(STEP, round_up(most, STEP) + 1, STEP):
                if self.graphs:
                    self.run([_stretched(window, min(tokens, most))] * count)
        return self._captured

    def run(self, windows: Sequence[Window]) -> list[Logits]:
        """Start and end logits of each window, float32 ``[tokens]`` each, in order: as soon as can be if they are few."""
        shape = graph_shape([len(w) for w in windows], self._longest) if self.graphs else None
        if shape is None:
            return self.run_many(windows)
        found = _on_its_thread(self._replayed, shape, self._padded(windows, shape))
        return _cut(found, windows) if found is not None else self.run_many(windows)

    def run_many(self, windows: Sequence[Window]) -> list[Logits]:
        """Like ``run``, in batches by length.

        Raises DeviceError if the device's memory does not hold the longest window alone, or if a run fails.
        """
        while True:
            try:
                return self._in_batches(windows)
            except _OutOfMemoryError as error:
                if self._tokens <= max(len(w) for w in windows):
                    raise DeviceError(
                        f"the GPU's memory does not hold one window of {max(len(w) for w in windows)} tokens: end what "
                        f"else uses the GPU, or give another --device ({error})"
                    ) from error
                self._tokens //= 2
                _on_its_thread(self._slots.clear)

    def _in_batches(self, windows: Sequence[Window]) -> list[Logits]:
        logits: dict[int, Logits] = {}
        lengths = [len(w) for w in windows]
        for rows in batches(lengths, tokens=self._tokens, masked=self.masked, packed=self.packed):
            own = [windows[i] for i in rows]
            longest = lengths[rows[0]]
            step = 1 if not self.masked else STEP if self.packed else _PLAIN_STEP
            shape = Shape(len(rows), round_up(longest, step, self._longest) if self.masked else longest)
            batch = self._padded(own, shape)  # beside the batch that another thread has on the device
            found = _on_its_thread(self._batch, shape, batch)
            logits.update(zip(rows, _cut(found, own), strict=True))
        return [logits[i] for i in range(len(windows))]

    def _padded(self, windows: Sequence[Window], shape: Shape) -> dict[str, Any]:
        """Inputs of this shape, of the types that the session takes; rows that are too many repeat the last window."""
        rows = [*windows, *[windows[-1]] * (shape.rows - len(windows))]
        batch = pad_batch(rows, self._pad, tokens=shape.tokens)
        return {name: value.astype(self._kinds.get(name, value.dtype), copy=False) for name, value in batch.items()}

    # What follows is called by the device's thread alone.

    def _first_session(self) -> Any:
        try:
            return self._make(True)
        except DeviceError as error:
            self._no_graphs = str(error)
        return self._make(False)

    def _plain(self) -> Any:
        """The session that pads, made anew where graphs were given up."""
        self.session = self.session or self._make(False)
        return self.session

    def _batch(self, shape: Shape, batch: Mapping[str, Any]) -> Logits:
        """The logits of one of many batches. Raises _OutOfMemoryError, DeviceError."""
        try:
            found = self._without_padding(shape, batch)
            return self._slot("plain", self._plain(), shape).run(batch) if found is None else found
        except (DeviceError, _OutOfMemoryError):
            raise
        except Exception as error:  # the binding raises one class per status code, all of them bare
            _raise_if_out_of_memory(error)
            raise DeviceError(f"a run on the GPU failed: {_short(error)}") from error

    def _replayed(self, shape: Shape, batch: Mapping[str, Any]) -> Logits | None:
        """A graph's logits, captured first where need be; None where graphs are given up."""
        if not self.graphs:  # given up since this was asked for
            return None
        found, reason = self._by_graph(shape, batch)
        if reason:
            self._no_graphs = reason
            self._slots.clear()
            self.session = None  # at once: while its stream captures, a new session would get no memory
        return found

    def _by_graph(self, shape: Shape, batch: Mapping[str, Any]) -> tuple[Logits | None, str]:
        """A graph's logits, else None and what is wrong with graphs."""
        try:
            slot = self._slot("graph", self.session, shape)
            found = slot.run(batch)
            if slot.proven:
                return found, ""
            found = slot.run(batch)  # the first run captured, after two of ONNX Runtime's own; this one replays
            plain = _Slot(self._ort, self.session, shape, self._place, None).run(batch)
            apart = _apart(found, plain, batch)
        except Exception as error:  # the binding raises one class per status code, all of them bare
            return None, f"capturing {shape.rows} x {shape.tokens} tokens failed: {_short(error)}"
        if apart > APART:
            return None, f"a captured graph's logits were {apart:.2g} from those of a plain run"
        slot.proven = True
        self._captured += 1
        return found, ""

    def _without_padding(self, shape: Shape, batch: Mapping[str, Any]) -> Logits | None:
        """The packed graph's logits; None where there is none, or it is given up."""
        if self._make_packed is None or not self.packed:
            return None
        try:
            self._packed = self._packed or self._make_packed()
            found = self._slot("packed", self._packed, shape).run(batch)
            if self._packed_proven:
                return found
            plain = self._slot("plain", self._plain(), shape).run(batch)
            apart = _apart(found, plain, batch)
            if apart <= APART:
                self._packed_proven = True
                return found
            reason = f"the packed graph's logits were {apart:.2g} from those of the padded one"
        except Exception as error:
            _raise_if_out_of_memory(error)
            reason = f"the packed graph failed: {_short(error)}"
        self._no_packing = reason
        self._packed = None
        for key in [key for key in self._slots if key[0] == "packed"]:
            del self._slots[key]
        return None

    def _slot(self, kind: str, session: Any, shape: Shape) -> _Slot:
        key = (kind, shape)
        slot = self._slots.get(key)
        if slot is None:
            # Of a captured shape the buffers must stay where they are; of the others the longest unused go.
            spare = [known for known in self._slots if not known[1].graph]
            if len(self._slots) >= _SLOTS and spare:
                del self._slots[spare[0]]
            number = 1 + sum(known[1].graph for known in self._slots) if shape.graph else None
            slot = self._slots[key] = _Slot(self._ort, session, shape, self._place, number)
        self._slots.move_to_end(key)
        return slot


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def _raise_if_out_of_memory(error: Exception) -> None:
    """Raises _OutOfMemoryError if that is what ONNX Runtime's arena, CUDA or cuBLAS says in ``error``."""
    said = str(error).lower()
    if any(words in said for words in _NO_MEMORY):
        raise _OutOfMemoryError(_short(error)) from error


def _copied(logits: Any) -> FloatArray:
    """Logits in float32 that the next run leaves alone: from a GPU they are a copy, on a CPU the buffer itself."""
    copied: FloatArray = logits.astype(np.float32, copy=not logits.flags.owndata)
    return copied


def _cut(logits: Logits, windows: Sequence[Window]) -> list[Logits]:
    starts, ends = logits
    return [(starts[i, : len(w)], ends[i, : len(w)]) for i, w in enumerate(windows)]


def _apart(found: Logits, plain: Logits, batch: Mapping[str, Any]) -> float:
    """The largest difference of any logit outside the padding; infinite where one is not a number."""
    inside = np.asarray(batch["attention_mask"], dtype=bool)
    largest = max(float(np.abs(a - b)[inside].max()) for a, b in zip(found, plain, strict=True))
    return largest if np.isfinite(largest) else float("inf")


def _stretched(window: Window, tokens: int) -> Window:
    """A window of this many tokens, repeating a shorter one's."""
    ids = np.resize(window.input_ids, tokens)
    types = None if window.token_type_ids is None else np.resize(window.token_type_ids, tokens)
    return Window(ids, types, 0, 0, 0, 0)

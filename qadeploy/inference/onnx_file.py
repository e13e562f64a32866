"""What a model file may contain, checked on its bytes without the onnx package.

ONNX Runtime runs whatever a graph says. So these are refused before it sees the file: weights in other files, operators of
domains other than its own, nodes that read files, functions (nested ones expand without bound), and loops in graphs that do
not decode answers themselves.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from qadeploy.errors import BundleError

# Field numbers of onnx.proto (https://github.com/onnx/onnx/blob/main/onnx/onnx.proto) that lead to tensors and nodes.
_PATHS: dict[str, dict[int, str]] = {
    "model": {7: "graph", 25: "function"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "function": {7: "node", 11: "attribute"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {},
}
_EXTERNAL_DATA, _DATA_LOCATION = 13, 14  # of a tensor
_OPERATOR, _DOMAIN = 4, 7  # of a node
_DOMAINS = frozenset({"", "ai.onnx", "com.microsoft"})
_TEXT_DOMAINS = _DOMAINS | {"ai.onnx.ml"}  # its dictionaries from text to numbers
_LOOPS = frozenset({"Loop", "Scan", "SequenceMap"})
_READS_FILES = frozenset({"EPContext"})


@dataclass(slots=True)
class _Found:
    external: bool = False
    functions: int = 0
    domains: set[str] = field(default_factory=set)
    operators: set[str] = field(default_factory=set)


def check_model(model: bytes, where: str, *, reads_text: bool = False) -> None:
    """Checks what a model file contains.

    Args:
        model: Its bytes.
        where: Its path, for messages.
        reads_text: Whether its graph turns texts into answers by itself; such a graph may contain loops.

    Raises:
        BundleError: The bytes are not a model, or it contains something that a bundle may not contain.
    """
    found = _read(model, where)
    if found.external:
        raise BundleError(f"{where}: keeps weights in another file, which a bundle may not do")
    if found.functions:
        raise BundleError(f"{where}: defines functions, which a bundle may not do: export it with qadeploy export")
    if foreign := found.domains - (_TEXT_DOMAINS if reads_text else _DOMAINS):
        raise BundleError(
            f"{where}: has operators of the domain {min(foreign)!r}, which a bundle may not have: export it with qadeploy export"
        )
    refused = found.operators & (_READS_FILES if reads_text else _READS_FILES | _LOOPS)
    if refused:
        raise BundleError(
            f"{where}: has {min(refused)} nodes, which a bundle may not have: export it with qadeploy export"
        )


def _read(model: bytes, where: str) -> _Found:
    found = _Found()
    try:
        _walk(memoryview(model), "model", found)
    except (IndexError, ValueError, RecursionError) as error:
        raise BundleError(f"{where}: is not an ONNX model: {error}") from error
    return found


def _walk(message: memoryview, kind: str, found: _Found) -> None:
    for number, value in _fields(message):
        if not isinstance(value, memoryview):
            found.external |= kind == "tensor" and number == _DATA_LOCATION and value != 0
            continue
        if kind == "tensor":
            found.external |= number == _EXTERNAL_DATA
        elif kind == "node" and number in {_OPERATOR, _DOMAIN}:
            names = found.operators if number == _OPERATOR else found.domains
            names.add(str(value, "utf-8"))
        elif inner := _PATHS[kind].get(number):
            found.functions += inner == "function"
            _walk(value, inner, found)


def _fields(message: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    at, end = 0, len(message)
    while at < end:
        key, at = _varint(message, at)
        number, wire = key >> 3, key & 7
        if wire == 0:
            value, at = _varint(message, at)
            yield number, value
        elif wire == 2:
            size, at = _varint(message, at)
            if at + size > end:
                raise ValueError("a field runs past the end")
            yield number, message[at : at + size]
            at += size
        elif wire in {1, 5}:
            at += 8 if wire == 1 else 4
        else:
            raise ValueError(f"wire type {wire}")


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
        if shift > 63:
            raise ValueError("a number is too long")

"""The tools and runtimes that people would use instead of qadeploy, one per file.

Each module has functions that prepare a peer from a ``Setup`` (export, quantize) and return how to load it, and
functions that load it, which also run in separate processes. Each imports its libraries inside its functions and uses
them as their documentation says.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from qadeploy.bench.peers import eager, openvino, optimum, pipeline
from qadeploy.bench.peers.setup import Setup
from qadeploy.bench.variant import Variant
from qadeploy.errors import InputError

PEERS: dict[str, Callable[[Setup], Variant]] = {
    "pipeline": pipeline.prepare,
    "torch": partial(eager.prepare, precision="fp32"),
    "torch-bf16": partial(eager.prepare, precision="bf16"),
    "optimum": optimum.prepare,
    "optimum-direct": optimum.prepare_direct,
    "openvino": openvino.prepare,
}


def parse_peers(names: str) -> list[str]:
    """The peers of a comma-separated list, each once. Raises InputError if one is unknown."""
    found = list(dict.fromkeys(name.strip() for name in names.split(",") if name.strip()))
    unknown = [name for name in found if name not in PEERS]
    if unknown:
        raise InputError(f"unknown peer {', '.join(unknown)}: choose from {', '.join(PEERS)}")
    return found

"""The tools and runtimes that people would use in qadeploy's place, one a file.

Each module has a function that prepares a peer from a ``Setup`` (exports, quantizes) and says how to load it, and the
functions that load it, which run again in a process of their own. Each imports what it needs inside its functions,
and runs as its documentation says.
"""

from __future__ import annotations

from collections.abc import Callable

from qadeploy.bench.peers import eager, openvino, optimum, pipeline
from qadeploy.bench.peers.setup import Setup
from qadeploy.bench.variant import Variant
from qadeploy.errors import InputError

PEERS: dict[str, Callable[[Setup], Variant]] = {
    "pipeline": pipeline.prepare,
    "torch": eager.prepare_fp32,
    "torch-bf16": eager.prepare_bf16,
    "optimum": optimum.prepare,
    "optimum-direct": optimum.prepare_direct,
    "openvino": openvino.prepare,
}


def parse_peers(names: str) -> list[str]:
    """The peers of a comma-separated list, each once. Raises InputError on an unknown one."""
    found = list(dict.fromkeys(name.strip() for name in names.split(",") if name.strip()))
    unknown = [name for name in found if name not in PEERS]
    if unknown:
        raise InputError(f"unknown peer {', '.join(unknown)}: choose from {', '.join(PEERS)}")
    return found

"""Loads a variant in its own process, answers, and reports the first answer and the peak memory.

Run by ``qadeploy.bench.cold`` as ``python -m qadeploy.bench.child``, with the order as JSON on stdin. It imports nothing
that the variant does not need, because imports are part of the measured time and memory.
"""

from __future__ import annotations

import json
import os
import sys


def main() -> None:
    """Loads the variant of ``{"loader", "arguments", "pairs"}``; writes a line at the first answer and at the end."""
    report = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print to stdout too
    order = json.load(sys.stdin)

    from qadeploy.bench.variant import load

    asker = load(order["loader"], order["arguments"])
    pairs = [(question, context) for question, context in order["pairs"]]
    asker.answer_one(*pairs[0])
    print(json.dumps({"answered": 1}), file=report, flush=True)
    if len(pairs) > 1:
        asker.answer_all(pairs)
    from qadeploy.machine import peak_memory

    print(json.dumps({"peak_memory_bytes": peak_memory()}), file=report, flush=True)
    report.flush()
    os._exit(0)  # some libraries take seconds to exit, or hang


if __name__ == "__main__":
    main()

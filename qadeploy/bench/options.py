"""The options of a bench."""

from __future__ import annotations

from dataclasses import dataclass

from qadeploy import options
from qadeploy.core.metrics import MetricChoice
from qadeploy.data.fields import DataOptions
from qadeploy.options import option


@dataclass(frozen=True, slots=True)
class BenchOptions(DataOptions):
    """Everything that a bench depends on, except the bundles and the limits (see ``limits.Limits``)."""

    data: str | None = option(None, "Annotated questions.", shown="those that the first bundle's run held out")
    against: str = option(
        "pipeline,optimum",
        "Peers, separated by commas: pipeline, torch, torch-bf16, optimum, optimum-direct, openvino; empty for none.",
    )
    questions: int = option(200, "Maximum number of questions, drawn evenly.", least=1)
    latency_questions: int = option(
        50, "How many of them are also asked one at a time, to measure p50, p95 and p99.", least=1
    )
    metric: MetricChoice | None = option(  # noqa: RUF009 - a Literal
        None, "How EM and F1 compare texts, as in train; auto looks at these questions.", shown="the first bundle's"
    )
    rounds: int = option(3, "Interleaved rounds.", least=1)
    threads: int | None = option(None, "CPU threads of every variant.", least=1, shown="all")
    checkpoint: str | None = option(None, "The PyTorch checkpoint for the peers.", shown="the first bundle's source")
    out: str | None = option(None, "Folder for bench.json, bench.html and bench.png.", also=("--output",))
    device: str = options.device()
    load_timeout: float = options.load_timeout()
    trust_remote_code: bool = options.trust_remote_code()

"""What an export makes, and how it is judged."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from qadeploy import options
from qadeploy.data.fields import DataOptions
from qadeploy.inference.devices import parse_device
from qadeploy.options import option

MAX_QUESTIONS = 2_000  # the F1 interval is then about two points wide; four times as many questions halve it


@dataclass(frozen=True, slots=True)
class ExportOptions(DataOptions):
    """Everything that an export depends on besides its run."""

    out: str | None = option(None, "Bundle folder.", shown="bundles/NAME after the run", also=("--output",))
    exporter: Literal["auto", "optimum", "torch"] = option(
        "auto",
        "What writes the ONNX graph: optimum, or PyTorch's own exporter; auto is optimum if optimum-onnx is installed and supports the model.",
    )
    quantize: bool = option(False, "Also write NAME-int8, if it keeps its F1.")
    fp16: bool = option(False, "Also write NAME-fp16, the graph for GPUs.")
    device: str = option(
        "cpu", "Where NAME-fp16 is measured; cuda (or cuda:N) implies --fp16. Without a GPU it is measured on the CPU."
    )
    optimize: bool = option(True, "Also write NAME-fused, the optimised graph.", off="--no-optimize")
    eval_data: str | None = option(None, "Held-out questions to judge on.", shown="those that the run held out")
    max_eval_samples: int = option(MAX_QUESTIONS, "Judge on this many questions at most, drawn evenly.", least=1)
    max_f1_drop: float = option(0.5, "Points of F1 that int8 may lose.", least=0, most=100)
    target: Literal["latency", "throughput", "size"] = option(
        "latency", "What the int8 recipe is chosen for: one question at a time, many at once, or bytes."
    )
    recipe: str | None = option(
        None, "Use this int8 recipe instead of measuring all; --list-recipes names them.", shown="the best measured"
    )
    reduce_range: bool = option(
        False, "Give int8 weights 7 bits, for CPUs without VNNI, where 8 bits saturate; always on if this CPU lacks it."
    )
    budget: str = option(
        "5m",
        "Time for measuring int8 recipes, e.g. 90s or 5m, once one keeps its F1. Below 2m, each bundle is measured more briefly, too.",
    )
    spans_in_graph: bool = option(
        False,
        "Also write NAME-spans of each bundle except NAME-fused: the graph takes a context mask and returns the best spans.",
    )
    span_top_k: int = option(20, "Spans per window of --spans-in-graph.", least=1)
    text_in_graph: bool = option(
        False,
        "Also write NAME-text of each bundle for a CPU: one file, text in, answer out (WordPiece tokenizers).",
        also=("--strings-in-graph",),
    )
    web: str | None = option(
        None,
        "Also write a static site to this folder: a page that answers in the browser, from the int8 bundle if there is one "
        "(WordPiece tokenizers). npm downloads onnxruntime-web for it.",
    )
    cache: bool = options.keep("what was measured, so that a search that was cut off goes on,")
    triton: str | None = option(
        None,
        "Also add the bundles, except NAME-fused and NAME-text, to this Triton model repository; "
        "a bundle given as RUN is added as it is.",
    )
    triton_batch: int | None = option(
        None, "Windows that Triton may run together.", least=1, shown="32 for fp16, which is for GPUs, else 1"
    )
    load_timeout: float = options.load_timeout()
    trust_remote_code: bool = options.trust_remote_code()
    allow_pickle: bool = options.allow_pickle()

    @property
    def wants_fp16(self) -> bool:
        """Whether NAME-fp16 is written."""
        return self.fp16 or parse_device(self.device).kind == "cuda"

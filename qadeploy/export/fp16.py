"""fp16: from an fp32 bundle to an fp16 one for CUDA, its graph fused, checked against PyTorch's logits and an F1 gate.

Weights and activations are fp16, the output logits fp32. What must be exact stays in fp32: numbers that become integers
(positions, buckets of distances) and the angles of rotary positions.

Tried on an H200 and left out because it was not faster: ``PackedAttention`` and ``PackedMultiHeadAttention``, which leave out
padding, and ``ai.onnx.Attention`` with ``nonpad_kv_seqlen``.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

from qadeploy.core.metrics import bootstrap_interval
from qadeploy.core.settings import any_unanswerable
from qadeploy.errors import DeviceError, FailureError, GateError, InputError, one_line
from qadeploy.evaluation.scoring import evaluate
from qadeploy.export.finishing import finish_bundle
from qadeploy.export.fusion import FUSED_TYPES, fuse, silent
from qadeploy.export.graph import Graph, add_contrib_domain
from qadeploy.export.reference import Reference, make_answerer
from qadeploy.inference.answerer import Answerer
from qadeploy.inference.bundle import MODEL, Bundle, open_bundle, writing_bundle
from qadeploy.inference.tuning import Tuning, model_of
from qadeploy.records import LOGIT_NAMES, Example
from qadeploy.timing import spread
from qadeploy.training.runs import known_examples

MAX_F1_DROP = 0.1
QUESTIONS = 1000  # fewer cannot resolve a tenth of a point
_ON_CPU = "fp16 weights; ONNX Runtime computes in fp32 if the CPU has no fp16 kernel (measured without a GPU)"
_ON_CUDA = "fp16 weights and arithmetic, on CUDA"
_INTEGERS = frozenset({onnx.TensorProto.INT64, onnx.TensorProto.INT32})


@dataclass(frozen=True, slots=True)
class Fp16Model:
    """A model in fp16, and how it was made.

    ``attentions`` counts its attention nodes, for ``layers`` layers; ``exact`` names the nodes that stay in fp32.
    """

    model: bytes
    attentions: int
    layers: int
    int32_inputs: bool
    exact: tuple[str, ...]


def to_fp16(model: bytes, architecture: dict[str, Any]) -> Fp16Model:
    """Converts a plain fp32 model. ``architecture`` is a manifest's entry.

    Raises FailureError if ONNX Runtime cannot convert the graph.
    """
    from onnxruntime.transformers.onnx_model_bert import BertOnnxModel

    heads, hidden = architecture["heads"] or 0, architecture["hidden"] or 0
    try:
        if architecture["model_type"] in FUSED_TYPES:
            made = fuse(model, architecture, mask_index=True)
        else:
            made = BertOnnxModel(onnx.load_model_from_string(model), heads, hidden)
        exact = exact_nodes(made.model)
        with silent():
            made.convert_float_to_float16(keep_io_types=list(LOGIT_NAMES), node_block_list=list(exact))
            # int32 inputs save casts if the embedding accepts them (the fused one does), and add some if Gather reads them.
            narrow = BertOnnxModel(copy.deepcopy(made.model), heads, hidden)
            narrow.change_graph_inputs_to_int32()
            int32 = _casts(narrow.model) <= _casts(made.model)
            made = narrow if int32 else made
            made.prune_graph()
            made.topological_sort()
            add_contrib_domain(made.model)
    except Exception as error:  # the converters and their libraries may raise anything
        kind = architecture["model_type"]
        raise FailureError(f"ONNX Runtime cannot convert this {kind} model to fp16: {one_line(error, 300)}") from error
    attentions = Counter(node.op_type for node in made.model.graph.node)["Attention"]
    layers = architecture["layers"] or 0
    return Fp16Model(made.model.SerializeToString(), attentions, layers, int32, exact)


def exact_nodes(proto: onnx.ModelProto) -> tuple[str, ...]:
    """The names of the nodes that must not be rounded to fp16; nodes without a name get one.

    These are the sines and cosines, and all arithmetic that ends in a cast to integers: MPNet's buckets of distances
    (a truncated logarithm) were wrong in fp16, and fp16 cannot count the angles of rotary positions beyond 2,048.
    """
    for number, node in enumerate(proto.graph.node):
        node.name = node.name or f"{node.op_type}_unnamed_{number}"
    graph = Graph(proto)
    found: dict[str, None] = {}
    stack = [node for node in proto.graph.node if node.op_type in {"Sin", "Cos"} or _to_integers(node)]
    while stack:
        node = stack.pop()
        if node.name in found:
            continue
        found[node.name] = None
        if node.op_type not in {"Shape", "Gather"}:
            stack += [graph.makers[name] for name in node.input if name in graph.makers]
    return tuple(found)


def _to_integers(node: onnx.NodeProto) -> bool:
    return node.op_type == "Cast" and any(a.name == "to" and a.i in _INTEGERS for a in node.attribute)


def _casts(proto: onnx.ModelProto) -> int:
    return sum(node.op_type == "Cast" for node in proto.graph.node)


# ---------------------------------------------------------------- the bundle


def write_fp16(
    reference: Reference,
    source: Bundle,
    out: Path,
    *,
    max_f1_drop: float = MAX_F1_DROP,
    device: str = "auto",
    say: Callable[[str], object] = lambda _: None,
) -> Bundle:
    """Writes the fp16 bundle ``out`` from the fp32 bundle ``source`` and returns it, verified.

    Its answers are compared, question by question, with the fp32 bundle's: on the held-out questions and, if these are few,
    on questions that the run trained on or chose by.

    Args:
        reference: The PyTorch model and the held-out questions.
        source: The fp32 bundle.
        out: The folder to write.
        max_f1_drop: Points of F1 that the fp16 bundle may lose.
        device: Where it is measured: auto, cpu, cuda, cuda:N. If CUDA is not available, it is measured on the CPU.
        say: Called with the reason if CUDA is not available.

    Raises:
        InputError: There is no question to compare answers on.
        FailureError: The graph cannot be converted.
        GateError: Logits or answers lose too much; ``out`` is left as it was.
    """
    examples = judging_questions(reference)
    if not examples:
        raise InputError(f"{out}: there is no question to compare fp16 with fp32 on: give --eval-data FILE")
    made = to_fp16(source.read(MODEL), source.manifest["architecture"])
    try:
        answerer = make_answerer(reference, made.model, {}, device=device)
    except DeviceError as error:
        say(f"{error}\nso the fp16 bundle is judged on the CPU")
        device = "cpu"
        answerer = make_answerer(reference, made.model, {}, device=device)
    judged = _judge(reference, source, answerer, examples)
    if not judged["f1_change"] >= -max_f1_drop:
        low, high = judged["f1_change_interval"]
        raise GateError(
            f"{out}: fp16 loses {-judged['f1_change']:.2f} points of F1 against fp32 ({low:+.2f} to {high:+.2f}, on "
            f"{judged['questions']} questions), more than {max_f1_drop}: it was not written; serve the fp32 bundle on the GPU"
        )
    model = model_of(answerer)
    entry = {
        "graph": "fused" if made.attentions else "plain",
        "attention_nodes": made.attentions,
        "layers": made.layers,
        "inputs": "int32" if made.int32_inputs else "int64",
        "fp32_nodes": len(made.exact),
        "from": source.name,
        "for": "cuda",
        "measured_on": model.device,
        "arithmetic": _ON_CUDA if model.device == "cuda" else _ON_CPU,
        "paths": model.notes(),
        "max_f1_drop": max_f1_drop,
        "judged_on": judged,
    }
    tuning = Tuning.none(model.threads)  # session settings only apply to a CPU
    with writing_bundle(out) as work:
        (work / MODEL).write_bytes(made.model)
        finish_bundle(reference, work, out.name, precision="fp16", made=entry, tuning=tuning, device=device)
    return open_bundle(out)


def _judge(reference: Reference, source: Bundle, answerer: Answerer, examples: Sequence[Example]) -> dict[str, Any]:
    """Compares the answers of fp16 and of the fp32 bundle question by question; returns plain JSON values."""
    plain = make_answerer(reference, source.read(MODEL), source.manifest["session"], device="cpu")
    allow = any_unanswerable(examples)
    ours, theirs = (evaluate(each, examples, allow_no_answer=allow) for each in (answerer, plain))
    difference = ours.scores.rows_f1 - theirs.scores.rows_f1
    same = [(a.start, a.end) == (b.start, b.end) for a, b in zip(ours.answers, theirs.answers, strict=True)]
    return {
        "questions": len(examples),
        "held_out": min(len(reference.examples), len(examples)),
        "f1_change": 100.0 * float(difference.mean()),
        "f1_change_interval": list(bootstrap_interval(difference)),
        "equal_answers": sum(same) / len(same),
        "enough": len(examples) >= QUESTIONS,
    }


def judging_questions(reference: Reference, count: int = QUESTIONS) -> Sequence[Example]:
    """All held-out questions and, if they are fewer than ``count``, some that the run trained on or chose by.

    Answers of fp16 and fp32 are compared question by question, so those that the model knows by heart are useful too.
    """
    held_out = reference.examples
    taken = {(e.question, e.context) for e in held_out}
    missing = count - len(held_out)
    if missing <= 0:
        return held_out
    more = [e for e in known_examples(reference.run.checkpoint) if (e.question, e.context) not in taken]
    return (*held_out, *spread(more, missing))


def fp16_lines(bundle: Bundle) -> list[str]:
    """How a bundle was made and judged, as text."""
    made, parity = bundle.manifest["made"], bundle.manifest["parity"]
    judged = made["judged_on"]
    low, high = judged["f1_change_interval"]
    lines = [
        f"fp16, {made['attention_nodes']} of {made['layers']} attentions are single nodes, {made['inputs']} inputs",
        f"logits within {parity['max_abs_diff']:.1e} of PyTorch; F1 {judged['f1_change']:+.2f} ({low:+.2f} to {high:+.2f}) "
        f"against fp32 on {judged['questions']} questions, {100 * judged['equal_answers']:.1f} % of the answers equal",
        f"measured on {made['measured_on']}: {made['arithmetic']}",
    ]
    if not judged["enough"]:
        lines.append(f"judged on fewer than {QUESTIONS} questions, which cannot resolve a tenth of a point of F1")
    return lines

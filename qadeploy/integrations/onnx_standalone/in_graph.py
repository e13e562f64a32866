"""Bundles whose graph answers by itself, for callers without this package: ``NAME-spans`` and ``NAME-text``.

Both are made from a bundle and contain one ``model.onnx`` besides tokenizer, card and manifest. They are only written if
they agree with the Python decoder on real windows and questions.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from qadeploy.core.decoding import WindowLogits, decode
from qadeploy.core.encoded_text import EncodedText
from qadeploy.core.settings import QaSettings
from qadeploy.core.windows import CONTEXT_MASK, Encoder, pad_batch, pad_context_masks
from qadeploy.errors import FailureError, GateError, InputError
from qadeploy.files import write_text
from qadeploy.inference.answerer import Answerer
from qadeploy.inference.bundle import CARD, MODEL, TOKENIZER, Bundle, check_place, open_bundle, seal, writing_bundle
from qadeploy.inference.bundle_card import bundle_card
from qadeploy.inference.graph_model import GraphModel, Outputs
from qadeploy.integrations.onnx_standalone import span_head, text_graph
from qadeploy.integrations.onnx_standalone.span_head import SpanHead, add_span_head
from qadeploy.integrations.onnx_standalone.text_graph import text_model
from qadeploy.integrations.onnx_standalone.wordpiece import WordPiece, read_wordpiece, special_tokens
from qadeploy.records import LOGIT_NAMES, Answer, Example, Window
from qadeploy.timing import spread

QUESTIONS = 64
_BATCH = 8
_SHORT = (96, 32)  # max_seq_len beside the question and doc_stride that cut contexts into several windows
_SCORE = 1e-4  # relative: one softmax is computed in float32, the other in float64
_NOTHING = Answer("", -1, -1, 0.0)


# ---------------------------------------------------------------- spans


@dataclass(frozen=True, slots=True)
class SpanProof:
    """The head compared with the decoder: ``spans`` on ``windows``, of which ``different`` had other spans or another order.

    A window counts once alone and, if the model can run padded batches, once in a batch.
    ``score_difference`` is the largest absolute difference of any span's probability in its window.
    """

    windows: int
    spans: int
    different: int
    score_difference: float


@dataclass(frozen=True, slots=True, eq=False)
class Placed:
    """A window and its context."""

    window: Window
    context: EncodedText


def cut_windows(
    encoder: Encoder, settings: QaSettings, examples: Sequence[Example], most: int | None = None
) -> Iterator[Placed]:
    """The windows of real questions, cut as the settings say, except that every third context is cut into short windows.

    At most the first ``most`` of each question. A question that leaves no room for its context has none.
    """
    for i, example in enumerate(examples):
        question, context = encoder.encode(example.question), encoder.encode(example.context)
        seq, stride = settings.max_seq_len, settings.doc_stride
        try:
            if i % 3 == 0 and encoder.room(question, seq) > 2 * _SHORT[1]:
                seq, stride = min(seq, len(question) + _SHORT[0]), min(stride, _SHORT[1])
            windows = encoder.windows(question, context, max_seq_len=seq, doc_stride=stride)
        except InputError:
            continue
        yield from (Placed(window, context) for window in windows[:most])


def compare_spans(model: GraphModel, head: SpanHead, cuts: Sequence[Placed], pad_token_id: int) -> SpanProof:
    """Runs windows alone and, if the model takes a mask, in padded batches; decodes the logits of the same runs."""
    batches = [[cut] for cut in cuts]
    if "attention_mask" in model.inputs:
        batches += [list(cuts[i : i + _BATCH]) for i in range(0, len(cuts), _BATCH)]
    windows = spans = different = 0
    apart = 0.0
    for batch in batches:
        held = [cut.window for cut in batch]
        masks = pad_context_masks(held, [cut.context for cut in batch])
        out = model.run({**pad_batch(held, pad_token_id), CONTEXT_MASK: masks})
        for i, cut in enumerate(batch):
            same, count, difference = _compare_window({name: value[i] for name, value in out.items()}, cut, head)
            windows, spans, different = windows + 1, spans + count, different + (not same)
            apart = max(apart, difference)
    return SpanProof(windows, spans, different, apart)


def _compare_window(out: Outputs, cut: Placed, head: SpanHead) -> tuple[bool, int, float]:
    """Whether the head finds the decoder's spans, how many there are, and the largest difference of a probability."""
    window, context = cut.window, cut.context
    logits = [out[name] - (out[name][window.null_index] if head.relative_to_null else 0) for name in LOGIT_NAMES]
    decoded = decode(
        WindowLogits([window], logits[:1], logits[1:], context),
        top_k=head.top_k,
        max_answer_len=head.max_answer_len,
        temperature=head.temperature,
    )
    shift = window.context_offset - window.context_begin
    found: dict[tuple[int, int], tuple[int, int, float]] = {}  # the decoder counts spans of the same text once
    valid = out["span_starts"] >= 0
    for logit, first, last in zip(*(out[name][valid] for name in span_head.OUTPUTS[:3]), strict=True):
        own = int(first) + shift, int(last) + shift
        if not 0 <= own[0] <= own[1] < len(context):
            return False, 0, 0.0
        text = context.visible(int(context.offsets[own[0], 0]), int(context.offsets[own[1], 1]))
        found.setdefault(text, (*own, float(logit)))
    theirs = [(span.start_token, span.end_token, span.logit) for span in decoded.spans]
    ours = list(found.values())
    complete = bool(valid.all()) or len(ours) == len(theirs)
    same = complete and ours == theirs[: len(ours)] and float(out["null_scores"][0]) == decoded.null_logit
    scores = [float(np.exp(logit / head.temperature - out["log_sum"][0])) for *_, logit in ours]
    apart = [abs(a - b.score) for a, b in zip(scores, decoded.spans, strict=False)]
    return same, len(ours), max(apart, default=0.0)


def spans_in_graph(
    source: Bundle, out: Path, examples: Sequence[Example], *, top_k: int = span_head.DEFAULT_TOP_K
) -> Bundle:
    """Writes ``out``, the bundle ``source`` with a span head, and returns it, verified.

    Raises InputError on ``top_k`` below 1 or if no question can be asked, FailureError on a model that cannot have a head,
    GateError if the head and the decoder differ on a window of ``examples``; ``out`` is then left unchanged.
    """
    if source.in_graph:
        raise FailureError(
            f"{source.folder}: has its {source.in_graph} in the graph already: give the bundle that it was made from, "
            f"{source.manifest['made']['from']}"
        )
    encoder = source.load_encoder()
    head = SpanHead.of(encoder, source.settings, top_k)
    made = add_span_head(source.read(MODEL), head)
    model = GraphModel(made, source.checked.session)
    cuts = list(cut_windows(encoder, source.settings, spread(examples, QUESTIONS)))
    if not cuts:
        raise _nothing_asked(out)
    proof = compare_spans(model, head, cuts, source.encoder.pad_token_id)
    if proof.different or not proof.score_difference <= _SCORE:
        raise GateError(
            f"{out}: the spans of the graph differ from the decoder's on {proof.different} of {proof.windows} windows, scores "
            f"by up to {proof.score_difference:.1e}: it was not written; export the model again, or serve {source.name}"
        )
    usage = [
        f"The graph returns the {head.top_k} best spans of each window by itself, for callers without Python: it takes "
        "`context_mask` besides the model's inputs, 1 at the tokens of the context."
    ]
    return _write(source, out, made, model, {"kind": "spans", **head.to_dict()}, asdict(proof), usage)


# ---------------------------------------------------------------- text


@dataclass(frozen=True, slots=True)
class TextProof:
    """The text model compared with the Answerer: of ``questions``, how many best spans are ``equal`` (text and place).

    ``skipped`` questions are not counted: their question or context contains the name of a special token, which the graph
    reads as plain text. ``score_difference`` is the largest absolute difference of a score.
    """

    questions: int
    equal: int
    skipped: int
    score_difference: float


def ask(model: GraphModel, question: str, context: str) -> Answer:
    """Asks a text model one question. Start and end are -1 if it found no answer."""
    out = model.run({"question": [question], "context": [context]})
    answer, score, start, end = (out[name][0] for name in text_graph.OUTPUTS[:4])
    return Answer(str(answer), int(start), int(end), float(score))


def compare_answers(
    model: GraphModel, answerer: Answerer, examples: Sequence[Example], special: Sequence[str]
) -> TextProof:
    """Asks both the same questions, except those with a ``special`` token in a text. An InputError counts as no answer."""
    asked = [e for e in examples if not any(token in e.question + e.context for token in special)]
    equal, apart = 0, 0.0
    for example in asked:
        try:
            theirs = [*answerer.answer(example.question, example.context, allow_no_answer=False), _NOTHING][0]
        except InputError:
            theirs = _NOTHING
        ours = ask(model, example.question, example.context)
        equal += (ours.text, ours.start, ours.end) == (theirs.text, theirs.start, theirs.end)
        apart = max(apart, abs(ours.score - theirs.score))
    return TextProof(len(asked), equal, len(examples) - len(asked), apart)


def strings_in_graph(
    source: Bundle,
    out: Path,
    examples: Sequence[Example],
    *,
    usage: Sequence[str] = (),
    entries: Mapping[str, Any] = MappingProxyType({}),
    files: Mapping[str, bytes] = MappingProxyType({}),
) -> Bundle:
    """Writes ``out``, the bundle ``source`` as one text-in, answer-out model, and returns it, verified.

    ``usage`` are further lines of the card, ``entries`` of the manifest, and ``files`` further files by name.

    Raises InputError if its tokenizer is not BERT's WordPiece or no question can be asked, FailureError on a model that cannot
    be embedded, GateError if an answer to ``examples`` differs from the Answerer's; ``out`` is then left unchanged.
    """
    tokenizer, pieces = wordpiece_of(source)
    answerer = Answerer.load(source.folder, device="cpu", threads=1)
    made = text_model(source.read(MODEL), pieces, answerer.encoder, source.settings)
    model = GraphModel(made, source.checked.session)
    proof = compare_answers(model, answerer, spread(examples, QUESTIONS), special_tokens(tokenizer))
    if not proof.questions:
        raise _nothing_asked(out)
    if proof.equal < proof.questions or not proof.score_difference <= _SCORE:
        raise GateError(
            f"{out}: {proof.questions - proof.equal} of {proof.questions} answers of the graph differ from the Answerer's, scores "
            f"by up to {proof.score_difference:.1e}: it was not written; use --spans-in-graph"
        )
    usage = [
        *usage,
        "One file takes texts and returns the answer, in any language with ONNX Runtime: inputs `question` and `context`, one "
        "string each; outputs `answer`, `score`, `start`, `end` (code points) and `null_difference`.",
    ]
    return _write(source, out, made, model, {"kind": "text"}, asdict(proof), usage, entries, files)


def wordpiece_of(source: Bundle) -> tuple[Tokenizer, WordPiece]:
    """A bundle's tokenizer, and its tables for a graph. Raises InputError if it is not BERT's WordPiece."""
    tokenizer = Tokenizer.from_str(source.read(TOKENIZER).decode("utf-8"))
    return tokenizer, read_wordpiece(tokenizer)


# ---------------------------------------------------------------- the bundle


def add_in_graph(
    source: Bundle,
    place: Path,
    examples: Sequence[Example],
    *,
    spans: int | None = None,
    strings: bool = False,
    say: Callable[[str], object] = lambda _: None,
) -> list[Bundle]:
    """Writes ``PLACE-spans`` with ``spans`` spans per window, and ``PLACE-text`` if ``strings``; returns the bundles."""
    made = []
    for end in [*(["-spans"] if spans is not None else []), *(["-text"] if strings else [])]:
        check_place(place.with_name(place.name + end))
    if spans is not None:
        made.append(spans_in_graph(source, place.with_name(f"{place.name}-spans"), examples, top_k=spans))
        count = made[-1].manifest["made"]["proof"]["windows"]
        say(
            f"{made[-1].folder}: {spans} spans per window from the graph itself, equal to the decoder's on all {count} windows"
        )
    if strings:
        made.append(strings_in_graph(source, place.with_name(f"{place.name}-text"), examples))
        count = made[-1].manifest["made"]["proof"]["questions"]
        say(
            f"{made[-1].folder}: text in, answer out in one file; its answers to all {count} questions equal the Answerer's"
        )
    return made


def _nothing_asked(out: Path) -> InputError:
    return InputError(f"{out}: none of the questions can be asked, so nothing can be checked: give --eval-data FILE")


def _write(
    source: Bundle,
    out: Path,
    model: bytes,
    loaded: GraphModel,
    in_graph: dict[str, Any],
    proof: dict[str, Any],
    usage: Sequence[str],
    entries: Mapping[str, Any] = MappingProxyType({}),
    files: Mapping[str, bytes] = MappingProxyType({}),
) -> Bundle:
    kept = {name: value for name, value in source.manifest.items() if name not in {"schema", "files"}}
    manifest = {
        **kept,
        "name": out.name,
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "made": {"graph": in_graph["kind"], "from": source.name, "from_sha256": source.hash, "proof": proof},
        "in_graph": in_graph,
        "inputs": list(loaded.inputs),
        "outputs": list(loaded.outputs),
        **entries,
    }
    with writing_bundle(out) as work:
        (work / MODEL).write_bytes(model)
        (work / TOKENIZER).write_bytes(source.read(TOKENIZER))
        write_text(work / CARD, bundle_card(out.name, manifest, usage))
        for name, data in files.items():
            (work / name).write_bytes(data)
        seal(work, manifest)
    return open_bundle(out)

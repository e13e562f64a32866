"""Text in, answer out: a WordPiece model, its tokenizer and the decoder as one ONNX file of ONNX Runtime's own operators.

Inputs: ``question`` and ``context``, a string ``[1]`` each. Outputs, ``[1]`` each:

    answer           string   the best answer, cut out of the context
    score            float32  its probability, equal to the Answerer's
    start, end       int64    its place in the context in code points, the end exclusive; -1 if there is none
    null_difference  float32  the null logit minus the best span's: "no answer" if it exceeds the null threshold

Without an answer (no token in the context, or a question that leaves no room for it) the answer is empty and the score 0.
The score is NaN if the model's logits are.

Characters come from com.microsoft's ``Tokenizer``, symbols and tokens from look-ups in the tables of ``wordpiece``; the
model is the body of a loop over the windows, each alone and unpadded as in the Answerer, so the logits are equal.
onnxruntime-extensions is not used: its BertTokenizer (0.15.2) counts offsets in a different text than the given one,
splits letters differently from BERT's own tokenizer, and cannot be loaded from JavaScript.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import onnx
from onnx import TensorProto, defs, helper

from qadeploy.core.bm25 import K1, B
from qadeploy.core.settings import QaSettings
from qadeploy.core.windows import Encoder
from qadeploy.errors import FailureError, InputError
from qadeploy.integrations.onnx_standalone.nodes import Nodes, default_opset
from qadeploy.integrations.onnx_standalone.wordpiece import SPACE, WordPiece
from qadeploy.records import LOGIT_NAMES

INPUTS = ("question", "context")
_OPSET, _OLDEST = 20, 18  # StringConcat is new in 20
# Operators whose newer versions, up to 20, accept more types and options but have the same meaning
# (https://github.com/onnx/onnx/blob/main/docs/Changelog.md).
_WIDENED = frozenset({
    "Cast", "CastLike", "Constant", "ConstantOfShape", "DequantizeLinear", "Equal", "Flatten", "Identity", "If", "IsInf",
    "IsNaN", "Loop", "Pad", "QuantizeLinear", "ReduceMax", "ReduceMin", "Reshape", "Scan", "Shape", "Size",
})  # fmt: skip
_KINDS = {
    "answer": TensorProto.STRING,
    "score": TensorProto.FLOAT,
    "start": TensorProto.INT64,
    "end": TensorProto.INT64,
    "null_difference": TensorProto.FLOAT,
}
OUTPUTS = tuple(_KINDS)


def text_model(model: bytes, pieces: WordPiece, encoder: Encoder, settings: QaSettings) -> bytes:
    """The model as text in, answer out. ``pieces`` are the tables of the encoder's tokenizer.

    Raises FailureError on a model that cannot be the body of the loop, InputError if the context comes first.
    """
    if encoder.config.context_first:
        raise InputError("strings-in-graph: this model takes the context before the question: use spans-in-graph")
    proto = onnx.load_model_from_string(model)
    _raise_opset(proto)
    n = Nodes("text/")
    characters = [_characters(n, name) for name in INPUTS]
    ids, begins, ends = _tokenise(n, pieces, *characters)
    table, null = _read(n, proto.graph, encoder, settings, *ids)
    _answer(n, settings, table, null, begins, ends, characters[1])
    texts = [helper.make_tensor_value_info(name, TensorProto.STRING, [1]) for name in INPUTS]
    found = [helper.make_tensor_value_info(name, kind, [1]) for name, kind in _KINDS.items()]
    graph = helper.make_graph(n.nodes, "text", texts, found, n.constants)
    domains = {o.domain: o.version for o in proto.opset_import} | {"ai.onnx.ml": 3}
    domains.setdefault("com.microsoft", 1)
    made = helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid(*entry) for entry in domains.items()],
        ir_version=max(9, proto.ir_version),
        producer_name="qadeploy",
    )
    return bytes(made.SerializeToString())


def _raise_opset(proto: onnx.ModelProto) -> None:
    """Raises the opset to at least 20. Raises FailureError if that would change the meaning of the model's own nodes."""
    opset = default_opset(proto)
    if opset < _OLDEST:
        raise FailureError(f"the model's operators are of opset {opset}, a text model needs {_OLDEST}: export it again")
    for node in proto.graph.node if opset < _OPSET else ():
        if node.domain in {"", "ai.onnx"} and node.op_type not in _WIDENED:
            versions = {defs.get_schema(node.op_type, each, "").since_version for each in (opset, _OPSET)}
            if len(versions) > 1:
                raise FailureError(
                    f"the model's {node.op_type} has another meaning in opset {_OPSET}, which a text model needs: "
                    "use spans-in-graph"
                )
    for entry in proto.opset_import:
        if entry.domain in {"", "ai.onnx"}:
            entry.domain, entry.version = "", max(opset, _OPSET)


def _characters(n: Nodes, text: str) -> str:
    """``[characters]``: a text cut into its code points."""
    cut = n("Tokenizer", text, domain="com.microsoft", mark=0, mincharnum=1, pad_value="", separators=[""])
    return n("Squeeze", cut, n.constant([0]))


def _size(n: Nodes, value: str) -> str:
    """``[1]``: the length of a vector."""
    return n("Shape", value, start=0, end=1)


def _tokenise(n: Nodes, pieces: WordPiece, question: str, context: str) -> tuple[tuple[str, str], str, str]:
    """Token ids of both texts, and where the context's tokens begin and end in the context, in code points."""
    zero, one = n.constant([0]), n.constant([1])
    gap = n.constant([" "], str)
    every = n("Concat", question, gap, context, gap, axis=0)
    row = n(
        "LabelEncoder",
        every,
        domain="ai.onnx.ml",
        keys_strings=list(pieces.characters),
        values_int64s=list(pieces.characters.values()),
        default_int64=0,
    )
    # Symbols: one character may become several, or none.
    wide = n("Gather", n.constant(pieces.rows), row, axis=0)
    count = _size(n, every)
    places = n("Range", n.constant(0), n("Squeeze", count), n.constant(1))
    place = n("Expand", n("Unsqueeze", places, one), n("Shape", wide))
    flat, place = (n("Reshape", value, n.constant([-1])) for value in (wide, place))
    there = n("Squeeze", n("NonZero", n("GreaterOrEqual", flat, n.constant(0))), zero)
    symbol, place = (n("Gather", value, there) for value in (flat, place))
    size = _size(n, symbol)

    # Words: runs of letters, and characters that stand alone.
    space = n("Equal", symbol, n.constant(SPACE))
    alone = n("Cast", n("Gather", n.constant(pieces.alone), symbol), to=TensorProto.BOOL)
    letter = n("Not", n("Or", space, alone))
    before = n("Concat", n.constant([False], np.bool_), n("Slice", letter, zero, n.constant([-1])), axis=0)
    begins = n("Or", alone, n("And", letter, n("Not", before)))
    number, length = _longest_pieces(n, pieces, symbol, begins, space, size)

    # The places where pieces begin, found by steps of the longest piece from each word's start; each round doubles the steps.
    position = n("Range", n.constant(0), n("Squeeze", size), n.constant(1))
    fails = n("Equal", length, n.constant(0))
    onward = n("Where", fails, size, n("Add", position, length))
    onward = n("Concat", onward, size, axis=0)  # there is no step from the end
    reached = n("Concat", n("Cast", begins, to=TensorProto.INT64), zero, axis=0)
    for _ in range(math.ceil(math.log2(pieces.longest_word + 1))):
        met = n("Where", n("Cast", reached, to=TensorProto.BOOL), onward, size)
        reached = n("ScatterElements", reached, met, n("Expand", one, n("Shape", met)), axis=0)
        onward = n("Gather", onward, onward)
    here = n("Cast", n("Slice", reached, zero, size), to=TensorProto.BOOL)
    here = n("And", here, n("Not", space))

    # A word that has no piece at some place, or is too long, is one unknown token.
    counted = n("CumSum", n("Cast", begins, to=TensorProto.INT64), n.constant(0))
    words = n("ReduceSum", n("Cast", begins, to=TensorProto.INT64), keepdims=1)
    word = n("Where", space, words, n("Sub", counted, one))
    none = n("Expand", zero, n("Add", words, one))
    lengths = n("ScatterElements", none, word, n("Expand", one, size), axis=0, reduction="add")
    failed = n("Cast", n("And", here, fails), to=TensorProto.INT64)
    failures = n("ScatterElements", none, word, failed, axis=0, reduction="add")
    broken = n("Or", n("Greater", failures, zero), n("Greater", lengths, n.constant(pieces.longest_word)))
    unknown = n("Gather", broken, word)
    token = n("Or", n("And", here, n("Not", unknown)), n("And", begins, unknown))
    chosen = n("Squeeze", n("NonZero", token), zero)
    ids = n("Gather", n("Where", unknown, n.constant(pieces.unknown_id), number), chosen)
    spread = n("Gather", n("Where", unknown, n("Gather", lengths, word), length), chosen)
    first = n("Gather", place, chosen)
    last = n("Gather", place, n("Sub", n("Add", chosen, spread), one))

    shift = n("Add", _size(n, question), one)
    question_size = n("ReduceSum", n("Cast", n("Less", first, shift), to=TensorProto.INT64), keepdims=1)
    total = _size(n, ids)
    own = n("Slice", ids, zero, question_size)
    read = n("Slice", ids, question_size, total)
    starts = n("Sub", n("Slice", first, question_size, total), shift)
    stops = n("Add", n("Sub", n("Slice", last, question_size, total), shift), one)
    return (own, read), starts, stops


def _longest_pieces(n: Nodes, pieces: WordPiece, symbol: str, begins: str, space: str, size: str) -> tuple[str, str]:
    """``[symbols]``: id and length of the longest piece that begins at each symbol; the length is 0 if there is none."""
    # A piece ends with its word: the symbols after the word become unknown letters, which no piece contains.
    inner = n("Where", n("Or", begins, space), n.constant(0), symbol)
    ahead = n("Concat", inner, n.constant(np.zeros(pieces.longest)), axis=0)
    states = n.constant(pieces.ids)
    state = n("Where", begins, n.constant(1), n("Where", space, n.constant(0), n.constant(2)))
    nothing = n("Expand", n.constant(0), n("Shape", symbol))

    b = Nodes("text/walk/")
    key = b("Add", b("Mul", "walk/state", b.constant(pieces.symbols)), "walk/symbol")
    following = b(
        "LabelEncoder",
        key,
        domain="ai.onnx.ml",
        keys_int64s=list(pieces.steps),
        values_int64s=list(pieces.steps.values()),
        default_int64=0,
    )
    done = b("Gather", states, following)
    hit = b("GreaterOrEqual", done, b.constant(0))
    step = b("Add", "walk/step", b.constant(1))
    number = b("Where", hit, done, "walk/number")
    length = b("Where", hit, step, "walk/length")
    begin = b("Reshape", step, b.constant([1]))
    symbols = b("Slice", ahead, begin, b("Add", begin, size))
    more = b("Greater", b("ReduceMax", following, keepdims=0), b.constant(0))
    vector = [(name, TensorProto.INT64, [None]) for name in ("walk/state", "walk/symbol", "walk/number", "walk/length")]
    body = _body(b, "walk/", vector, (more, following, symbols, number, length))
    found = n.many("Loop", n.constant(pieces.longest), "", state, symbol, nothing, nothing, outputs=4, body=body)
    return found[2], found[3]


def _body(
    b: Nodes,
    prefix: str,
    carried: Sequence[tuple[str, int, Sequence[int | None]]],
    results: tuple[str, ...],
    shapes: Sequence[onnx.ValueInfoProto] = (),
) -> onnx.GraphProto:
    """A loop's body: ``results`` are whether to go on, and the next values of ``carried``; ``shapes`` of values inside."""
    info = helper.make_tensor_value_info
    inputs = [
        info(f"{prefix}step", TensorProto.INT64, []),
        info(f"{prefix}on", TensorProto.BOOL, []),
        *(info(*each) for each in carried),
    ]
    kinds = [(TensorProto.BOOL, []), *((kind, shape) for _, kind, shape in carried)]
    outputs = [info(name, kind, shape) for name, (kind, shape) in zip(results, kinds, strict=True)]
    return helper.make_graph(b.nodes, prefix.rstrip("/"), inputs, outputs, b.constants, value_info=shapes)


def _read(
    n: Nodes, model: onnx.GraphProto, encoder: Encoder, settings: QaSettings, question: str, context: str
) -> tuple[str, str]:
    """The span table ``[context tokens, max_answer_len]`` and the least null logit, over all windows."""
    one, zero = n.constant([1]), n.constant([0])
    length, frame = settings.max_answer_len, encoder.frame
    total, question_size = _size(n, context), _size(n, question)
    room = n("Sub", n.constant([settings.max_seq_len - encoder.special_tokens]), question_size)
    fits = n("LessOrEqual", total, room)
    longest = min(settings.long_seq_len or settings.max_seq_len, settings.max_seq_len)
    shorter = n("Sub", room, n.constant([settings.max_seq_len - longest]))
    stride = n.constant([settings.doc_stride * longest // settings.max_seq_len])
    short = n("And", n("Not", fits), n("Greater", shorter, stride))
    room = n("Where", short, shorter, room)
    stride = n("Where", short, stride, n.constant([settings.doc_stride]))
    stride = n("Where", n("Less", stride, room), stride, n("Div", room, n.constant([2])))
    step = n("Max", n("Sub", room, stride), one)
    more = n("Div", n("Sub", n("Add", n("Sub", total, room), step), one), step)
    # Python raises an error if no question allows doc_stride.
    several = n("Add", more, one) if settings.doc_stride < settings.max_seq_len else zero
    windows = n("Where", fits, n("Min", total, one), several)
    windows = n("Where", n("Less", room, one), zero, windows)
    shifts = _shifts(n, encoder, settings, question, context, (windows, step, room)) if settings.bm25_weight else ""
    nothing = n.constant(-np.inf, np.float32)
    table = n("Expand", nothing, n("Concat", total, n.constant([length]), axis=0))

    b = Nodes("text/read/")
    b0, b1 = b.constant([0]), b.constant([1])
    begin = b("Mul", b("Reshape", "read/step", b1), step)
    end = b("Min", b("Add", begin, room), total)
    size = b("Sub", end, begin)
    piece = b("Slice", context, begin, end)
    ids = b(
        "Concat", b.constant(frame.before), question, b.constant(frame.between), piece, b.constant(frame.after), axis=0
    )
    parts = [b("Expand", b.constant(part), each) for part, each in zip(frame.parts, (question_size, size), strict=True)]
    special = [b.constant(each) for each in frame.types]
    types = b("Concat", special[0], parts[0], special[1], parts[1], special[2], axis=0)
    values = {"input_ids": ids, "token_type_ids": types, "attention_mask": b("Expand", b1, b("Shape", ids))}
    for each in model.input:
        if each.name not in values:
            raise FailureError(f"the model takes {each.name}, which a text model does not know: use spans-in-graph")
        kind = each.type.tensor_type.elem_type
        b("Cast", b("Unsqueeze", values[each.name], b0), to=kind, out=each.name)
    b.nodes.extend(model.node)
    b.constants.extend(model.initializer)
    # The rows of the table that this window covers: its spans, if they are better than those of earlier windows.
    first = b("Add", b.constant([len(frame.before) + len(frame.between)]), question_size)
    row = [b("Squeeze", b("Cast", name, to=TensorProto.FLOAT), b0) for name in LOGIT_NAMES]
    asked_at = encoder.windows(encoder.encode("what"), encoder.encode("a"), max_seq_len=encoder.config.position_limit)
    at = b.constant(asked_at[0].null_index)
    if settings.relative_to_null:
        row = [b("Sub", each, b("Gather", each, at)) for each in row]
    starts, ends = (b("Slice", each, first, b("Add", first, size)) for each in row)
    if shifts:
        shift = b("Gather", shifts, "read/step")
        starts, ends = b("Add", starts, shift), b("Add", ends, shift)
    beyond = b("Concat", ends, b.constant(np.full(length - 1, -np.inf), np.float32), axis=0)
    positions = b("Range", b.constant(0), b("Squeeze", size), b.constant(1))
    band = b("Add", b("Unsqueeze", positions, b1), b.constant([np.arange(length)]))
    spans = b("Add", b("Unsqueeze", starts, b1), b("Gather", beyond, band))
    best = b("Max", b("Slice", "read/table", begin, end), spans)
    above, below = b("Slice", "read/table", b0, begin), b("Slice", "read/table", end, total)
    merged = b("Concat", above, best, below, axis=0)
    null = b("Min", "read/null", b("Add", *(b("Gather", each, at) for each in row)))
    on = b("Identity", "read/on")
    carried = [("read/table", TensorProto.FLOAT, [None, length]), ("read/null", TensorProto.FLOAT, [])]
    # Only with the shapes that the model states does ONNX Runtime fuse in it what it fuses in the bundle's.
    body = _body(b, "read/", carried, (on, merged, null), [*model.input, *model.value_info])
    worst = n.constant(np.inf, np.float32)
    found = n.many("Loop", n("Squeeze", windows), n.constant(True, np.bool_), table, worst, outputs=2, body=body)
    return found[0], found[1]


def _shifts(
    n: Nodes, encoder: Encoder, settings: QaSettings, question: str, context: str, cut: tuple[str, str, str]
) -> str:
    """What ``bm25_weight`` adds to the start and to the end logits of each window, ``[windows]``, or ``[1]`` if there is none.

    ``cut`` is the number of windows, the tokens between their beginnings, and the tokens that a window holds.
    """
    zero, one, double = n.constant([0]), n.constant([1]), TensorProto.DOUBLE
    windows, step, room = cut
    frame = encoder.frame
    special = [n.constant(each) for each in (frame.before, frame.between, frame.after)]
    (terms,) = n.many("Unique", n("Concat", special[0], question, *special[1:], axis=0))
    found = n("Equal", n("Unsqueeze", terms, one), n("Unsqueeze", context, zero))
    before = n("CumSum", n("Cast", found, to=TensorProto.INT64), n.constant(1))
    before = n("Concat", n("Expand", zero, n("Concat", _size(n, terms), one, axis=0)), before, axis=1)
    numbers = n("Range", n.constant(0), n("Squeeze", n("Max", windows, one)), n.constant(1))
    begins = n("Mul", numbers, step)
    ends = n("Max", n("Min", n("Add", begins, room), _size(n, context)), begins)
    lengths = n("Cast", n("Sub", ends, begins), to=double)
    average = n("Max", n("ReduceMean", lengths, keepdims=1), n.constant([1], np.float64))
    norms = n("Div", n("Mul", lengths, n.constant([K1 * B], np.float64)), average)
    norms = n("Add", norms, n.constant([K1 * (1 - B)], np.float64))
    counts = n("Cast", n("Sub", *(n("Gather", before, each, axis=1) for each in (ends, begins))), to=double)
    holding = n("Greater", counts, n.constant(0, np.float64))
    holding = n("Add", n("ReduceSum", n("Cast", holding, to=double), one, keepdims=1), n.constant(0.5, np.float64))
    rest = n("Sub", n("Add", n("Cast", _size(n, numbers), to=double), n.constant(1, np.float64)), holding)
    idf = n("Log", n("Add", n("Div", rest, holding), n.constant(1, np.float64)))
    shares = n("Div", n("Mul", counts, n.constant(K1 + 1, np.float64)), n("Add", counts, norms))
    scores = n("ReduceSum", n("Mul", idf, shares), zero, keepdims=0)
    less = n("Sub", scores, n("ReduceMax", scores, keepdims=1))
    return n("Cast", n("Mul", less, n.constant(settings.bm25_weight / 2, np.float64)), to=TensorProto.FLOAT)


def _answer(n: Nodes, settings: QaSettings, table: str, null: str, begins: str, ends: str, characters: str) -> None:
    """The graph's outputs: the best cell of the table, its probability and its text."""
    zero, one, double = n.constant([0]), n.constant([1]), TensorProto.DOUBLE
    nothing, length = n.constant([-np.inf], np.float32), n.constant(settings.max_answer_len)
    # One more cell, chosen if no other is valid; its start and end are -1.
    flat = n("Concat", n("Reshape", table, n.constant([-1])), nothing, axis=0)
    best = n("ArgMax", flat, axis=0, keepdims=1)
    logit = n("Gather", flat, best)
    there = n("Not", n("Equal", logit, nothing))
    best = n("Where", there, best, n("Sub", _size(n, flat), one))
    peak = n("Where", there, logit, n.constant([0], np.float32))
    apart = n("Sub", n("Cast", flat, to=double), n("Cast", peak, to=double))
    weights = n("Exp", n("Div", apart, n.constant(settings.temperature, np.float64)))
    share = n("Reciprocal", n("ReduceSum", weights, keepdims=1))
    n("Where", there, n("Cast", share, to=TensorProto.FLOAT), n.constant([0], np.float32), out="score")
    first = n("Div", best, length)
    last = n("Add", first, n("Mod", best, length))
    nowhere = n.constant([-1])
    start = n("Gather", n("Concat", begins, nowhere, axis=0), first, out="start")
    end = n("Gather", n("Concat", ends, nowhere, axis=0), last, out="end")
    n("Where", there, n("Sub", null, peak), n.constant([np.inf], np.float32), out="null_difference")

    # Characters are joined in pairs until one text is left.
    letters = n("Slice", characters, n("Max", start, zero), n("Max", end, zero))
    letters = n("Concat", letters, n.constant([""], str), axis=0)
    b = Nodes("text/join/")
    size = _size(b, "join/letters")
    padded = b("Concat", "join/letters", b.constant([""], str), axis=0)
    twos = b.constant([2])
    left = b("Slice", "join/letters", b.constant([0]), size, b.constant([0]), twos)
    right = b("Slice", padded, b.constant([1]), b("Add", size, b.constant([1])), b.constant([0]), twos)
    joined = b("StringConcat", left, right)
    more = b("Squeeze", b("Greater", _size(b, joined), b.constant([1])))
    body = _body(b, "join/", [("join/letters", TensorProto.STRING, [None])], (more, joined))
    text = n("Loop", "", n.constant(True, np.bool_), letters, body=body)
    n("Reshape", text, one, out="answer")

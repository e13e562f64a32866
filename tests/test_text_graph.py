"""Text in, answer out: the graph's tokens against tokenizers', its answers against the Answerer's, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from hypothesis import assume, given
from onnx import TensorProto, helper, numpy_helper
from tokenizers import Tokenizer, normalizers

from qadeploy import Answerer
from qadeploy.cli import main
from qadeploy.core.settings import Options, QaSettings
from qadeploy.core.windows import Encoder
from qadeploy.data.loading import read
from qadeploy.errors import BundleError, FailureError, GateError, InputError
from qadeploy.inference.bundle import MODEL, TOKENIZER, newest_bundle, open_bundle, seal
from qadeploy.inference.graph_model import GraphModel
from qadeploy.integrations.onnx_standalone.in_graph import ask, compare_answers, strings_in_graph
from qadeploy.integrations.onnx_standalone.text_graph import OUTPUTS, text_model
from qadeploy.integrations.onnx_standalone.wordpiece import WordPiece, check_wordpiece, read_wordpiece, special_tokens
from qadeploy.records import Example
from tests.cli_for_tests import run
from tests.conftest import sealed_copy, triplets
from tests.models_for_tests import optimized
from tests.tokenizers_for_tests import CORPUS, family, texts, thorough

NORMALISERS = {
    "uncased": normalizers.BertNormalizer(lowercase=True),
    "cased": normalizers.BertNormalizer(lowercase=False),
    "cased without accents": normalizers.BertNormalizer(lowercase=False, strip_accents=True),
    "uncased, Chinese in words": normalizers.BertNormalizer(lowercase=True, handle_chinese_chars=False),
}


def bert(normaliser: str = "uncased") -> Tokenizer:
    tokenizer = Tokenizer.from_str(family("bert").tokenizer.to_str())
    tokenizer.normalizer = NORMALISERS[normaliser]
    return tokenizer


@cache
def uncased() -> WordPiece:
    return read_wordpiece(bert())


# In place of a model: if the question has n tokens, the best answer is the n-th token of the context, with the logits 0 and 0;
# the null logit is a checksum of all ids.
POINTER = """
<ir_version: 9, opset_import: ["" : 20]>
pointer (int64[batch, tokens] input_ids, int64[batch, tokens] token_type_ids)
    => (float[batch, tokens] start_logits, float[batch, tokens] end_logits)
<int64 zero = {0}, int64 one = {1}, int64 two = {2}, int64 three = {3}, int64 prime = {4194301}, float none = {0},
 int64[1] axis = {0}>
{
  size = Size (input_ids)
  places = Range (zero, size, one)
  in_question = Sub (one, token_type_ids)
  first = ReduceSum <keepdims = 0> (in_question)
  twice = Mul (first, two)
  nth = Sub (twice, three)
  last = Sub (size, two)
  target = Clip (nth, first, last)
  apart = Sub (places, target)
  far = Abs (apart)
  farness = Cast <to = 1> (far)
  nearness = Neg (farness)
  weights = Add (places, one)
  weighted = Mul (input_ids, weights)
  total = ReduceSum <keepdims = 0> (weighted)
  rest = Mod (total, prime)
  checksum = Cast <to = 1> (rest)
  null = Equal (places, zero)
  starts = Where (null, checksum, nearness)
  ends = Where (null, none, nearness)
  start_logits = Unsqueeze (starts, axis)
  end_logits = Unsqueeze (ends, axis)
}
"""


@cache
def pointer(normaliser: str) -> GraphModel:
    """A text model with ``POINTER`` as its model and one window for any text."""
    tokenizer = bert(normaliser)
    encoder = Encoder(tokenizer, family("bert").config)
    one_window = QaSettings(max_seq_len=10**6, doc_stride=0, max_answer_len=1)
    model = onnx.parser.parse_model(POINTER).SerializeToString()
    return GraphModel(text_model(model, read_wordpiece(tokenizer), encoder, one_window))


def same_tokens(normaliser: str, question: str, context: str) -> None:
    """All ids equal those of tokenizers, and so do the offsets of all tokens of the context, or of fifty of them."""
    model, pair = pointer(normaliser), bert(normaliser).encode(question, context)
    offsets = bert(normaliser).encode(context, add_special_tokens=False).offsets
    found = model.run({"question": [question], "context": [context]})
    if not offsets:
        assert found["start"] == -1
        return
    checksum = sum(number * place for place, number in enumerate(pair.ids, 1)) % 4194301
    assert found["null_difference"] == checksum
    for nth in range(1, len(offsets) + 1, -(-len(offsets) // 50)):
        found = model.run({"question": ["the " * nth], "context": [context]})
        assert (found["start"][0], found["end"][0]) == offsets[nth - 1]


# ---------------------------------------------------------------- tokens


@pytest.mark.parametrize("normaliser", NORMALISERS)
@thorough
@given(question=texts(4), context=texts(20))
def test_tokens_and_offsets_are_those_of_tokenizers(normaliser, question, context):
    assume(not any(token in question + context for token in special_tokens(bert())))
    same_tokens(normaliser, question, context)


@pytest.mark.parametrize("normaliser", NORMALISERS)
def test_tokens_of_many_scripts_in_one_text(normaliser):
    same_tokens(normaliser, "".join(CORPUS), "\n".join(CORPUS))


@pytest.mark.parametrize(
    "text",
    [
        "",
        " \t\n",
        "x" * 100 + " " + "x" * 101 + " y",  # a word may have 100 symbols
        "the" * 34,  # many pieces in a word, and 102 symbols
        "the" * 33 + "\u0301",  # of which the accent is none
        "unknown☃inside, ☃ alone and ⸘isolated⸘",
        "a\u00adb\u200bc\ufffdd\x00e f\u0085g",
        "cafe\u0301 and e\u0301\u0302 alone \u0301",
        "ﬁve İstanbul ǅ ß ΣΑΣ ς",
        "\U0010fffd private \ue000 \U000e0001 tag \U0002f800 compatible \U00020000",
        "한국어 각 \u1112\u1161\u11ab",
        "½ ① ₤5 #hash ##s _under_ ^a` $5~ <b>|c|</b>",
    ],
)
@pytest.mark.parametrize("normaliser", ["uncased", "cased"])
def test_tokens_of_odd_texts(normaliser, text):
    same_tokens(normaliser, "the", text)
    same_tokens(normaliser, text, f"{text} the {text}")


def test_each_code_point_is_tokenised_as_tokenizers_does():
    """A sample of all code points, assigned or not: every tenth in the first planes, fewer in the others."""
    codes = [*range(1, 0xD800, 10), *range(0xE000, 0x30000, 10), *range(0x30000, 0x110000, 997)]
    assert len(codes) > 20_000
    for begin in range(0, len(codes), 4000):
        same_tokens("uncased", "the", " ".join(f"a{chr(code)}b" for code in codes[begin : begin + 4000]))


@pytest.mark.parametrize(
    ("name", "kind"), [("roberta", "BPE"), ("xlm-r", "Unigram"), ("deberta-v2", "Unigram with the normalizer Sequence")]
)
def test_other_tokenizers_are_named(name, kind):
    with pytest.raises(InputError, match=f"strings-in-graph: this model's tokenizer is {kind}.*use spans-in-graph"):
        check_wordpiece(family(name).tokenizer)


def test_a_tokenizer_that_keeps_blank_characters_is_named():
    tokenizer = bert()
    tokenizer.normalizer = normalizers.BertNormalizer(clean_text=False)
    with pytest.raises(InputError, match=r"makes a token of the blank character U\+001C"):
        read_wordpiece(tokenizer)


# ---------------------------------------------------------------- answers


@pytest.fixture(scope="module")
def text_of(tiny, tiny_export):
    """The text model of a tiny bundle, with other settings if given, and an Answerer with the same settings."""
    pieces = read_wordpiece(Tokenizer.from_file(str(tiny.bundle() / TOKENIZER)))

    def make(kind: str = "", **settings: object) -> SimpleNamespace:
        answerer = Answerer.load(tiny.bundle(kind), device="cpu", threads=1)
        answerer.settings = replace(answerer.settings, **settings)
        model = text_model(answerer.bundle.read(MODEL), pieces, answerer.encoder, answerer.settings)
        loaded = GraphModel(model, answerer.bundle.checked.session)
        return SimpleNamespace(answerer=answerer, model=loaded, proto=onnx.load_model_from_string(model))

    return make


def questions() -> list[Example]:
    rows = [(str(row["question"]), str(row["context"])) for row in triplets(16)]
    long = " ".join(context for _, context in rows) * 2  # several windows
    odd = [("Who keeps the bell?", "  \u00a0Ada\u0301 🚀 keeps the bell ; Ça, 北京.\n"), ("?", "a"), ("who", "☃")]
    return [Example(str(i), q, c) for i, (q, c) in enumerate([*rows, *((q, long) for q, _ in rows[:6]), *odd])]


@pytest.mark.parametrize("kind", ["", "fused", "int8"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"max_seq_len": 40, "doc_stride": 13, "max_answer_len": 4, "temperature": 2.5},
        {"max_seq_len": 40, "doc_stride": 13, "relative_to_null": True, "bm25_weight": 1.5},
        {"null_threshold": -100.0},  # to the Answerer, no context has an answer
        {"max_seq_len": 80, "doc_stride": 26, "relative_to_null": True, "bm25_weight": 1.5, "long_seq_len": 40},
    ],
)
def test_answers_are_the_answerers(kind, settings, text_of):
    made = text_of(kind, **settings)
    proof = compare_answers(made.model, made.answerer, questions(), ["[SEP]"])
    assert (proof.equal, proof.questions) == (25, 25)
    # Inside the loop ONNX Runtime fuses fewer nodes. That moves sums by a float's rounding, and on some CPUs an int8 activation
    # by a step, which has cost a score up to 6e-5; export refuses a model from 1e-4 on.
    assert proof.score_difference < (1e-4 if kind == "int8" else 1e-6)
    assert made.model.outputs == OUTPUTS


@pytest.mark.parametrize("relative", [False, True])
def test_the_null_difference_is_the_decoders(relative, text_of):
    made = text_of(max_seq_len=40, doc_stride=13, relative_to_null=relative)
    for example in questions()[::4]:
        decoded = made.answerer.read(example.question, example.context, Options()).decoded
        out = made.model.run({"question": [example.question], "context": [example.context]})
        assert out["null_difference"][0] == pytest.approx(decoded.null_difference, abs=1e-5)


@pytest.mark.parametrize(
    ("question", "context"),
    [
        ("Who?", ""),
        ("Who?", " \n\u200b"),
        ("who " * 300, "Ada keeps the lamp."),  # leaves no room
    ],
)
def test_without_an_answer_the_place_is_minus_one(question, context, text_of):
    made = text_of(max_seq_len=40, doc_stride=13, bm25_weight=0.5)
    out = made.model.run({"question": [question], "context": [context]})
    assert [out[name].tolist() for name in OUTPUTS] == [[""], [0.0], [-1], [-1], [np.inf]]


@pytest.mark.parametrize("room", [1, 2, 5, 13, 14])
def test_a_question_that_leaves_no_more_than_doc_stride_is_answered(room, text_of):
    made = text_of(max_seq_len=40, doc_stride=13)
    example = Example("a", "who " * (40 - 3 - room), "Ada keeps the lamp. " * 12)
    assert made.answerer.encoder.room(made.answerer.encoder.encode(example.question), 40) == room
    assert ask(made.model, example.question, example.context).text
    proof = compare_answers(made.model, made.answerer, [example], [])
    assert (proof.equal, proof.score_difference < 1e-6) == (1, True)


def test_a_doc_stride_that_no_question_allows_has_no_answer_if_it_is_needed(text_of):
    made = text_of(max_seq_len=40, doc_stride=40)
    examples = [Example("a", "Who?", "Ada keeps the lamp. " * n) for n in (1, 12)]
    assert [ask(made.model, e.question, e.context).start >= 0 for e in examples] == [True, False]
    assert compare_answers(made.model, made.answerer, examples, []).equal == 2


def test_broken_logits_show_in_the_score(bundle, tiny):
    answerer = Answerer.load(bundle, device="cpu", threads=1)
    proto = onnx.load_model_from_string(answerer.bundle.read(MODEL))
    bias = next(t for t in proto.graph.initializer if "qa_outputs.bias" in t.name)
    bias.CopyFrom(numpy_helper.from_array(np.array([0, np.nan], np.float32), bias.name))
    pieces = read_wordpiece(Tokenizer.from_file(str(bundle / TOKENIZER)))
    model = GraphModel(text_model(proto.SerializeToString(), pieces, answerer.encoder, answerer.settings))
    assert np.isnan(ask(model, "Who keeps the lamp?", "Ada keeps the lamp.").score)


def test_texts_with_special_tokens_are_left_out_of_the_comparison(text_of):
    made = text_of()
    example = Example("a", "Who keeps the lamp?", "Ada keeps the lamp. [SEP] Bela keeps the bell.")
    assert compare_answers(made.model, made.answerer, [example], ["[SEP]"]).skipped == 1
    assert ask(made.model, example.question, example.context).text == "Ada"


def test_the_file_is_a_sound_model_of_operators_that_onnx_runtime_has(text_of):
    proto = text_of("int8").proto
    assert {o.domain for o in proto.opset_import} == {"", "ai.onnx.ml", "com.microsoft"}
    assert [(i.name, i.type.tensor_type.elem_type) for i in proto.graph.input] == [
        ("question", TensorProto.STRING),
        ("context", TensorProto.STRING),
    ]
    onnx.checker.check_model(proto)


def nodes_of(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """The nodes of a graph and of the bodies of its loops."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            yield from nodes_of(attribute.g)


@pytest.mark.parametrize("kind", ["", "int8"])
def test_onnx_runtime_fuses_the_same_in_a_text_model_as_in_its_bundle(kind, text_of):
    """Without the shapes that the model states, GELU had no bias and no normalisation was fused with the sum before it."""
    made = text_of(kind)
    models = made.answerer.bundle.read(MODEL), made.proto.SerializeToString()
    counts = [Counter(node.op_type for node in nodes_of(optimized(model))) for model in models]
    fused = [name for name in counts[0] if name.endswith(("Gelu", "LayerNormalization")) or "MatMul" in name]
    assert {name: counts[1][name] for name in fused} == {name: counts[0][name] for name in fused}
    assert counts[0]["BiasGelu"] or counts[0]["SkipLayerNormalization"]


# ---------------------------------------------------------------- bundles, refusals, the command line


def test_the_bundle_says_what_was_proven(bundle, tiny, tmp_path):
    made = strings_in_graph(open_bundle(bundle), tmp_path / "mine-text", read(str(tiny.data)).examples[:10])
    manifest = made.manifest
    assert (manifest["inputs"], manifest["outputs"]) == (["question", "context"], list(OUTPUTS))
    assert manifest["made"]["proof"] | {"score_difference": 0} == {
        "questions": 10,
        "equal": 10,
        "skipped": 0,
        "score_difference": 0,
    }
    assert "`question` and `context`" in (made.folder / "README.md").read_text()
    with pytest.raises(BundleError, match="answers by itself"):
        Answerer.load(made.folder)
    with pytest.raises(BundleError, match="answers by itself"):
        strings_in_graph(made, tmp_path / "again", [])
    with pytest.raises(InputError, match="holds no bundle yet"):
        newest_bundle(tmp_path)


def test_answers_that_differ_are_not_written(bundle, tiny, tmp_path, monkeypatch):
    def other(model, pieces, encoder, settings: QaSettings) -> bytes:
        return text_model(model, replace(pieces, unknown_id=0, longest_word=2), encoder, settings)

    monkeypatch.setattr("qadeploy.integrations.onnx_standalone.in_graph.text_model", other)
    with pytest.raises(GateError, match=r"mine: \d+ of 10 answers of the graph differ"):
        strings_in_graph(open_bundle(bundle), tmp_path / "mine", read(str(tiny.data)).examples[:10])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("change", ["opset", "operator", "input"])
def test_models_that_cannot_be_built_in_are_named(change, bundle):
    answerer = Answerer.load(bundle, device="cpu")
    proto = onnx.load_model_from_string(answerer.bundle.read(MODEL))
    message = {"opset": "opset 17, a text model needs 18", "operator": "GridSample has another meaning in opset 20"}
    if change == "opset":
        proto.opset_import[0].version = 17
    elif change == "operator":
        proto.graph.node.append(helper.make_node("GridSample", ["a", "b"], ["c"]))
    else:
        proto.graph.input.append(helper.make_tensor_value_info("pixels", TensorProto.FLOAT, [1]))
    pieces = uncased()
    with pytest.raises(FailureError, match=message.get(change, "takes pixels, which a text model does not know")):
        text_model(proto.SerializeToString(), pieces, answerer.encoder, answerer.settings)


def test_a_context_before_the_question_is_refused():
    with pytest.raises(InputError, match="takes the context before the question"):
        text_model(b"", uncased(), family("xlnet").encoder, QaSettings())


def test_export_writes_a_text_model_of_a_bundle(bundle, tiny, tmp_path):
    mine = tmp_path / "mine"
    shutil.copytree(bundle, mine)
    args = ["export", str(mine), "--strings-in-graph", "--eval-data", str(tiny.data), "--json"]
    result = CliRunner().invoke(main, args)
    assert result.exit_code == 0, result.output
    assert list(json.loads(result.stdout)["bundles"]) == [str(tmp_path / "mine-text")]
    assert "its answers to all 64 questions equal the Answerer's" in result.stderr


def test_export_names_a_tokenizer_that_cannot_be_in_the_graph(bundle, tmp_path):
    folder = sealed_copy(bundle, tmp_path / "mine")
    manifest = {k: v for k, v in open_bundle(folder).manifest.items() if k not in {"schema", "files"}}
    (folder / "manifest.json").unlink()
    (folder / TOKENIZER).write_text(family("roberta").tokenizer.to_str())
    seal(folder, manifest)
    result = run("export", folder, "--strings-in-graph")
    assert result.exit_code == 2
    assert "this model's tokenizer is BPE" in result.output
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]

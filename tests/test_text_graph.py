"""Text in, answer out: the graph's tokens against tokenizers', its answers against the Answerer's, and what is refused."""

from __future__ import annotations

import json
import shutil
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
from qadeploy.core.settings import QaSettings
from qadeploy.data.readers import read
from qadeploy.errors import BundleError, FailureError, GateError, InputError
from qadeploy.inference.answerer import Options
from qadeploy.inference.bundle import MODEL, TOKENIZER, newest_bundle, open_bundle, seal
from qadeploy.inference.graph_model import GraphModel
from qadeploy.integrations.onnx_standalone import text_graph
from qadeploy.integrations.onnx_standalone.in_graph import ask, compare_answers, strings_in_graph
from qadeploy.integrations.onnx_standalone.nodes import Nodes
from qadeploy.integrations.onnx_standalone.text_graph import OUTPUTS, text_model
from qadeploy.integrations.onnx_standalone.wordpiece import WordPiece, check_wordpiece, read_wordpiece, special_tokens
from qadeploy.records import Example
from tests.conftest import sealed_copy, triplets
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


@cache
def tokens_model(normaliser: str) -> GraphModel:
    """The part of a text model that tokenises."""
    n = Nodes("")
    characters = [text_graph._characters(n, name) for name in text_graph.INPUTS]
    ids, begins, ends = text_graph._tokenise(n, read_wordpiece(bert(normaliser)), *characters)
    for name, value in zip(("asked", "read", "begins", "ends"), (*ids, begins, ends), strict=True):
        n("Identity", value, out=name)
    inputs = [helper.make_tensor_value_info(name, TensorProto.STRING, [1]) for name in text_graph.INPUTS]
    outputs = [
        helper.make_tensor_value_info(name, TensorProto.INT64, [None]) for name in ("asked", "read", "begins", "ends")
    ]
    graph = helper.make_graph(n.nodes, "tokens", inputs, outputs, n.constants)
    domains = {"": 20, "ai.onnx.ml": 3, "com.microsoft": 1}
    opsets = [helper.make_opsetid(*entry) for entry in domains.items()]
    return GraphModel(helper.make_model(graph, opset_imports=opsets, ir_version=9).SerializeToString())


def same_tokens(normaliser: str, question: str, context: str) -> None:
    tokenizer = bert(normaliser)
    theirs = [tokenizer.encode(text, add_special_tokens=False) for text in (question, context)]
    found = tokens_model(normaliser).run({"question": [question], "context": [context]})
    assert found["asked"].tolist() == theirs[0].ids
    assert found["read"].tolist() == theirs[1].ids
    assert list(zip(found["begins"].tolist(), found["ends"].tolist(), strict=True)) == theirs[1].offsets


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
    """A sample of all of them: every tenth letter that is there, those without a meaning, and the planes that hold nothing."""
    codes = [*range(1, 0xD800, 10), *range(0xE000, 0x30000, 10), *range(0x30000, 0x110000, 997)]
    assert len(codes) > 20_000
    for begin in range(0, len(codes), 4000):
        same_tokens("uncased", "the", " ".join(f"a{chr(code)}b" for code in codes[begin : begin + 4000]))


@pytest.mark.parametrize(
    ("name", "kind"), [("roberta", "BPE"), ("xlm-r", "Unigram"), ("deberta-v2", "Unigram with the normalizer Sequence")]
)
def test_other_tokenizers_are_named(name, kind):
    with pytest.raises(InputError, match=f"strings-in-graph: this model's tokenizer is {kind}.*take spans-in-graph"):
        check_wordpiece(family(name).tokenizer)


def test_a_tokenizer_that_keeps_blank_characters_is_named():
    tokenizer = bert()
    tokenizer.normalizer = normalizers.BertNormalizer(clean_text=False)
    with pytest.raises(InputError, match=r"makes a token of the blank character U\+001C"):
        read_wordpiece(tokenizer)


# ---------------------------------------------------------------- answers


@pytest.fixture(scope="module")
def text_of(tiny, tiny_export):
    """The text model of a tiny bundle, with other settings where asked, and an Answerer that has them."""
    pieces = read_wordpiece(Tokenizer.from_file(str(tiny.bundle() / TOKENIZER)))

    def make(kind: str = "", **settings: object) -> SimpleNamespace:
        answerer = Answerer.load(tiny.bundle(kind), device="cpu", threads=1)
        answerer.settings = replace(answerer.settings, **settings)
        model = text_model(answerer.bundle.read(MODEL), pieces, answerer.encoder, answerer.settings)
        loaded = GraphModel(model, answerer.bundle.manifest["session"])
        return SimpleNamespace(answerer=answerer, model=loaded, proto=onnx.load_model_from_string(model))

    return make


def questions() -> list[Example]:
    rows = [(str(row["question"]), str(row["context"])) for row in triplets(16)]
    long = " ".join(context for _, context in rows) * 2  # several windows
    odd = [("Who keeps the bell?", "  \u00a0Ada\u0301 🚀 keeps the bell ; Ça, 北京.\n"), ("?", "a"), ("who", "☃")]
    return [Example(str(i), q, c) for i, (q, c) in enumerate([*rows, *((q, long) for q, _ in rows[:6]), *odd])]


@pytest.mark.parametrize("kind", ["", "fused", "int8"])
@pytest.mark.parametrize(
    "settings", [{}, {"max_seq_len": 40, "doc_stride": 13, "max_answer_len": 4, "temperature": 2.5}]
)
def test_answers_are_the_answerers(kind, settings, text_of):
    made = text_of(kind, **settings)
    proof = compare_answers(made.model, made.answerer, questions(), ["[SEP]"])
    assert (proof.equal, proof.questions) == (25, 25)
    assert proof.score_difference < 1e-6
    assert made.model.outputs == OUTPUTS


def test_the_null_difference_is_the_decoders(text_of):
    made = text_of(max_seq_len=40, doc_stride=13)
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
        ("who " * 32, "Ada keeps the lamp. " * 30),  # leaves no more than doc_stride
    ],
)
def test_without_an_answer_the_place_is_minus_one(question, context, text_of):
    made = text_of(max_seq_len=40, doc_stride=13)
    out = made.model.run({"question": [question], "context": [context]})
    assert [out[name].tolist() for name in OUTPUTS] == [[""], [0.0], [-1], [-1], [np.inf]]


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
    message = {"opset": "opset 17, a text model needs 18", "operator": "GridSample means something else in opset 20"}
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
    assert "the Answerer's answers to all 64 questions" in result.stderr


def test_export_names_a_tokenizer_that_cannot_be_in_the_graph(bundle, tmp_path):
    folder = sealed_copy(bundle, tmp_path / "mine")
    manifest = {k: v for k, v in open_bundle(folder).manifest.items() if k not in {"schema", "files"}}
    (folder / "manifest.json").unlink()
    (folder / TOKENIZER).write_text(family("roberta").tokenizer.to_str())
    seal(folder, manifest)
    result = CliRunner().invoke(main, ["export", str(folder), "--strings-in-graph"])
    assert result.exit_code == 2
    assert "this model's tokenizer is BPE" in result.output
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]

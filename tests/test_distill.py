"""A teacher's distributions reach the student's tokens, whatever the two tokenizers are, and are computed once."""

from __future__ import annotations

import json
import weakref
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qadeploy.core.settings import QaSettings
from qadeploy.data.loading import hash_examples, read
from qadeploy.errors import CheckpointError, InputError
from qadeploy.files import hash_file
from qadeploy.records import Logits, Window
from qadeploy.training import distill, inputs
from qadeploy.training.checkpoint import TorchModel, load_checkpoint, save_checkpoint, torch_answerer
from qadeploy.training.distill import keep_layers, load_teacher, soft_labels
from qadeploy.training.features import FeatureSet, make_features
from qadeploy.training.negatives import with_negatives
from qadeploy.training.options import TrainOptions
from qadeploy.training.provenance import weights_hash
from qadeploy.training.run_log import RunLog
from qadeploy.training.runs import dev_set, find_run
from qadeploy.training.selection import choose_settings
from qadeploy.training.train import train
from tests.conftest import tiny_options, triplets, write_jsonl
from tests.models_for_tests import BY_NAME

CPU = torch.device("cpu")
SETTINGS = QaSettings(max_seq_len=48, doc_stride=12, max_answer_len=10)


@pytest.fixture(autouse=True)
def exact(monkeypatch) -> None:
    """In float32 on every machine."""
    monkeypatch.setattr(distill, "resolve_precision", lambda wanted, device: "fp32")


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Checkpoints of three tokenizers: word pieces, byte pairs, sentence pieces."""
    root = tmp_path_factory.mktemp("models")
    return {name: BY_NAME[name].save(root / name) for name in ("BERT", "RoBERTa", "XLM-R")}


def features_of(folder: Path, rows: list[dict[str, Any]], tmp_path: Path) -> FeatureSet:
    data = read(str(write_jsonl(tmp_path / "rows.jsonl", rows)))
    return make_features(data.examples, load_checkpoint(folder).encoder, SETTINGS, "rows.jsonl")


def taught(teacher: str | Path, features: FeatureSet, folder: Path | None = None, temperature: float = 1.0) -> Any:
    said: list[str] = []
    found = soft_labels(load_teacher(str(teacher), CPU), features, temperature, folder, RunLog(said.append))
    return found, said


def test_a_teacher_with_the_students_tokenizer_teaches_its_own_distribution(folders, tmp_path):
    features = features_of(folders["BERT"], triplets(6), tmp_path)
    checkpoint = load_checkpoint(folders["BERT"])
    logits = TorchModel(checkpoint.model, checkpoint.encoder.config.pad_token_id).run(
        [f.window for f in features.features]
    )
    contexts = {
        id(feature): context
        for i, context in enumerate(features.contexts)
        for feature in features.features[features.first[i] : features.first[i + 1]]
    }
    for temperature in (1.0, 3.0):
        found, _ = taught(folders["BERT"], features, temperature=temperature)
        for soft, feature, (starts, ends) in zip(found, features.features, logits, strict=True):
            window = feature.window
            if window.context_length < len(contexts[id(feature)]):
                continue  # where a window ends inside a word, the teacher reads another word
            held = np.r_[window.null_index, window.context_begin : window.context_begin + window.context_length]
            for positions, shares, own in (
                (soft.starts, soft.start_probabilities, starts),
                (soft.ends, soft.end_probabilities, ends),
            ):
                exact = np.zeros(len(own))
                best = held[1:][np.argsort(-own[held[1:]])]  # of these the highest are kept, and the null position
                kept = np.append(best[: distill.KEPT - 1], window.null_index)
                exact[kept] = np.exp((own[kept] - own[kept].max()) / temperature)
                exact /= exact.sum()
                dense = np.zeros(len(own))
                dense[positions] = shares
                assert np.abs(dense - exact).max() < 0.02  # fp16, and shares below a thousandth left out


@pytest.mark.parametrize("teacher", ["RoBERTa", "XLM-R"])
def test_between_tokenizers_a_place_stays_the_same_character(folders, teacher, tmp_path):
    """The student's token at each taught place has the character with which the teacher's token begins or ends."""
    rows = [{**row, "context": f"  {row['context']}\u00a0 Zoë’s naïve café — 東京 — ends it."} for row in triplets(4)]
    features = features_of(folders["BERT"], rows, tmp_path)
    found, _ = taught(folders[teacher], features, tmp_path / "kept")
    theirs = load_checkpoint(folders[teacher]).encoder
    checked = 0
    for number, context in enumerate(features.contexts):
        begins = {
            theirs.encode(context.text).visible(int(a), int(b))[0] for a, b in theirs.encode(context.text).offsets
        }
        for i in range(features.first[number], features.first[number + 1]):
            window = features.features[i].window
            for position in found[i].starts:
                if position == window.null_index:
                    continue
                token = window.context_offset + int(position) - window.context_begin
                start, end = context.offsets[token]
                after = context.offsets[token + 1, 0] if token + 1 < len(context) else len(context.text)
                checked += 1
                if window.context_length == len(context):
                    assert any(start <= c < max(end, after) for c in begins)
    assert checked > 20


def test_the_logits_are_asked_once_and_an_interrupted_pass_goes_on(folders, tmp_path):
    rows = [
        {"context": f"Ada keeps lamp {n}.", "question": "Who?", "answer": None, "is_impossible": True}
        for n in range(4100)  # more than one file of the cached logits holds
    ]
    features = features_of(folders["BERT"], rows, tmp_path)
    asked: list[int] = []
    interrupted = False

    def logits(windows: Sequence[Window]) -> list[Logits]:
        asked.append(len(windows))
        if interrupted and len(asked) == 2:
            raise InterruptedError
        return [(np.sin(w.input_ids).astype(np.float32),) * 2 for w in windows]

    teacher = replace(load_teacher(str(folders["RoBERTa"]), CPU), logits=logits)

    def labels(folder: Path) -> Any:
        asked.clear()
        said: list[str] = []
        return soft_labels(teacher, features, 1.0, folder, RunLog(said.append)), said

    expected, _ = labels(tmp_path / "other")
    interrupted = True
    with pytest.raises(InterruptedError):
        labels(tmp_path / "cache")
    kept, lost = asked
    assert kept + lost == len(features) == 4100
    first, said = labels(tmp_path / "cache")
    assert asked == [lost]
    assert said[-1] == f"teacher          {lost} of {lost} windows"
    again, _ = labels(tmp_path / "cache")
    assert asked == []
    for one, *others in zip(expected, first, again, strict=True):
        for other in others:
            np.testing.assert_array_equal(one.starts, other.starts)
            np.testing.assert_array_equal(one.end_probabilities, other.end_probabilities)


def test_a_damaged_part_is_asked_for_again(folders, tmp_path):
    features = features_of(folders["BERT"], triplets(3), tmp_path)
    first, _ = taught(folders["BERT"], features, tmp_path / "cache")
    (part,) = (tmp_path / "cache").rglob("*.npz")
    part.write_bytes(part.read_bytes()[:200])
    again, _ = taught(folders["BERT"], features, tmp_path / "cache")
    np.testing.assert_array_equal(first[0].starts, again[0].starts)


def test_logits_that_cannot_be_stored_are_used_all_the_same(folders, tmp_path):
    features = features_of(folders["BERT"], triplets(3), tmp_path)
    first, _ = taught(folders["BERT"], features)
    (tmp_path / "cache").write_text("a file, not a folder")
    again, said = taught(folders["BERT"], features, tmp_path / "cache")
    np.testing.assert_array_equal(first[0].starts, again[0].starts)
    assert sum("teacher cache: " in line and "its logits are not stored (--no-cache" in line for line in said) == 1


def test_a_teacher_that_finds_nothing_is_refused_before_training(folders, tmp_path):
    features = features_of(folders["BERT"], triplets(96), tmp_path)
    with pytest.raises(InputError, match=r"finds \d\.\d % of \d+ annotated answers exactly: it was trained for"):
        taught(folders["RoBERTa"], features)  # random weights


def test_a_teacher_that_prefers_no_answer_is_judged_by_its_spans_and_warned_of(tiny, tmp_path):
    examples = read(str(tiny.data)).examples
    features = make_features(examples, load_checkpoint(tiny.run / "checkpoint").encoder, SETTINGS, "keepers")
    teacher = load_teacher(str(tiny.run), CPU)

    def refusing(windows: Sequence[Window]) -> list[Logits]:
        found = teacher.logits(windows)
        for window, sides in zip(windows, found, strict=True):
            for values in sides:
                values[window.null_index] = 1_000
        return found

    said: list[str] = []
    soft_labels(teacher, features, 1.0, None, RunLog(said.append))
    agreement = said[-1].partition(" finds ")[2]
    assert agreement
    soft_labels(replace(teacher, logits=refusing), features, 1.0, None, RunLog(said.append, said.append))
    assert said[-2].endswith(agreement)
    assert "prefers 'no answer' to 100 % of these answers" in said[-1]


def test_a_bundle_teaches_what_its_checkpoint_does(tiny, tiny_export, tmp_path):
    features = make_features(
        read(str(tiny.data)).examples[:8], load_checkpoint(tiny.run / "checkpoint").encoder, SETTINGS, "keepers"
    )
    by_run, _ = taught(tiny.run, features)
    by_bundle, _ = taught(tiny.bundle(), features)
    for one, other in zip(by_run, by_bundle, strict=True):
        assert set(one.starts) & set(other.starts)
        assert one.starts[one.start_probabilities.argmax()] == other.starts[other.start_probabilities.argmax()]


def test_a_bare_encoder_cannot_teach(tiny_checkpoint, tmp_path):
    import transformers

    model = transformers.AutoModel.from_pretrained(tiny_checkpoint)
    model.save_pretrained(tmp_path / "bare")
    transformers.AutoTokenizer.from_pretrained(tiny_checkpoint).save_pretrained(tmp_path / "bare")
    with pytest.raises(CheckpointError, match="no question-answering head"):
        load_teacher(str(tmp_path / "bare"), CPU)


@pytest.mark.parametrize(("count", "kept"), [(1, [0]), (2, [0, 5]), (3, [0, 2, 5]), (6, [0, 1, 2, 3, 4, 5])])
def test_the_layers_that_stay_are_evenly_chosen(count, kept):
    import transformers

    config = transformers.BertConfig(
        hidden_size=8, num_hidden_layers=6, num_attention_heads=2, intermediate_size=8, vocab_size=30
    )
    model = transformers.BertForQuestionAnswering(config)
    weights = [layer.output.dense.weight.clone() for layer in model.bert.encoder.layer]
    student = keep_layers(model, count)
    for layer, index in zip(student.bert.encoder.layer, kept, strict=True):
        assert torch.equal(layer.output.dense.weight, weights[index])
    assert student.config.num_hidden_layers == count
    assert student(torch.tensor([[1, 2, 3]])).start_logits.shape == (1, 3)


@pytest.mark.parametrize("count", [2, 3])
def test_a_model_with_fewer_layers_is_the_same_after_it_is_loaded_again(count, tmp_path):
    """ModernBERT sees the whole text in some layers, chosen by index, and the neighbourhood of a token in the others."""
    deep = replace(BY_NAME["ModernBERT"], values={**BY_NAME["ModernBERT"].values, "num_hidden_layers": 5})
    checkpoint = load_checkpoint(deep.save(tmp_path / "base"))
    student = keep_layers(checkpoint.model, count)
    save_checkpoint(replace(checkpoint, model=student), SETTINGS, tmp_path / "student")
    ids = torch.randint(5, 50, (1, 60), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        logits, again = (m(ids).start_logits for m in (student, load_checkpoint(tmp_path / "student").model))
    torch.testing.assert_close(again, logits)


def test_layers_that_are_not_there_are_refused(folders):
    with pytest.raises(InputError, match="--layers 9: the base has 2 layers"):
        keep_layers(load_checkpoint(folders["BERT"]).model, 9)


def test_a_student_learns_from_its_teacher_and_the_run_says_so(tiny, tiny_checkpoint, tmp_path):
    """Half of the rows have no annotated answer, so the teacher labels them; with negatives and fewer layers."""
    rows = triplets(96)
    data = write_jsonl(tmp_path / "few.jsonl", rows[:40])
    rest = [{"context": r["context"], "question": r["question"]} for r in rows[40:]]
    others = write_jsonl(tmp_path / "others.jsonl", rest)
    options = replace(
        tiny_options(data, tiny_checkpoint, tmp_path / "student"),
        teacher=str(tiny.run),
        unlabelled=str(others),
        negatives=1,
        layers=1,
        dev_fraction=0.3,
        cache=False,
    )
    said: list[str] = []
    result = train(options, said.append, progress=False)
    text = "\n".join(said)
    assert "teacher          " in text
    assert "train negatives: " in text
    record = json.loads((result.folder / "run.json").read_text())
    assert record["options"]["teacher"] == str(tiny.run)
    asked = read(str(others), annotated=False).examples
    assert record["teacher_sha256"] == hash_file(tiny.run / "checkpoint" / "model.safetensors")
    assert record["unlabelled_sha256"] == hash_examples(asked)
    config = json.loads((result.folder / "checkpoint" / "config.json").read_text())
    assert config["num_hidden_layers"] == 1
    assert result.metrics["settings"]["relative_to_null"] is True
    run, checkpoint = find_run(result.folder), load_checkpoint(result.folder / "checkpoint")
    made = with_negatives(dev_set(run), 1).examples
    features = make_features(made, checkpoint.encoder, checkpoint.settings, "the dev set")
    windows = [feature.window for feature in features.features]
    logits: Any = tuple(zip(*torch_answerer(checkpoint).model.run(windows), strict=True))
    before = replace(checkpoint.settings, null_threshold=0.0, temperature=1.0)
    chosen = choose_settings(features, logits, before, balanced=True)
    assert result.metrics["settings"]["null_threshold"] == pytest.approx(chosen.null_threshold, abs=1e-3)
    other = choose_settings(features, logits, before)
    assert abs(other.null_threshold - chosen.null_threshold) > 0.01


def test_a_teacher_is_let_go_before_training(folders, tiny_checkpoint, tmp_path, monkeypatch):
    kept: list[Any] = []

    def load(*arguments: Any) -> Any:
        teacher = load_teacher(*arguments)
        kept.append(weakref.ref(teacher.logits))
        return teacher

    def stop(run: Any) -> None:
        assert run.windows.train.soft
        assert kept[0]() is None
        raise InterruptedError

    monkeypatch.setattr(inputs, "load_teacher", load)
    monkeypatch.setattr("qadeploy.training.train._make_loop", stop)
    data = write_jsonl(tmp_path / "few.jsonl", triplets(12))
    options = tiny_options(data, tiny_checkpoint, tmp_path / "run", teacher=str(folders["BERT"]), cache=False)
    with pytest.raises(InterruptedError):
        train(options, lambda line: None, progress=False)


def test_the_revision_of_the_base_is_not_asked_of_the_teacher(folders, monkeypatch):
    base = load_checkpoint(folders["BERT"])
    monkeypatch.setattr(inputs, "load_checkpoint", lambda name, hub, **changes: base)
    options = TrainOptions(base="me/base", model_revision="v2", teacher=str(folders["RoBERTa"]))
    models = inputs.load_models(options, CPU, "squad")
    assert models.teacher is not None
    assert models.teacher.name == str(folders["RoBERTa"])  # a folder, which has no revisions


def test_questions_that_only_a_teacher_can_label_need_one(tiny_checkpoint, tmp_path):
    data = write_jsonl(tmp_path / "few.jsonl", triplets(20))
    options = replace(tiny_options(data, tiny_checkpoint, tmp_path / "run"), unlabelled=str(data))
    with pytest.raises(InputError, match="--unlabelled: only a teacher can label these questions"):
        train(options, lambda line: None, progress=False)
    assert not (tmp_path / "run").exists()


def test_weights_are_known_by_all_their_files(tmp_path):
    assert weights_hash(tmp_path) is None
    (tmp_path / "pytorch_model.bin").write_bytes(b"a")
    assert weights_hash(tmp_path) == hash_file(tmp_path / "pytorch_model.bin")
    for number in (1, 2):
        (tmp_path / f"model-0000{number}-of-00002.safetensors").write_bytes(b"b")
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    before = weights_hash(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").write_bytes(b"c")
    assert weights_hash(tmp_path) not in {before, hash_file(tmp_path / "model-00001-of-00002.safetensors")}


def test_weights_are_known_only_by_the_files_that_are_loaded(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"a")
    (tmp_path / "model-before.safetensors").write_bytes(b"b")
    assert weights_hash(tmp_path) == hash_file(tmp_path / "model.safetensors")

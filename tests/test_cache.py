"""The cache of features: equal to fresh ones, found by content alone, and never an obstacle."""

from __future__ import annotations

import json
import os
import pickle
import random
import resource
import shutil
import subprocess
import sys
from collections.abc import Sequence
from contextlib import chdir
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import normalizers

import qadeploy
from qadeploy.core.settings import QaSettings
from qadeploy.core.windows import Encoder
from qadeploy.data.loading import DataSet
from qadeploy.errors import DataError, InputError
from qadeploy.files import cache_folder, writing
from qadeploy.records import Annotation, Example
from qadeploy.training.feature_cache import LIMIT_BYTES, CachedFeatures, cached_features
from qadeploy.training.features import FeatureSet, make_features
from tests.conftest import tiny_options, triplets, write_jsonl
from tests.processes_for_tests import succeeded
from tests.tokenizers_for_tests import CORPUS, NAMES, encoder, family

SETTINGS = QaSettings(max_seq_len=48, doc_stride=8, max_answer_len=15)


def annotate(context: str, *texts: str) -> tuple[Annotation, ...]:
    return tuple(Annotation(text, context.index(text)) for text in texts)


LONG = " ".join(CORPUS)
EXAMPLES = (
    Example("a", "When does it open?", LONG, annotate(LONG, "nine", "at nine", "北京")),
    Example("b", "Who flew?", CORPUS[2], annotate(CORPUS[2], "the crew of three"), "train"),
    Example("c", "Who sank?", CORPUS[2]),
    Example("d", "Quel café ?", LONG, annotate(LONG, "déjà fermé")),
    Example("e", "Is anything here?", ""),
    Example("f", "Who sank?", CORPUS[2], (), "train", ("g",)),  # c once more, as another row
)
DATA = (DataSet("train.json", EXAMPLES[:3]), DataSet("dev.json", EXAMPLES[3:]))


def quiet(line: str) -> None:
    pytest.fail(f"nothing was to be noted: {line}")


def no_making(*args: Any) -> FeatureSet:
    pytest.fail("features were made")


def fresh(data: Sequence[DataSet], enc: Encoder, settings: QaSettings = SETTINGS) -> list[FeatureSet]:
    return [make_features(d.examples, enc, settings, d.source) for d in data]


def same_array(ours: Any, theirs: Any) -> None:
    np.testing.assert_array_equal(ours, theirs, strict=True)  # shape and dtype too


def assert_same(ours: Sequence[FeatureSet], theirs: Sequence[FeatureSet]) -> None:
    """Every field of every feature and context, its type too."""
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert one.examples == other.examples
        assert one.first == other.first
        assert all(type(n) is int for n in one.first)
        assert one.with_answer == other.with_answer
        for mine, yours in zip(one.features, other.features, strict=True):
            same_array(mine.positions, yours.positions)
            same_array(mine.window.input_ids, yours.window.input_ids)
            assert (mine.window.token_type_ids is None) == (yours.window.token_type_ids is None)
            if yours.window.token_type_ids is not None:
                same_array(mine.window.token_type_ids, yours.window.token_type_ids)
            for name in ("context_begin", "context_length", "context_offset", "null_index"):
                assert getattr(mine.window, name) == getattr(yours.window, name)
                assert type(getattr(mine.window, name)) is int
        for mine, yours in zip(one.contexts, other.contexts, strict=True):
            assert (mine.text, mine.tokens, len(mine)) == (yours.text, yours.tokens, len(yours))
            for name in ("ids", "offsets", "visible_before", "blank", "words"):
                same_array(getattr(mine, name), getattr(yours, name))


def keep(folder: Path, data: Sequence[DataSet] = DATA, enc: Encoder | None = None, **more: Any) -> CachedFeatures:
    return cached_features(data, enc or encoder("bert"), SETTINGS, folder, quiet, **more)


def entries(folder: Path) -> list[Path]:
    return sorted(folder.iterdir())


def saved(name: str, folder: Path) -> tuple[str, str]:
    """Saves what another process needs to make the encoder: a tokenizer file and the configuration as JSON."""
    path = folder / "tokenizer.json"
    family(name).tokenizer.save(str(path))
    return str(path), json.dumps(family(name).config.to_dict())


# ---------------------------------------------------------------- equal, and without tokenising


@pytest.mark.parametrize("name", NAMES)
def test_kept_features_equal_fresh_ones_in_every_field(name, tmp_path):
    enc = encoder(name)
    made = keep(tmp_path / "cache", enc=enc)
    again = keep(tmp_path / "cache", enc=enc, make=no_making)
    assert (made.found, again.found) == (False, True)
    expected = fresh(DATA, enc)
    assert len(expected[0]) > len(DATA[0].examples)  # several windows
    assert expected[0].features[0].positions.shape[1] == 2
    assert max(len(f.positions) for f in expected[0].features) > 1  # several annotators
    assert_same(made.sets, expected)
    assert_same(again.sets, expected)


def test_a_second_run_does_not_tokenise(tmp_path):
    keep(tmp_path)
    tokenizer = family("bert").tokenizer.from_str(family("bert").tokenizer.to_str())
    tokenizer.normalizer = normalizers.Replace("e", " ")
    other = Encoder(tokenizer, family("bert").config)
    other.digest = encoder("bert").digest  # it tokenises everything differently
    assert all(len(other.encode(e.context)) != len(encoder("bert").encode(e.context)) for e in EXAMPLES if e.context)
    kept = keep(tmp_path, enc=other, make=no_making)
    expected = fresh(DATA, encoder("bert"))
    for one, other in zip(kept.sets, expected, strict=True):
        assert [f.window.input_ids.tolist() for f in one.features] == [
            f.window.input_ids.tolist() for f in other.features
        ]
        for mine, yours in zip(one.contexts, other.contexts, strict=True):
            # everything that labels and the decoder read of a context
            same_array(mine.offsets, yours.offsets)
            same_array(mine.blank, yours.blank)
            assert mine.tokens_of(3, 12) == yours.tokens_of(3, 12)


def test_every_set_has_its_own_slices(tmp_path):
    keep(tmp_path)
    for features in keep(tmp_path).sets:
        assert features.first[0] == 0
        assert features.first[-1] == len(features)
        assert all(a < b for a, b in pairwise(features.first))


def test_without_a_folder_nothing_is_kept(tmp_path):
    with chdir(tmp_path):
        assert not cached_features(DATA, encoder("bert"), SETTINGS, None, quiet).found
        assert not cached_features(DATA, encoder("bert"), SETTINGS, None, quiet).found
    assert entries(tmp_path) == []


# ---------------------------------------------------------------- what finds an entry


def test_another_split_of_the_same_questions_finds_it(tmp_path):
    keep(tmp_path)
    folds = (DataSet("x", EXAMPLES[4:]), DataSet("y", EXAMPLES[1:4]), DataSet("z", (*EXAMPLES[:1], *EXAMPLES[:1])))
    kept = keep(tmp_path, folds, make=no_making)
    assert kept.found
    assert_same(kept.sets, fresh(folds, encoder("bert")))


def test_ids_and_splits_are_not_content_but_those_given_come_back(tmp_path):
    keep(tmp_path)
    renamed = [
        DataSet("", tuple(replace(e, id=e.id * 2, split="validation", also=("z",)) for e in d.examples)) for d in DATA
    ]
    kept = keep(tmp_path, renamed, make=no_making)
    assert [e.id for s in kept.sets for e in s.examples] == ["aa", "bb", "cc", "dd", "ee", "ff"]
    assert all(e.split == "validation" and e.also == ("z",) for s in kept.sets for e in s.examples)


def test_the_longest_answer_is_no_matter_of_windows(tmp_path):
    keep(tmp_path)
    settings = replace(SETTINGS, max_answer_len=3)
    assert cached_features(DATA, encoder("bert"), settings, tmp_path, quiet, make=no_making).found


def other_example(number: int, **changes: Any) -> tuple[DataSet, ...]:
    examples = [*EXAMPLES]
    examples[number] = replace(examples[number], **changes)
    return (DataSet("here", tuple(examples)),)


def test_other_content_is_another_entry(tmp_path):
    enc = encoder("bert")
    config = family("bert").config
    cased = family("bert").tokenizer.from_str(family("bert").tokenizer.to_str())
    cased.add_tokens(["kettle water"])
    shifted = (Annotation("three", CORPUS[2].index("three")),)
    variants: list[tuple[Sequence[DataSet], Encoder, QaSettings]] = [
        (DATA, enc, SETTINGS),
        (other_example(1, question="Who walked?"), enc, SETTINGS),
        (other_example(1, context=CORPUS[2] + " "), enc, SETTINGS),
        (other_example(1, answers=shifted), enc, SETTINGS),
        (other_example(1, answers=()), enc, SETTINGS),
        (other_example(0, answers=EXAMPLES[0].answers[::-1]), enc, SETTINGS),
        ((DataSet("here", EXAMPLES[:4]),), enc, SETTINGS),
        (DATA, enc, replace(SETTINGS, max_seq_len=47)),
        (DATA, enc, replace(SETTINGS, doc_stride=7)),
        (DATA, Encoder(cased, config), SETTINGS),
        (DATA, Encoder(family("bert").tokenizer, replace(config, segments=0)), SETTINGS),
        (DATA, Encoder(family("bert").tokenizer, replace(config, context_first=True)), SETTINGS),
        (DATA, encoder("xlm-r"), SETTINGS),
    ]
    for data, by, settings in variants:
        assert not cached_features(data, by, settings, tmp_path, quiet).found
    assert len(entries(tmp_path)) == len(variants)
    for data, by, settings in variants:
        kept = cached_features(data, by, settings, tmp_path, quiet, make=no_making)
        assert_same(kept.sets, fresh(data, by, settings))


CHANGED = """
import json
import sys
from pathlib import Path

root, folder, tokenizer, config = sys.argv[1:]
sys.path.insert(0, root)
from qadeploy.training import feature_cache
from qadeploy.training import features
from qadeploy.core.settings import QaSettings
from qadeploy.core.windows import Encoder, EncoderConfig
from qadeploy.records import Example

assert Path(features.__file__).is_relative_to(root)
encoder = Encoder.from_file(tokenizer, EncoderConfig.from_dict(json.loads(config)))
data = [feature_cache.DataSet("here", (Example("a", "Who?", "Ada keeps it."),))]
print(feature_cache.cached_features(data, encoder, QaSettings(), Path(folder), print).found)
"""


def test_code_that_makes_features_anew_does_not_find_those_of_the_old(tmp_path):
    root = tmp_path / "root"
    shutil.copytree(Path(qadeploy.__file__).parent, root / "qadeploy", ignore=shutil.ignore_patterns("__pycache__"))

    def found() -> str:
        command = [sys.executable, "-c", CHANGED, str(root), str(tmp_path / "cache"), *saved("bert", tmp_path)]
        return succeeded(command).stdout.strip()

    assert [found(), found()] == ["False", "True"]
    for module in ("training/features.py", "core/windows.py", "training/feature_cache.py"):
        path = root / "qadeploy" / module
        path.write_text(path.read_text() + "\nCHANGED = True\n")
        assert found() == "False"
    assert found() == "True"


@pytest.mark.parametrize("name", ["bert", "roberta", "albert"])
def test_the_digest_is_the_same_in_every_process(name, tmp_path):
    code = (
        "import json, sys; from qadeploy.core.windows import Encoder, EncoderConfig;"
        "print(Encoder.from_file(sys.argv[1], EncoderConfig.from_dict(json.loads(sys.argv[2]))).digest)"
    )
    command = [sys.executable, "-c", code, *saved(name, tmp_path)]
    found = succeeded(command).stdout.strip()
    assert found == encoder(name).digest


def test_padding_baked_into_a_tokenizer_file_is_no_difference():
    kind = family("bert")
    baked = kind.tokenizer.from_str(kind.tokenizer.to_str())
    baked.enable_padding(length=128)
    baked.enable_truncation(128)
    assert Encoder(baked, kind.config).digest == kind.encoder.digest


# ---------------------------------------------------------------- bad input


def test_a_question_without_room_names_its_row_and_keeps_nothing(tmp_path):
    data = (DATA[0], DataSet("dev.json", (EXAMPLES[1], replace(EXAMPLES[1], id="bad", question="kettle " * 60))))
    with pytest.raises(DataError, match=r"dev.json: question 2 \(id bad\)"):
        keep(tmp_path, data)
    assert entries(tmp_path) == []


def test_a_lone_surrogate_is_refused_by_the_encoder(tmp_path):
    for broken in (replace(EXAMPLES[2], question="Who \ud800?"), replace(EXAMPLES[2], context="A \udfff.")):
        with pytest.raises(InputError, match="lone surrogate"):
            keep(tmp_path, (DataSet("here", (broken,)),))
    assert entries(tmp_path) == []


# ---------------------------------------------------------------- damage


def damaged(entry: bytes) -> dict[str, bytes]:
    cut = {f"cut at {share:.2f}": entry[: int(len(entry) * share)] for share in (0, 0.01, 0.3, 0.7, 0.99)}
    hole = entry[: len(entry) // 2] + bytes(64) + entry[len(entry) // 2 + 64 :]
    pickled = pickle.dumps({"digests": [1, 2, 3]})
    return {**cut, "hole": hole, "text": b"not an archive", "pickle": pickled, "zeros": bytes(len(entry))}


def test_a_damaged_entry_is_noted_and_made_anew(tmp_path):
    keep(tmp_path)
    (path,) = entries(tmp_path)
    sound = path.read_bytes()
    expected = fresh(DATA, encoder("bert"))
    for kind, content in damaged(sound).items():
        path.write_bytes(content)
        notes: list[str] = []
        kept = cached_features(DATA, encoder("bert"), SETTINGS, tmp_path, notes.append)
        assert not kept.found, kind
        assert_same(kept.sets, expected)
        assert len(notes) == 1, kind
        assert str(path) in notes[0]
        assert "made again" in notes[0]
        assert keep(tmp_path, make=no_making).found, kind


def test_a_pickled_object_in_an_entry_is_not_unpickled(tmp_path):
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return (os.mkdir, (str(tmp_path / "sprung"),))

    keep(tmp_path / "cache")
    (path,) = entries(tmp_path / "cache")
    with np.load(path) as archive:
        arrays = {name: archive[name] for name in archive.files}
    with path.open("wb") as stream:
        np.savez(stream, **{**arrays, "labels": np.asarray([Trap()], dtype=object)})
    notes: list[str] = []
    kept = cached_features(DATA, encoder("bert"), SETTINGS, tmp_path / "cache", notes.append)
    assert not kept.found
    assert "pickle" in notes[0]
    assert not (tmp_path / "sprung").exists()


def test_no_flipped_bit_changes_a_feature(tmp_path):
    keep(tmp_path)
    (path,) = entries(tmp_path)
    sound = path.read_bytes()
    expected = fresh(DATA, encoder("bert"))
    places = random.Random(7)
    made_anew = 0
    for _ in range(60):
        content = bytearray(sound)
        content[places.randrange(len(content))] ^= 1 << places.randrange(8)
        path.write_bytes(bytes(content))
        kept = cached_features(DATA, encoder("bert"), SETTINGS, tmp_path, lambda line: None)
        made_anew += not kept.found
        assert_same(kept.sets, expected)
    assert made_anew > 20


def test_an_entry_of_other_questions_under_this_name_is_not_believed(tmp_path):
    keep(tmp_path)
    (path,) = entries(tmp_path)
    other = (DataSet("here", EXAMPLES[:4]),)
    keep(tmp_path, other)
    (foreign,) = [p for p in entries(tmp_path) if p != path]
    shutil.copy(path, foreign)
    notes: list[str] = []
    kept = cached_features(other, encoder("bert"), SETTINGS, tmp_path, notes.append)
    assert not kept.found
    assert "another entry" in notes[0]
    assert_same(kept.sets, fresh(other, encoder("bert")))


# ---------------------------------------------------------------- folders that cannot be used


@pytest.mark.parametrize("place", ["a file", "below a file", "/proc/nothing"])
def test_a_folder_that_cannot_be_written_is_a_note(place, tmp_path):
    (tmp_path / "file").write_text("mine")
    folder = {"a file": tmp_path / "file", "below a file": tmp_path / "file" / "cache"}.get(place, Path(place))
    notes: list[str] = []
    kept = cached_features(DATA, encoder("bert"), SETTINGS, folder, notes.append)
    assert not kept.found
    assert_same(kept.sets, fresh(DATA, encoder("bert")))
    assert len(notes) == 1
    assert str(folder) in notes[0]
    assert "not stored" in notes[0]
    assert (tmp_path / "file").read_text() == "mine"


def test_a_disk_that_is_full_is_a_note_and_leaves_nothing(tmp_path):
    notes: list[str] = []
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
    try:
        kept = cached_features(DATA, encoder("bert"), SETTINGS, tmp_path, notes.append)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert_same(kept.sets, fresh(DATA, encoder("bert")))
    assert len(notes) == 1
    assert "File too large" in notes[0]
    assert entries(tmp_path) == []


# ---------------------------------------------------------------- size


def test_entries_used_least_recently_go_first(tmp_path):
    def one(number: int, limit: int = LIMIT_BYTES) -> bool:
        return keep(tmp_path, (DataSet("here", EXAMPLES[number : number + 1]),), limit=limit).found

    numbers = (0, 3, 1)
    paths = {}
    for age, number in enumerate(numbers):
        before = set(entries(tmp_path))
        one(number)
        (paths[number],) = set(entries(tmp_path)) - before
        os.utime(paths[number], (1000 + age, 1000 + age))
    others = [tmp_path / "notes.txt", tmp_path / "features-of-mine.npz", tmp_path / "features-draft.tmp"]
    for other in others:
        other.write_text("not of the cache")
        os.utime(other, (1, 1))
    assert one(0)  # used most recently, though stored first
    size = sum(path.stat().st_size for path in paths.values())
    assert not one(4, limit=size)  # with a fourth, the least recently used one is deleted
    assert not paths[3].exists()
    assert paths[0].exists()
    assert paths[1].exists()
    assert all(other.exists() for other in others)
    assert one(4)


def test_what_is_larger_than_the_cache_is_not_kept(tmp_path):
    notes: list[str] = []
    kept = cached_features(DATA, encoder("bert"), SETTINGS, tmp_path, notes.append, limit=100)
    assert_same(kept.sets, fresh(DATA, encoder("bert")))
    assert "at most" in notes[0]
    assert entries(tmp_path) == []


def test_what_a_killed_writer_left_goes(tmp_path):
    entry = tmp_path / f"features-{'0' * 64}.npz"
    with writing(entry):
        (young,) = entries(tmp_path)  # somebody is writing it
        old = young.with_name(young.name.replace(young.name.split("-")[-1][:16], "0" * 16))
        old.write_bytes(b"half")
        keep(tmp_path)
        assert not old.exists()
        assert young.exists()


# ---------------------------------------------------------------- many at once

WRITER = """
import json, sys
from pathlib import Path
from qadeploy.data.loading import DataSet
from qadeploy.training.feature_cache import cached_features
from qadeploy.training.features import make_features
from qadeploy.core.settings import QaSettings
from qadeploy.core.windows import Encoder, EncoderConfig
from qadeploy.records import Example

folder, tokenizer, config, context = sys.argv[1:]
encoder = Encoder.from_file(tokenizer, EncoderConfig.from_dict(json.loads(config)))
examples = [Example(str(i), f"What is {i}?", context) for i in range(20)]
settings = QaSettings(48, 8, 15)

def plain(features):
    return features.first, [f.window.input_ids.tolist() for f in features.features]

expected = plain(make_features(examples, encoder, settings, "here"))
notes = []
for _ in range(40):
    kept = cached_features([DataSet("here", tuple(examples))], encoder, settings, Path(folder), notes.append)
    assert plain(kept.sets[0]) == expected
    for path in Path(folder).glob("*.npz"):
        path.unlink(missing_ok=True)  # so that each round writes again
assert not notes, notes
"""


def test_two_processes_write_and_read_the_same_entry(tmp_path):
    folder = tmp_path / "cache"
    command = [sys.executable, "-c", WRITER, str(folder), *saved("bert", tmp_path), LONG]
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE) for _ in range(2)]
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors.decode()
    assert entries(folder) == []


# ---------------------------------------------------------------- where, and in train


@pytest.mark.parametrize(
    ("own", "shared", "home", "expected"),
    [
        ("/own", "/shared", "/home/ada", "/own"),
        ("rel", "/shared", "/home/ada", "rel"),
        ("", "/shared", "/home/ada", "/shared/qadeploy"),
        (None, "/shared", "/home/ada", "/shared/qadeploy"),
        (None, "rel", "/home/ada", "/home/ada/.cache/qadeploy"),
        (None, "", "/home/ada", "/home/ada/.cache/qadeploy"),
        (None, None, "/home/ada", "/home/ada/.cache/qadeploy"),
    ],
)
def test_where_the_cache_is(own, shared, home, expected, monkeypatch):
    for name, value in (("QADEPLOY_CACHE", own), ("XDG_CACHE_HOME", shared), ("HOME", home)):
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    assert cache_folder() == Path(expected)


def test_a_user_without_a_home_has_no_cache(tmp_path):
    code = (
        "import os; os.environ.clear();"
        "import pwd; pwd.getpwuid = lambda uid: (_ for _ in ()).throw(KeyError(uid));"  # a container's unknown user
        "from qadeploy.files import cache_folder; print(cache_folder())"
    )
    found = succeeded([sys.executable, "-c", code], cwd=tmp_path)
    assert found.stdout.strip() == "None"


def test_train_keeps_its_windows_and_a_second_run_is_the_same_run(tiny_checkpoint, tmp_path, monkeypatch):
    from qadeploy.training.train import train  # torch, which nothing above needs

    cache = tmp_path / "cache"
    monkeypatch.setenv("QADEPLOY_CACHE", str(cache))
    data = write_jsonl(tmp_path / "few.jsonl", triplets(16))
    held_out = write_jsonl(tmp_path / "held.jsonl", triplets(24)[16:])
    metrics, third = [], []
    for number, use in enumerate((False, True, True)):
        said: list[str] = []
        options = tiny_options(
            data, tiny_checkpoint, tmp_path / f"run{number}", epochs=1, eval_data=str(held_out), cache=use
        )
        result = train(options, said.append, progress=False).metrics
        metrics.append({**result, "seconds": 0, "speed": None})
        third += [line for line in said if line.startswith("3 features")]
        assert cache.exists() == use
    assert [line.endswith("(from the cache)") for line in third] == [False, False, True]
    assert third[2].removesuffix(" (from the cache)") == third[0]
    assert metrics[0] == metrics[1] == metrics[2]
    assert len(entries(cache)) == 1

"""Windows made in processes: the same as in one, errors included."""

from __future__ import annotations

import os
import pickle
import sys
from itertools import pairwise

import numpy as np
import pytest

from qadeploy.core.settings import QaSettings
from qadeploy.errors import DataError
from qadeploy.records import Annotation, Example
from qadeploy.training.checkpoint import load_checkpoint
from qadeploy.training.features import FeatureSet, make_features
from qadeploy.training.workers import make_features_in
from tests.conftest import triplets
from tests.processes_for_tests import succeeded
from tests.tokenizers_for_tests import encoder

SETTINGS = QaSettings(max_seq_len=40, doc_stride=8)


def examples() -> list[Example]:
    """Questions of one and of many windows, with none, one and two annotations, two on each passage."""
    found = []
    for i, row in enumerate(triplets(24)):
        context = str(row["context"]) * (1 + i % 4 * 2)
        name = str(row["answer"])
        answers = (Annotation(name, 0), Annotation(context[:20], 0))[: i % 3]
        found += [Example(f"{i}-{n}", str(row["question"]), context, answers) for n in range(2)]
    return found


def facts(features: FeatureSet) -> list[object]:
    return [
        (
            f.window.input_ids.tolist(),
            None if f.window.token_type_ids is None else f.window.token_type_ids.tolist(),
            f.window.context_begin,
            f.window.context_length,
            f.window.context_offset,
            f.window.null_index,
            f.positions.tolist(),
            {a.dtype for a in (f.window.input_ids, f.positions)} == {np.dtype(np.int64)},
        )
        for f in features.features
    ]


@pytest.mark.parametrize("name", ["bert", "roberta"])
def test_two_processes_make_what_one_makes(name, monkeypatch):
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    tool = encoder(name)
    asked = examples()
    one = make_features(asked, tool, SETTINGS, "here")
    two = make_features_in(2, asked, tool, SETTINGS, "here")
    assert facts(two) == facts(one)
    assert (two.examples, two.first, two.with_answer) == (one.examples, one.first, one.with_answer)
    assert max(b - a for a, b in pairwise(one.first)) > 3  # otherwise there is only one window
    for mine, theirs in zip(two.contexts, one.contexts, strict=True):
        assert mine.text == theirs.text
        for part in ("ids", "offsets", "blank", "words"):
            np.testing.assert_array_equal(getattr(mine, part), getattr(theirs, part))
    assert len({id(c) for c in two.contexts}) == len({c.text for c in two.contexts})
    assert os.environ["TOKENIZERS_PARALLELISM"] == "true"  # theirs is not ours


def test_every_row_at_fault_is_named_by_its_place_in_the_file(tiny_checkpoint):
    tool = load_checkpoint(tiny_checkpoint).encoder
    asked = examples()
    for place in (3, 40):
        asked[place] = Example(f"bad-{place}", "Who keeps the bell " * 20, "Ada.")
    with pytest.raises(DataError) as one:
        make_features(asked, tool, SETTINGS, "faq.jsonl")
    with pytest.raises(DataError) as two:
        make_features_in(2, asked, tool, SETTINGS, "faq.jsonl")
    assert two.value.problems == one.value.problems
    assert "question 41 (id bad-40)" in two.value.problems[1]


UNGUARDED = """
import pickle
import sys
from pathlib import Path

from qadeploy.training.workers import make_features_in
from qadeploy.errors import FailureError
from qadeploy.core.settings import QaSettings
from qadeploy.records import Example

tool = pickle.loads(Path(sys.argv[1]).read_bytes())
try:
    make_features_in(2, [Example("a", "Who?", "Ada."), Example("b", "Who?", "Bela.")], tool, QaSettings(), "here")
except FailureError as error:
    Path(sys.argv[2]).write_text(str(error))
"""


def test_workers_that_cannot_start_are_one_clear_error(tmp_path):
    script, tool, said = (tmp_path / name for name in ("script.py", "tool", "said.txt"))
    script.write_text(UNGUARDED)
    tool.write_bytes(pickle.dumps(encoder("bert")))
    command = [sys.executable, str(script), str(tool), str(said)]
    succeeded(command, timeout=120)
    assert 'no if __name__ == "__main__"' in said.read_text()
    assert "lower --preprocessing-num-workers" in said.read_text()

"""Train and export refuse a checkpoint whose tokenizer drops characters; a bundle of it still answers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

from qadeploy import Answerer
from qadeploy.cli import main
from qadeploy.errors import InputError
from qadeploy.inference.bundle import MANIFEST, TOKENIZER, open_bundle, seal
from qadeploy.training.train import train
from tests.conftest import tiny_options

REFUSED = "its tokenizer has no token for ')' at the end of '(a)', so no answer could contain these characters"


def drop_punctuation(folder: Path) -> Path:
    """Changes a folder's tokenizer so that it drops punctuation."""
    file = folder / TOKENIZER
    stored = json.loads(file.read_text(encoding="utf-8"))
    parts = [{"type": "Punctuation", "behavior": "Removed"}, stored["pre_tokenizer"]]
    stored["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": parts}
    file.write_text(json.dumps(stored), encoding="utf-8")
    return folder


def test_train_refuses_it_before_it_writes_anything(tiny, tiny_checkpoint, tmp_path):
    base = drop_punctuation(Path(shutil.copytree(tiny_checkpoint, tmp_path / "base")))
    with pytest.raises(InputError) as caught:
        train(tiny_options(tiny.data, base, tmp_path / "run"), print, progress=False)
    assert str(caught.value).startswith(f"{base}: {REFUSED}")
    assert not list(tmp_path.glob("run*/**/*"))


def test_export_refuses_it(tiny, tmp_path):
    run = Path(shutil.copytree(tiny.run, tmp_path / "run"))
    drop_punctuation(run / "checkpoint")
    result = CliRunner().invoke(main, ["export", str(run), "--out", str(tmp_path / "made")])
    assert (result.exit_code, REFUSED in result.stderr) == (2, True)
    assert not list(tmp_path.glob("made*"))


def test_a_bundle_of_it_still_answers(bundle, tmp_path):
    values = {
        name: value for name, value in open_bundle(bundle).manifest.items() if name not in {"schema", "files", "probe"}
    }
    folder = drop_punctuation(Path(shutil.copytree(bundle, tmp_path / "bundle")))
    (folder / MANIFEST).unlink()
    seal(folder, values)
    context = "Here (Ada) keeps the lamp in room 3!"
    answers = Answerer.load(folder, device="cpu").answer("Who keeps the lamp?", context, top_k=100)
    assert {"Here", "(Ada", "Here (Ada", ") keeps", "3"} <= {answer.text for answer in answers}
    assert all(answer.text == context[answer.start : answer.end] and answer.end < len(context) for answer in answers)

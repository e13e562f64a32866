"""A model repository: its content, what stays untouched, and no trace of a model that could not be added."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from qadeploy import Answerer
from qadeploy.cli import main
from qadeploy.data.loading import read
from qadeploy.errors import BundleError, InputError
from qadeploy.inference.bundle import MANIFEST, MODEL, Bundle, open_bundle
from qadeploy.integrations.onnx_standalone.in_graph import spans_in_graph
from qadeploy.integrations.triton import repository as module
from qadeploy.integrations.triton.model_config import check_config, require_schema, tensors_of
from qadeploy.integrations.triton.repository import add_bundle, measure_effects
from qadeploy.machine import usable_cpus
from tests.conftest import sealed_copy
from tests.models_for_tests import bare_model


def names(folder: Path) -> list[str]:
    """The names of all files below a folder, hidden ones included."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def config(model: Path):
    bundle = model / "1"
    return check_config(
        (model / "config.pbtxt").read_text(), model / "config.pbtxt", tensors_of((bundle / MODEL).read_bytes())
    )


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    return tmp_path / "repository"


def test_a_model_of_the_same_name_that_is_not_ours_is_left_alone(bundle, repository):
    add_bundle(open_bundle(bundle), repository)
    place = repository / "keepers/config.pbtxt"
    text = re.sub(r"parameters \{.*?\}\s*\}", "", place.read_text(), flags=re.DOTALL)
    assert "qadeploy_bundle_" not in text
    place.write_text(text)
    (repository / "keepers/1" / MANIFEST).unlink()  # the model of another tool
    before = names(repository)
    with pytest.raises(
        InputError, match=r"config\.pbtxt: names no bundle in its parameters, so the model is not one that"
    ):
        add_bundle(open_bundle(bundle), repository)
    assert (names(repository), place.read_text()) == (before, text)


def test_a_version_is_the_bundle_whole(bundle, repository):
    added = add_bundle(open_bundle(bundle), repository)
    assert (added.name, added.version, added.folder, added.new) == ("keepers", 1, repository / "keepers/1", True)
    files = [MANIFEST, *open_bundle(bundle).manifest["files"]]
    assert names(repository) == sorted(
        ["keepers", "keepers/1", "keepers/config.pbtxt", *(f"keepers/1/{f}" for f in files)]
    )
    assert all((added.folder / name).read_bytes() == (bundle / name).read_bytes() for name in files)
    assert names(repository.parent) == ["repository", *(f"repository/{name}" for name in names(repository))]
    assert Answerer.load(added.folder).answer("Who keeps the lamp?", "Ada keeps the lamp.")[0].text == "Ada"
    found = config(repository / "keepers")
    assert found.parameters["qadeploy_bundle_1"].string_value == open_bundle(bundle).hash
    assert (found.name, found.max_batch_size, found.instance_group[0].count) == ("keepers", 1, usable_cpus())
    assert found.HasField("dynamic_batching")  # so that raising max_batch_size is enough


def test_int8_runs_window_by_window_as_its_windows_move_each_other(plain_int8, repository):
    int8 = open_bundle(plain_int8)
    effects = measure_effects(int8)
    assert effects.together > 1e-3
    assert not effects.sound
    added = add_bundle(int8, repository)
    found = config(repository / "keepers-int8")
    assert found.max_batch_size == 1
    assert not found.HasField("dynamic_batching")
    assert any(f"by up to {effects.together:.2g}" in remark for remark in added.remarks)
    with pytest.raises(InputError, match=r"keepers-int8: max_batch is 4, but windows of this bundle that run together"):
        add_bundle(int8, repository.with_name("other"), max_batch=4)
    assert not repository.with_name("other").exists()


def test_fp32_runs_together_as_alone(bundle):
    effects = measure_effects(open_bundle(bundle))
    assert effects.together < 1e-5
    assert effects.sound


def test_fp16_is_for_gpus(tiny_fp16, repository):
    add_bundle(open_bundle(tiny_fp16), repository)
    found = config(repository / tiny_fp16.name)
    assert found.instance_group[0].kind == require_schema().ModelInstanceGroup.KIND_GPU
    assert (found.max_batch_size, found.dynamic_batching.max_queue_delay_microseconds) == (32, 500)
    assert {each.data_type for each in found.output} == {require_schema().TYPE_FP32}


@pytest.fixture(scope="module")
def tiny_fp16(bundle, tmp_path_factory) -> Path:
    """The tiny bundle in fp16, by the converter of the export."""
    from qadeploy.export.fp16 import to_fp16

    opened = open_bundle(bundle)
    fp16 = to_fp16(opened.read(MODEL), opened.manifest["architecture"])
    folder = tmp_path_factory.mktemp("fp16") / "keepers-fp16"
    return sealed_copy(bundle, folder, fp16.model, precision="fp16", inputs=opened.manifest["inputs"])


@pytest.fixture(scope="module")
def spans(tiny, tiny_export, tiny_fp16, tmp_path_factory, plain_int8: Path) -> dict[str, Bundle]:
    """Bundles with a span head of 5 spans: of fp32, int8 and fp16."""
    root, examples = tmp_path_factory.mktemp("spans"), read(str(tiny.data)).examples[:4]
    sources = [open_bundle(folder) for folder in (tiny.bundle(), plain_int8, tiny_fp16)]
    return {s.precision: spans_in_graph(s, root / f"{s.name}-spans", examples, top_k=5) for s in sources}


@pytest.mark.parametrize(("precision", "batch"), [("fp32", 1), ("int8", 1), ("fp16", 32)])
def test_a_span_head_is_run_as_the_bundle_that_it_was_made_from(precision, batch, spans, repository):
    made = spans[precision]
    added = add_bundle(made, repository)
    assert (added.folder / MODEL).read_bytes() == made.read(MODEL)
    found = config(repository / made.name)
    inputs = [(each.name, list(each.dims)) for each in found.input]
    assert inputs == [(name, [-1]) for name in made.manifest["inputs"]]
    assert inputs[-1][0] == "context_mask"
    schema = require_schema()
    assert [(each.name, schema.DataType.Name(each.data_type), list(each.dims)) for each in found.output] == [
        ("start_logits", "TYPE_FP32", [-1]),
        ("end_logits", "TYPE_FP32", [-1]),
        ("span_scores", "TYPE_FP32", [5]),
        ("span_starts", "TYPE_INT64", [5]),
        ("span_ends", "TYPE_INT64", [5]),
        ("log_sum", "TYPE_FP32", [1]),
        ("null_scores", "TYPE_FP32", [1]),
    ]
    assert found.max_batch_size == batch
    assert found.HasField("dynamic_batching") == (precision != "int8")
    assert set(found.model_warmup[0].inputs) == set(made.manifest["inputs"])


def test_windows_of_a_span_head_move_each_other_where_those_of_its_bundle_do(spans, tmp_path):
    assert measure_effects(spans["fp32"]).together < 1e-5
    assert measure_effects(spans["int8"]).together > 1e-3
    add_bundle(spans["fp32"], tmp_path / "repository", max_batch=4)
    with pytest.raises(InputError, match=r"keepers-int8-spans: max_batch is 4, but windows of this bundle that run"):
        add_bundle(spans["int8"], tmp_path / "repository", max_batch=4)
    assert os.listdir(tmp_path / "repository") == ["keepers-spans"]


def test_a_head_of_more_spans_is_another_model(spans, bundle, tiny, tmp_path, repository):
    add_bundle(spans["fp32"], repository)
    examples = read(str(tiny.data)).examples[:4]
    other = spans_in_graph(open_bundle(bundle), tmp_path / "keepers-spans", examples, top_k=4)
    with pytest.raises(
        InputError, match=r"span_ends TYPE_INT64 \[5\] is not the model's \(span_ends TYPE_INT64 \[4\]\)"
    ):
        add_bundle(other, repository)
    assert sorted(os.listdir(repository / "keepers-spans")) == ["1", "config.pbtxt"]


def test_what_the_session_asks_and_triton_cannot_is_said(bundle, tmp_path, repository):
    session = {"disabled_optimizers": ["SkipLayerNormFusion"], "config": {"session.intra_op.allow_spinning": "0"}}
    asking = open_bundle(sealed_copy(bundle, tmp_path / "asking", session=session))
    (remark,) = [r for r in add_bundle(asking, repository).remarks if r.startswith("Without")]
    assert "disabled_optimizers SkipLayerNormFusion; session.intra_op.allow_spinning 0" in remark
    assert f"# {remark}\n" in (repository / "asking/config.pbtxt").read_text()
    plain = open_bundle(sealed_copy(bundle, tmp_path / "plain", session={}))
    assert not any(r.startswith("Without") for r in add_bundle(plain, repository).remarks)


def test_another_bundle_of_the_name_is_the_next_version_and_the_edited_file_stays(bundle, tmp_path, repository):
    first = add_bundle(open_bundle(bundle), repository)
    place = repository / "keepers/config.pbtxt"
    edited = place.read_text().replace(f"count: {usable_cpus()}", "count: 7") + "# ours\n"
    place.write_text(edited)
    (repository / "keepers/notes").mkdir()
    second = open_bundle(sealed_copy(bundle, tmp_path / "keepers", name="again"))
    added = add_bundle(second, repository)
    assert (added.version, added.new, added.folder) == (2, True, repository / "keepers/2")
    assert place.read_text().startswith(edited)
    found = config(repository / "keepers")
    hashes = {key: value.string_value for key, value in found.parameters.items() if key.startswith("qadeploy")}
    assert hashes == {"qadeploy_bundle_1": open_bundle(bundle).hash, "qadeploy_bundle_2": second.hash}
    assert found.instance_group[0].count == 7
    before = names(repository)
    assert add_bundle(second, repository) == module.Added("keepers", 2, repository / "keepers/2", False)
    assert names(repository) == before
    assert open_bundle(first.folder).hash == open_bundle(bundle).hash
    assert add_bundle(open_bundle(bundle), repository).version == 3  # back to the first: Triton serves the newest


def test_a_run_that_was_cut_off_between_the_file_and_the_version(bundle, tmp_path, repository, monkeypatch):
    add_bundle(open_bundle(bundle), repository)
    lost = open_bundle(sealed_copy(bundle, tmp_path / "lost/keepers", name="lost"))
    kept = open_bundle(sealed_copy(bundle, tmp_path / "kept/keepers", name="kept"))

    def cut_off(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module.os, "rename", cut_off)
        with pytest.raises(KeyboardInterrupt):
            add_bundle(lost, repository)
    assert sorted(os.listdir(repository / "keepers")) == ["1", "config.pbtxt"]
    assert add_bundle(kept, repository).version == 2
    text = (repository / "keepers/config.pbtxt").read_text()
    assert text.count("qadeploy_bundle_2") == 1
    assert config(repository / "keepers").parameters["qadeploy_bundle_2"].string_value == kept.hash


def test_a_full_disk_leaves_nothing(bundle, repository, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.shutil, "copyfile", full)
    with pytest.raises(OSError, match="No space left"):
        add_bundle(open_bundle(bundle), repository)
    assert names(repository.parent) == ["repository"]
    assert names(repository) == []


def test_a_repository_in_a_folder_that_may_not_be_written_is_enough(bundle, repository, monkeypatch):
    """Root may write anywhere, so the refusals of the system are imitated."""
    repository.mkdir()
    access, mkdir = os.access, os.mkdir

    def denied(path: Path, *mode: int) -> None:
        if Path(path).parent == repository.parent:
            raise PermissionError(13, "Permission denied", str(path))
        mkdir(path, *mode)

    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != repository.parent and access(path, mode))
    monkeypatch.setattr(os, "mkdir", denied)
    added = add_bundle(open_bundle(bundle), repository)
    assert open_bundle(added.folder).hash == open_bundle(bundle).hash
    assert os.listdir(repository) == ["keepers"]


def test_other_models_are_left_alone(bundle, repository):
    other = repository / "other"
    (other / "1").mkdir(parents=True)
    (other / "config.pbtxt").write_text("theirs")
    times = {path: path.stat().st_mtime_ns for path in other.rglob("*")}
    add_bundle(open_bundle(bundle), repository)
    assert {path: path.stat().st_mtime_ns for path in other.rglob("*")} == times


def test_what_cannot_be_a_repository_or_a_model_is_named(bundle, tmp_path, repository):
    opened = open_bundle(bundle)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file: is a file: a model repository is a folder"):
        add_bundle(opened, tmp_path / "file")
    with pytest.raises(InputError, match="is a bundle, not a model repository: give the folder that holds the models"):
        add_bundle(opened, bundle)
    add_bundle(opened, repository)
    with pytest.raises(InputError, match="keepers: is one model's folder in a repository, not a model repository"):
        add_bundle(opened, repository / "keepers")
    with pytest.raises(InputError, match="max_batch 0 is below 1"):
        add_bundle(opened, repository, max_batch=0)
    (tmp_path / "half/keepers").mkdir(parents=True)
    with pytest.raises(InputError, match=r"half/keepers: exists without a config\.pbtxt, so it is not a model"):
        add_bundle(opened, tmp_path / "half")


WRONG = {
    "another model's": ("input_ids", "ids", "config.pbtxt: input ids TYPE_INT64 [-1] is not the model's"),
    "no UTF-8": ("# Written", "# \udcff", "config.pbtxt: is not UTF-8 text (byte 2)"),
    "not parsed": ("max_batch_size: 1", "max_batch_size: 1,5", "is not a Triton model configuration"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_configuration_that_is_not_of_such_a_model_is_left_as_it_is(what, bundle, tmp_path, repository):
    add_bundle(open_bundle(bundle), repository)
    place = repository / "keepers/config.pbtxt"
    old, new, message = WRONG[what]
    place.write_bytes(place.read_text().replace(old, new).encode(errors="surrogateescape"))
    before = place.read_bytes()
    second = open_bundle(sealed_copy(bundle, tmp_path / "keepers", name="again"))
    with pytest.raises(InputError, match=re.escape(message)):
        add_bundle(second, repository)
    assert place.read_bytes() == before
    assert not (repository / "keepers/2").exists()


def test_int8_does_not_join_a_model_with_batches(plain_int8, bundle, tmp_path, repository):
    int8 = open_bundle(plain_int8)
    add_bundle(int8, repository)
    place = repository / "keepers-int8/config.pbtxt"
    place.write_text(place.read_text().replace("max_batch_size: 1", "max_batch_size: 8"))
    again = open_bundle(sealed_copy(int8.folder, tmp_path / "keepers-int8", name="again"))
    with pytest.raises(InputError, match=r"config\.pbtxt: max_batch_size is 8, but windows of this bundle .*: give 1"):
        add_bundle(again, repository)
    with pytest.raises(InputError, match=r"max_batch_size is 8, and the file is not overwritten: change it there"):
        add_bundle(again, repository, max_batch=2)


def test_a_damaged_bundle_is_not_added(bundle, tmp_path, repository):
    copy = open_bundle(shutil.copytree(bundle, tmp_path / "keepers"))
    (copy.folder / MODEL).write_bytes(b"")
    with pytest.raises(BundleError, match="does not match the manifest"):
        add_bundle(copy, repository)
    assert not (repository / "keepers").exists()


def test_a_graph_that_is_no_question_answering_model_is_named(bundle, tmp_path, repository):
    odd = open_bundle(sealed_copy(bundle, tmp_path / "odd", bare_model()))
    with pytest.raises(BundleError, match=r"odd/model\.onnx: inputs .*logits.* are not those of a question-answering"):
        add_bundle(odd, repository)
    assert not repository.exists()


# ---------------------------------------------------------------- qadeploy export --triton


def run(*args: object) -> Result:
    return CliRunner().invoke(main, ["export", *map(str, args)])


def test_a_bundle_on_the_command_line(bundle, repository):
    shown = run(bundle, "--triton", repository, "--triton-batch", 4)
    assert shown.exit_code == 0, shown.output
    assert shown.stdout.splitlines()[0] == f"{repository}/keepers/1: added, version 1"
    assert config(repository / "keepers").max_batch_size == 4
    again = run(bundle, "--triton", repository, "--json")
    (entry,) = json.loads(again.stdout)["triton"].values()
    assert (entry["name"], entry["version"], entry["new"]) == ("keepers", 1, False)


def test_a_run_on_the_command_line(tiny, tmp_path, repository, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = run(tiny.run, "--spans-in-graph", "--triton", repository, "--json")
    assert found.exit_code == 0, found.output
    value = json.loads(found.stdout)
    assert [Path(folder).name for folder in value["bundles"]] == ["keepers", "keepers-fused", "keepers-spans"]
    assert sorted(os.listdir(repository)) == ["keepers", "keepers-spans"]
    assert list(value["triton"]) == [f"{repository}/keepers/1", f"{repository}/keepers-spans/1"]


def test_a_bundle_with_text_in_its_graph_is_refused_or_said(bundle, tiny, tmp_path, repository):
    mine = Path(shutil.copytree(bundle, tmp_path / "mine"))
    both = run(mine, "--spans-in-graph", "--strings-in-graph", "--eval-data", tiny.data, "--triton", repository)
    assert both.exit_code == 0, both.output
    assert (
        f"{mine}-text: not for Triton, because it takes one question per run: left out of {repository}" in both.stdout
    )
    assert f"{repository}/mine-spans/1: added, version 1" in both.stdout
    assert sorted(os.listdir(repository)) == ["mine", "mine-spans"]
    refused = run(f"{mine}-text", "--triton", tmp_path / "other")
    assert refused.exit_code == 2
    assert f"give the bundle that it was made from, {mine.name}, or its NAME-spans" in refused.stderr
    assert not (tmp_path / "other").exists()


def test_what_cannot_be_done_is_said_before_anything_is(bundle, tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for args, message in (
        (
            (bundle, "--triton", "r", "--quantize"),
            "is a bundle, which allows only --spans-in-graph, --text-in-graph, --web and --triton: give the run for",
        ),
        ((bundle, "--triton", bundle), "is a bundle, not a model repository"),
        ((tiny.run, "--triton", bundle), "is a bundle, not a model repository"),
    ):
        result = run(*args)
        assert result.exit_code == 2
        assert message in result.stderr
    assert list(tmp_path.iterdir()) == []

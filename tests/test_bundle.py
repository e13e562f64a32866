"""The bundle folder: written completely or not at all, and refused if anything in it differs from its manifest."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from qadeploy import files
from qadeploy.core.settings import QaSettings
from qadeploy.core.windows import EncoderConfig
from qadeploy.errors import BundleError, InputError
from qadeploy.files import hash_file
from qadeploy.inference.bundle import manifest_text, newest_bundle, open_bundle, seal, writing_bundle

INPUTS = ("input_ids", "attention_mask", "token_type_ids")
FILES = ("README.md", "model.onnx", "tokenizer.json")
ENCODER = EncoderConfig(segments=2, context_first=False, null_token_id=1, pad_token_id=0, position_limit=512)
SETTINGS = QaSettings(max_seq_len=64, doc_stride=16, max_answer_len=8)
MANIFEST = {
    "precision": "fp32",
    "encoder": ENCODER.to_dict(),
    "settings": SETTINGS.to_dict(),
    "base_model": "tiny – by hand",
}


def tiny_model(weight: float = 2.0, *extra: onnx.NodeProto) -> onnx.ModelProto:
    """start = input_ids * weight, end = token_type_ids * weight, both ``[batch, sequence]``."""
    ints = [helper.make_tensor_value_info(n, TensorProto.INT64, ["batch", "sequence"]) for n in INPUTS]
    logits = [
        helper.make_tensor_value_info(n, TensorProto.FLOAT, ["batch", "sequence"])
        for n in ("start_logits", "end_logits")
    ]
    nodes = [
        helper.make_node("Cast", ["input_ids"], ["a"], to=TensorProto.FLOAT),
        helper.make_node("Cast", ["token_type_ids"], ["b"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["a", "weight"], ["start_logits"]),
        helper.make_node("Mul", ["b", "weight"], ["end_logits"]),
        *extra,
    ]
    weights = [numpy_helper.from_array(np.full(64, weight, np.float32)[:1], "weight")]
    graph = helper.make_graph(nodes, "tiny", ints, logits, weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)


def tiny_tokenizer() -> str:
    words = {word: n for n, word in enumerate(["[PAD]", "[CLS]", "[SEP]", "sky", "blue"])}
    return Tokenizer(WordLevel(words, unk_token="[PAD]")).to_str()


def fill(work: Path, model: bytes | None = None) -> None:
    (work / "model.onnx").write_bytes(tiny_model().SerializeToString() if model is None else model)
    (work / "tokenizer.json").write_text(tiny_tokenizer(), encoding="utf-8")
    (work / "README.md").write_text("# A tiny model\n", encoding="utf-8")


def write(out: Path, model: bytes | None = None, **manifest: object) -> Path:
    with writing_bundle(out) as work:
        fill(work, model)
        seal(work, {**MANIFEST, **manifest})
    return out


def manifest_of(folder: Path) -> dict[str, object]:
    value = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    del value["manifest_sha256"]
    return value


def put_manifest(folder: Path, value: object) -> None:
    text = manifest_text(value) if isinstance(value, dict) else json.dumps(value)
    (folder / "manifest.json").write_text(text, encoding="utf-8")


@pytest.fixture(autouse=True)
def flushed(monkeypatch) -> list[str]:
    """The names of the files to flush, in order. Flushing itself is skipped, because a disk can take a second for it."""
    names: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda fd: names.append(Path(os.readlink(f"/proc/self/fd/{fd}")).name))
    return names


@pytest.fixture
def bundle(tmp_path) -> Path:
    return write(tmp_path / "tiny")


# ---------------------------------------------------------------- written and read


def test_a_bundle_opens_as_it_was_sealed(tmp_path):
    folder = write(tmp_path / "bundles" / "tiny", eval={"f1": 0.5})
    found = open_bundle(str(folder))
    assert (found.folder, found.encoder, found.settings) == (folder, ENCODER, SETTINGS)
    assert found.manifest == {"schema": 1, **MANIFEST, "eval": {"f1": 0.5}, "files": found.manifest["files"]}
    assert found.manifest["files"] == {
        name: {"size": (folder / name).stat().st_size, "sha256": hash_file(folder / name)} for name in FILES
    }
    assert (found.name, found.precision) == ("tiny", "fp32")
    assert found.model_bytes == (folder / "model.onnx").stat().st_size
    assert found.hash == hash_file(folder / "manifest.json")
    assert {name: found.read(name) for name in FILES} == {name: (folder / name).read_bytes() for name in FILES}
    assert [p.name for p in folder.parent.iterdir()] == ["tiny"]


def test_the_model_of_a_bundle_runs_from_its_bytes(bundle):
    session = onnxruntime.InferenceSession(open_bundle(bundle).read("model.onnx"), providers=["CPUExecutionProvider"])
    ids = np.arange(6, dtype=np.int64).reshape(2, 3)
    start, end = session.run(["start_logits", "end_logits"], dict.fromkeys(INPUTS, ids))
    assert start.tolist() == end.tolist() == (ids * 2.0).tolist()


def test_the_hash_tells_bundles_apart(tmp_path):
    one, same, other = (write(tmp_path / name, base_model=name[0]) for name in ("a1", "a2", "b"))
    assert open_bundle(one).hash == open_bundle(same).hash != open_bundle(other).hash


def test_the_manifest_is_flushed_last(tmp_path, flushed):
    write(tmp_path / "tiny")
    assert flushed[:3] == list(FILES)
    assert flushed[3].startswith(".manifest.json.")
    assert flushed[4:] == [tmp_path.name]  # the rename itself


# ---------------------------------------------------------------- what is not as sealed


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("place", [0.0, 0.5, 0.999])
def test_one_changed_byte(bundle, name, place):
    path = bundle / name
    data = bytearray(path.read_bytes())
    data[int(len(data) * place)] ^= 1
    path.write_bytes(data)
    with pytest.raises(BundleError) as caught:
        open_bundle(bundle)
    assert str(caught.value).startswith(f"{path}: does not match the manifest (size or SHA-256 differ): ")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("change", [lambda data: data[:-1], lambda data: data + b"\n", lambda data: b""])
def test_a_file_cut_or_grown(bundle, name, change):
    path = bundle / name
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(BundleError, match=f"{path}: does not match the manifest"):
        open_bundle(bundle)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("instead", ["nothing", "link", "folder"])
def test_a_file_missing_or_not_a_plain_file(bundle, tmp_path, name, instead):
    path = bundle / name
    shutil.copy(path, tmp_path / "same")
    path.unlink()
    if instead == "link":
        path.symlink_to(tmp_path / "same")
    elif instead == "folder":
        path.mkdir()
    with pytest.raises(BundleError, match=f"{path}: is missing or not a plain file"):
        open_bundle(bundle)


@pytest.mark.parametrize("name", ["extra.bin", ".hidden", "folder"])
def test_a_file_that_the_manifest_does_not_list(bundle, name):
    if name == "folder":
        (bundle / name).mkdir()
    else:
        (bundle / name).write_text("x")
    with pytest.raises(BundleError, match=f"{bundle}: holds {name}, which the manifest does not list: remove it"):
        open_bundle(bundle)


def test_a_file_changed_after_opening(bundle):
    found = open_bundle(bundle)
    (bundle / "tokenizer.json").write_text("{}")
    with pytest.raises(BundleError, match=r"tokenizer\.json: does not match the manifest"):
        found.read("tokenizer.json")


@pytest.mark.parametrize(
    "name", ["../outside", "..", ".", "sub/file", "/etc/hostname", "README.md/", "a\\b", "manifest.json"]
)
def test_a_manifest_may_list_plain_names_only(bundle, name):
    (bundle.parent / "outside").write_bytes(b"")
    (bundle / "sub").mkdir()
    (bundle / "sub" / "file").write_bytes(b"")
    value = manifest_of(bundle)
    value["files"][name] = {"size": 0, "sha256": hash_file(bundle / "sub" / "file")}
    put_manifest(bundle, value)
    with pytest.raises(BundleError) as caught:
        open_bundle(bundle)
    assert str(caught.value) == f"{bundle / 'manifest.json'}: lists {name!r}: only plain file names are allowed"


@pytest.mark.parametrize("name", ["", "a\0b", "x" * 300])
def test_a_manifest_may_list_names_that_a_file_can_have_only(bundle, name):
    value = manifest_of(bundle)
    value["files"][name] = value["files"]["README.md"]
    put_manifest(bundle, value)
    with pytest.raises(BundleError, match=r"only plain file names are allowed|is missing or not a plain file"):
        open_bundle(bundle)


@pytest.mark.parametrize("name", FILES)
def test_a_manifest_must_list_what_a_bundle_needs(bundle, name):
    value = manifest_of(bundle)
    del value["files"][name]
    put_manifest(bundle, value)
    (bundle / name).unlink()
    with pytest.raises(BundleError, match=f"does not list {name}: export the bundle again"):
        open_bundle(bundle)


@pytest.mark.parametrize("schema", [0, 2, "1", None, "absent"])
def test_an_unknown_schema(bundle, schema):
    value = {**manifest_of(bundle), "schema": schema}
    if schema == "absent":
        value.pop("schema")
    put_manifest(bundle, value)
    named = None if schema == "absent" else schema
    with pytest.raises(BundleError, match=f"schema {named!r} is not 1, which this version of qadeploy reads"):
        open_bundle(bundle)


@pytest.mark.parametrize(
    "text", [b"", b"{", b"\xff", b"[]", b"null", b'{"schema": 1}', b"[" * 100_000, b'{"schema": ' + b"1" * 5000 + b"}"]
)
def test_a_damaged_manifest(bundle, text):
    path = bundle / "manifest.json"
    path.write_bytes(text)
    with pytest.raises(BundleError) as caught:
        open_bundle(bundle)
    assert str(caught.value).startswith(f"{path}: ")


@pytest.mark.parametrize("key", ["encoder", "settings", "precision", "files"])
@pytest.mark.parametrize("value", ["absent", 7, None, []])
def test_a_manifest_with_a_key_missing_or_of_another_kind(bundle, key, value):
    manifest = {**manifest_of(bundle), key: value}
    if value == "absent":
        del manifest[key]
    put_manifest(bundle, manifest)
    with pytest.raises(BundleError) as caught:
        open_bundle(bundle)
    assert str(caught.value).startswith(f"{bundle / 'manifest.json'}: {key} must be ")


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("encoder", "segments"), "absent"),
        (("encoder", "segments"), -1),
        (("settings", "max_seq_len"), "long"),
        (("settings", "doc_stride"), -1),
        (("files", "model.onnx"), "x"),
        (("files", "model.onnx", "size"), "absent"),
        (("files", "model.onnx", "size"), "many"),
        (("files", "model.onnx", "size"), 1),
        (("files", "model.onnx", "sha256"), "absent"),
        (("files", "model.onnx", "sha256"), "0" * 64),
        (("files", "model.onnx", "sha256"), None),
    ],
)
def test_a_manifest_wrong_inside(bundle, path, value):
    manifest = manifest_of(bundle)
    inner = manifest
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    if value == "absent":
        del inner[path[-1]]
    put_manifest(bundle, manifest)
    with pytest.raises(BundleError, match=r"manifest\.json: |model\.onnx: does not match"):
        open_bundle(bundle)


def test_a_manifest_that_is_a_link(bundle, tmp_path):
    os.replace(bundle / "manifest.json", tmp_path / "manifest.json")
    (bundle / "manifest.json").symlink_to(tmp_path / "manifest.json")
    with pytest.raises(BundleError, match=r"has no manifest\.json: this is not a bundle"):
        open_bundle(bundle)


def test_a_folder_that_is_no_bundle_and_one_that_is_not_there(tmp_path):
    with pytest.raises(BundleError, match=r"has no manifest\.json: this is not a bundle"):
        open_bundle(tmp_path)
    for path in (tmp_path / "absent", Path(__file__)):
        with pytest.raises(InputError, match="no such bundle folder: make one with qadeploy export"):
            open_bundle(path)


def test_a_folder_that_the_system_does_not_let_be_read_is_named(bundle, monkeypatch):
    with pytest.raises(BundleError, match="xx: cannot be read: File name too long"):
        open_bundle("x" * 300)

    def denied(path: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "iterdir", denied)
    with pytest.raises(BundleError, match=f"^{re.escape(str(bundle))}: cannot be read: Permission denied$"):
        open_bundle(bundle)


@pytest.mark.parametrize("name", ["run.json", "config.json"])
def test_a_run_in_place_of_a_bundle_is_named_with_the_command_that_exports_it(tmp_path, name):
    (tmp_path / name).write_text("{}")
    said = f"not a bundle, but a run or a checkpoint: make one with qadeploy export {tmp_path}"
    with pytest.raises(BundleError, match=re.escape(said)):
        open_bundle(tmp_path)


# ---------------------------------------------------------------- writing


def test_a_manifest_of_something_else_is_no_bundle(tmp_path):
    out = tmp_path / "extension"
    (out / "src").mkdir(parents=True)
    (out / "src" / "app.js").write_text("work")
    (out / "manifest.json").write_text('{"manifest_version": 3, "name": "an extension of a browser", "files": []}')
    with pytest.raises(InputError, match="exists and is not a bundle, so it is not overwritten"):
        write(out)
    assert (out / "src" / "app.js").read_text() == "work"


@pytest.mark.parametrize("name", ["notes.txt", "data"])
def test_what_lies_beside_a_bundle_is_not_deleted(tmp_path, name):
    out = tmp_path / "mine"
    write(out)
    (out / name).mkdir() if name == "data" else (out / name).write_text("keep me")
    with pytest.raises(InputError, match=f"mine: holds {name} beside a bundle, which would be deleted: move it away"):
        write(out)
    assert (out / name).exists()


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_is_no_bundle_is_not_overwritten(tmp_path, kind):
    out = tmp_path / "out"
    kept = out if kind == "file" else out / "thesis.txt"
    kept.parent.mkdir(exist_ok=True)
    kept.write_text("ten years of work")
    with pytest.raises(InputError, match="exists and is not a bundle, so it is not overwritten"):
        write(out)
    assert kept.read_text() == "ten years of work"
    assert list(tmp_path.iterdir()) == [out]


def test_a_link_is_not_overwritten(tmp_path, bundle):
    (tmp_path / "current").symlink_to("tiny")
    with pytest.raises(InputError, match="current: is a link, which is not overwritten: give --out the folder itself"):
        write(tmp_path / "current")
    assert (tmp_path / "current").readlink() == Path("tiny")


def test_what_is_put_beside_a_bundle_while_another_is_made_is_not_deleted(bundle):
    with pytest.raises(InputError, match=r"tiny: holds notes\.txt beside a bundle"), writing_bundle(bundle) as work:  # noqa: PT012
        fill(work)
        seal(work, MANIFEST)
        (bundle / "notes.txt").write_text("keep me")
    assert (bundle / "notes.txt").read_text() == "keep me"
    assert [p.name for p in bundle.parent.iterdir()] == ["tiny"]


def test_a_second_writer_is_refused_and_the_first_one_goes_on(bundle):
    with writing_bundle(bundle) as work:
        fill(work)
        with pytest.raises(
            InputError, match=rf"tiny: another command is writing it \(process {os.getpid()} on .*\): wait"
        ):
            write(bundle, precision="int8")
        seal(work, {**MANIFEST, "precision": "fp16"})
    assert open_bundle(bundle).precision == "fp16"
    assert [p.name for p in bundle.parent.iterdir()] == ["tiny"]


def test_an_empty_folder_is_taken(tmp_path):
    (tmp_path / "out").mkdir()
    assert open_bundle(write(tmp_path / "out")).name == "out"


def test_an_old_bundle_is_replaced_whole(tmp_path, bundle):
    (bundle / "model.onnx").write_bytes(b"damaged")
    new = write(bundle, tiny_model(3.0).SerializeToString(), precision="int8")
    assert open_bundle(new).precision == "int8"
    assert {p.name for p in new.iterdir()} == {*FILES, "manifest.json"}
    assert list(tmp_path.iterdir()) == [bundle]


@pytest.mark.parametrize("when", ["inside", "unsealed", "rename"])
@pytest.mark.parametrize("older", [False, True])
@pytest.mark.parametrize("exchanges", [False, True])
def test_a_failure_leaves_nothing_of_the_new_and_all_of_the_old(tmp_path, monkeypatch, when, older, exchanges):
    out = tmp_path / "out"
    if older:
        write(out, precision="int8")
    replace = os.replace

    def fail(source, target):
        if Path(target) == out and "tmp" in Path(source).name:
            raise OSError("disk full")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail)
    monkeypatch.setattr(
        files, "_renameat2", lambda: (lambda *_: ctypes.set_errno(errno.EIO) or -1) if exchanges else None
    )
    with pytest.raises((KeyboardInterrupt, BundleError, OSError)), writing_bundle(out) as work:  # noqa: PT012
        fill(work)
        if when == "inside":
            raise KeyboardInterrupt
        if when == "rename":
            seal(work, MANIFEST)
    assert list(tmp_path.iterdir()) == [out] * older
    assert not older or open_bundle(out).precision == "int8"


def test_a_reader_never_sees_a_bundle_in_the_making(tmp_path):
    with writing_bundle(tmp_path / "out") as work:
        fill(work)
        seal(work, MANIFEST)
        assert work.parent == tmp_path
        assert not (tmp_path / "out").exists()
        with pytest.raises(InputError, match="holds no bundle yet"):
            newest_bundle(tmp_path)
    assert newest_bundle(tmp_path) == tmp_path / "out"


def test_the_newest_bundle_is_the_one_sealed_last(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in (Path("bundles"), tmp_path / "absent"):
        with pytest.raises(InputError, match=f"{folder}: holds no bundle yet: run qadeploy export first"):
            newest_bundle(folder)
    for age, name in enumerate(["z", "a", "m"]):
        write(Path("bundles") / name)
        os.utime(Path("bundles") / name / "manifest.json", (1000 - age, 1000 - age))
    Path("bundles/notes").mkdir()
    Path("bundles/file").write_text("x")
    assert newest_bundle() == Path("bundles/z")
    os.utime("bundles/a/manifest.json", (2000, 2000))
    assert newest_bundle() == Path("bundles/a")


def test_the_newest_bundle_is_judged_by_what_it_is_not_by_its_name(tmp_path):
    for name in ("plain-text", "my-fp16"):
        write(tmp_path / name)
        assert newest_bundle(tmp_path) == tmp_path / name
    for age, more in enumerate(
        ({"made": {"graph": "fused", "fused_nodes": {}}}, {"made": {"for": "cuda"}}, {"in_graph": {"kind": "spans"}})
    ):
        write(tmp_path / f"special{age}", **more)
        os.utime(tmp_path / f"special{age}" / "manifest.json", (2**31, 2**31))
    assert newest_bundle(tmp_path) == tmp_path / "my-fp16"

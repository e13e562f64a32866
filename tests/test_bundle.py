"""The bundle folder: written whole or not at all, and refused where anything in it is not as sealed."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, external_data_helper, helper, numpy_helper
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from qadeploy.core.settings import QaSettings
from qadeploy.core.windows import EncoderConfig
from qadeploy.errors import BundleError, InputError
from qadeploy.files import hash_file
from qadeploy.inference.bundle import (
    Bundle,
    has_external_data,
    manifest_text,
    newest_bundle,
    open_bundle,
    seal,
    writing_bundle,
)

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
    """The names of the files flushed, in order. They are not: a disk can take a second for it."""
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
    assert found == Bundle(folder, manifest_of(folder), ENCODER, SETTINGS)
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
    assert len(flushed) == 4


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
    (bundle / "tokenizer.json").unlink()
    with pytest.raises(BundleError, match=r"tokenizer\.json: is missing or not a plain file"):
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
    assert str(caught.value) == f"{bundle / 'manifest.json'}: lists {name!r}: only plain file names may stand there"


@pytest.mark.parametrize("name", ["", "a\0b", "x" * 300])
def test_a_manifest_may_list_names_that_a_file_can_have_only(bundle, name):
    value = manifest_of(bundle)
    value["files"][name] = value["files"]["README.md"]
    put_manifest(bundle, value)
    with pytest.raises(BundleError, match=r"is missing or not a plain file|cannot be read: File name too long"):
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
    elif key == "precision":
        return
    put_manifest(bundle, manifest)
    with pytest.raises(BundleError) as caught:
        open_bundle(bundle)
    assert str(caught.value).startswith(f"{bundle / 'manifest.json'}: is incomplete: ")


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
    with pytest.raises(BundleError, match=r"no manifest\.json in it: this is not a bundle"):
        open_bundle(bundle)


def test_a_folder_that_is_no_bundle_and_one_that_is_not_there(tmp_path):
    with pytest.raises(BundleError, match=r"no manifest\.json in it: this is not a bundle"):
        open_bundle(tmp_path)
    for path in (tmp_path / "absent", Path(__file__)):
        with pytest.raises(InputError, match="no such bundle folder: make one with qadeploy export"):
            open_bundle(path)


# ---------------------------------------------------------------- writing


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


def test_an_empty_folder_is_taken(tmp_path):
    (tmp_path / "out").mkdir()
    assert open_bundle(write(tmp_path / "out")).name == "out"


def test_an_old_bundle_is_replaced_whole(tmp_path, bundle):
    (bundle / "left-over.txt").write_text("x")
    new = write(bundle, tiny_model(3.0).SerializeToString(), precision="int8")
    assert open_bundle(new).precision == "int8"
    assert {p.name for p in new.iterdir()} == {*FILES, "manifest.json"}
    assert list(tmp_path.iterdir()) == [bundle]


@pytest.mark.parametrize("when", ["inside", "unsealed", "rename"])
@pytest.mark.parametrize("older", [False, True])
def test_a_failure_leaves_nothing_of_the_new_and_all_of_the_old(tmp_path, monkeypatch, when, older):
    out = tmp_path / "out"
    if older:
        write(out, precision="old")
    replace = os.replace

    def fail(source, target):
        if Path(target) == out and "tmp" in Path(source).name:
            raise OSError("disk full")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises((KeyboardInterrupt, BundleError, OSError)), writing_bundle(out) as work:  # noqa: PT012
        fill(work)
        if when == "inside":
            raise KeyboardInterrupt
        if when == "rename":
            seal(work, MANIFEST)
    assert list(tmp_path.iterdir()) == [out] * older
    assert not older or open_bundle(out).precision == "old"


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


# ---------------------------------------------------------------- external data


def tensor(name: str, *, external: bool) -> TensorProto:
    found = numpy_helper.from_array(np.ones(4, np.float32), name)
    if external:
        external_data_helper.set_external_data(found, location="weights.bin", offset=0, length=16)
        found.ClearField("raw_data")
    return found


def constant(*, external: bool) -> onnx.NodeProto:
    return helper.make_node("Constant", [], ["c"], value=tensor("c", external=external))


def subgraph(node: onnx.NodeProto | None = None, weights: list[TensorProto] | None = None) -> onnx.GraphProto:
    output = helper.make_tensor_value_info("c", TensorProto.FLOAT, [4])
    return helper.make_graph([node] if node else [], "branch", [], [output], weights or [])


def conditional(branch: onnx.GraphProto) -> onnx.NodeProto:
    return helper.make_node("If", ["yes"], ["d"], then_branch=subgraph(constant(external=False)), else_branch=branch)


def with_initializer(*, external: bool) -> onnx.ModelProto:
    model = tiny_model()
    model.graph.initializer.append(tensor("w", external=external))
    return model


def with_tensors_attribute(*, external: bool) -> onnx.ModelProto:
    node = helper.make_node("Many", [], ["c"], domain="own")
    node.attribute.append(
        helper.make_attribute("values", [tensor("a", external=False), tensor("b", external=external)])
    )
    return tiny_model(2.0, node)


def with_graphs_attribute(*, external: bool) -> onnx.ModelProto:
    node = helper.make_node("Many", [], ["c"], domain="own")
    node.attribute.append(helper.make_attribute("graphs", [subgraph(), subgraph(constant(external=external))]))
    return tiny_model(2.0, node)


def with_function(*, external: bool) -> onnx.ModelProto:
    model = tiny_model()
    opset = [helper.make_opsetid("", 17)]
    model.functions.append(helper.make_function("own", "Make", [], ["c"], [constant(external=external)], opset))
    return model


MODELS = {
    "initializer": with_initializer,
    "constant": lambda *, external: tiny_model(2.0, constant(external=external)),
    "if": lambda *, external: tiny_model(2.0, conditional(subgraph(constant(external=external)))),
    "if-initializer": lambda *, external: tiny_model(
        2.0, conditional(subgraph(weights=[tensor("c", external=external)]))
    ),
    "if-in-if": lambda *, external: tiny_model(
        2.0, conditional(subgraph(conditional(subgraph(constant(external=external)))))
    ),
    "tensors": with_tensors_attribute,
    "graphs": with_graphs_attribute,
    "function": with_function,
}


def by_onnx(model: onnx.ModelProto) -> bool:
    tensors = external_data_helper._get_all_tensors(model)
    return any(external_data_helper.uses_external_data(t) for t in tensors)


@pytest.mark.parametrize("external", [False, True])
@pytest.mark.parametrize("kind", MODELS)
def test_external_data_is_found_where_onnx_finds_it(kind, external):
    model = MODELS[kind](external=external)
    assert has_external_data(model.SerializeToString()) == by_onnx(model) == external


@pytest.mark.parametrize("external", [False, True])
def test_external_data_in_places_that_the_helper_of_onnx_leaves_out(external):
    sparse = helper.make_sparse_tensor(
        tensor("v", external=external), helper.make_tensor("i", TensorProto.INT64, [4], [0, 2, 4, 6]), [8]
    )
    in_graph = tiny_model()
    in_graph.graph.sparse_initializer.append(sparse)
    in_node = tiny_model(2.0, helper.make_node("Constant", [], ["c"], sparse_value=sparse))
    in_default = with_function(external=False)
    in_default.functions[0].attribute_proto.append(helper.make_attribute("value", tensor("d", external=external)))
    for model in (in_graph, in_node, in_default):
        assert has_external_data(model.SerializeToString()) is external


def test_a_bundle_with_external_data_is_refused_even_where_all_is_listed(tmp_path):
    with writing_bundle(tmp_path / "out") as work:
        fill(work)
        onnx.save_model(
            tiny_model(), work / "model.onnx", save_as_external_data=True, location="model.data", size_threshold=0
        )
        assert (work / "model.data").stat().st_size == 4
        seal(work, MANIFEST)
    with pytest.raises(BundleError) as caught:
        open_bundle(tmp_path / "out")
    assert (
        str(caught.value)
        == f"{tmp_path / 'out' / 'model.onnx'}: keeps weights in another file, which a bundle must not"
    )


@pytest.mark.parametrize("model", [b"\xff", b"not a model", b"\x80" * 20, tiny_model().SerializeToString()[:-40]])
def test_bytes_that_are_no_model_are_refused_even_where_sealed(tmp_path, model):
    write(tmp_path / "out", model)
    with pytest.raises(BundleError, match=r"model\.onnx: is not an ONNX model"):
        open_bundle(tmp_path / "out")


def test_a_model_nested_without_end_is_refused():
    def field(number: int, inner: bytes) -> bytes:
        size, encoded = len(inner), b""
        while size > 127:
            size, encoded = size >> 7, encoded + bytes([size & 127 | 128])
        return bytes([number << 3 | 2]) + encoded + bytes([size]) + inner

    graph = b""
    for _ in range(2000):
        graph = field(1, field(5, field(6, graph)))  # graph.node.attribute.g
    with pytest.raises(BundleError, match="is not an ONNX model"):
        has_external_data(field(7, graph))


def read_by_onnx(model: bytes) -> bool | None:
    """Whether onnx finds external data; None where it cannot read the bytes."""
    try:
        return by_onnx(onnx.load_model_from_string(model))
    except Exception:  # protobuf's own DecodeError, which onnx does not name
        return None


def read_by_us(model: bytes) -> bool | None:
    try:
        return has_external_data(model)
    except BundleError:
        return None


WHOLE = st.builds(
    lambda kind, external: MODELS[kind](external=external).SerializeToString(),
    st.sampled_from(sorted(MODELS)),
    st.booleans(),
)


@settings(max_examples=30, deadline=None)
@given(model=WHOLE, part=st.floats(0, 1))
def test_cut_bytes_are_refused_where_onnx_refuses_them(model, part):
    cut = model[: int(len(model) * part)]
    found, wanted = read_by_us(cut), read_by_onnx(cut)
    # External data found before the cut is reached is a refusal, too.
    assert found == wanted or (found, wanted) == (True, None)


@settings(max_examples=30, deadline=None)
@given(model=WHOLE, place=st.floats(0, 0.999), flip=st.integers(1, 255))
def test_no_changed_byte_hides_external_data_that_onnx_sees(model, place, flip):
    changed = bytearray(model)
    changed[int(len(model) * place)] ^= flip
    if read_by_onnx(bytes(changed)):
        assert read_by_us(bytes(changed)) in (True, None)

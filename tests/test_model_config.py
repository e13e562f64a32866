"""config.pbtxt: written and read by Triton's own schema, and compared with the model beside it."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from qadeploy.errors import BundleError, InputError
from qadeploy.inference.bundle import MODEL
from qadeploy.integrations.triton.model_config import (
    Running,
    Tensor,
    Tensors,
    bundle_parameter,
    check_config,
    require_schema,
    tensors_of,
    write_config,
)
from tests.processes_for_tests import succeeded

ANY = (-1,)
PLAIN = Tensors(
    tuple(Tensor(name, "TYPE_INT64", ANY) for name in ("input_ids", "attention_mask", "token_type_ids")),
    tuple(Tensor(name, "TYPE_FP32", ANY) for name in ("start_logits", "end_logits")),
)
CPU, GPU = Running(1, None, instances=3, threads=2), Running(32, 500, gpu=True)
PLACE = Path("repository/faq/config.pbtxt")


def parsed(text: str):
    return check_config(text, PLACE, PLAIN)


def model(*, inputs=TensorProto.INT64, batch="batch", outputs=TensorProto.FLOAT) -> bytes:
    """ids [batch, tokens] -> logits [batch, tokens, 2]."""
    given = helper.make_tensor_value_info("ids", inputs, [batch, "tokens"])
    found = helper.make_tensor_value_info("logits", outputs, [batch, "tokens", 2])
    axes = numpy_helper.from_array(np.array([2]), "axes")
    two = numpy_helper.from_array(np.array([1, 1, 2]), "two")
    nodes = [
        helper.make_node("Cast", ["ids"], ["cast"], to=outputs),
        helper.make_node("Unsqueeze", ["cast", "axes"], ["wide"]),
        helper.make_node("Expand", ["wide", "two"], ["logits"]),
    ]
    graph = helper.make_graph(nodes, "g", [given], [found], [axes, two])
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    return made.SerializeToString()


def test_a_bundles_tensors_are_those_that_onnx_reads_from_the_file(bundle):
    graph = onnx.load(bundle / MODEL).graph
    assert tensors_of((bundle / MODEL).read_bytes()) == PLAIN
    for own, theirs in ((PLAIN.inputs, graph.input), (PLAIN.outputs, graph.output)):
        assert [each.name for each in own] == [each.name for each in theirs]
        assert all(len(each.type.tensor_type.shape.dim) == 2 for each in theirs)


@pytest.mark.parametrize(
    ("kind", "name"),
    [(TensorProto.INT32, "TYPE_INT32"), (TensorProto.INT64, "TYPE_INT64"), (TensorProto.BOOL, "TYPE_BOOL")],
)
def test_types_and_fixed_sizes(kind, name):
    found = tensors_of(model(inputs=kind))
    assert found == Tensors((Tensor("ids", name, ANY),), (Tensor("logits", "TYPE_FP32", (-1, 2)),))


def test_fp16_logits():
    assert tensors_of(model(outputs=TensorProto.FLOAT16)).outputs == (Tensor("logits", "TYPE_FP16", (-1, 2)),)


def test_what_triton_cannot_run_is_named():
    with pytest.raises(BundleError, match=r"ids is \[1, 'tokens'\]: Triton needs a leading batch of any size"):
        tensors_of(model(batch=1))
    with pytest.raises(BundleError, match=r"model\.onnx: ONNX Runtime cannot load it: "):
        tensors_of(b"no model")


def test_on_a_cpu():
    text = write_config("faq", PLAIN, CPU, ["one", "two"])
    assert text.startswith('# one\n# two\nname: "faq"\n')
    config = parsed(text)
    assert (config.name, config.backend, config.max_batch_size) == ("faq", "onnxruntime", 1)
    assert [(i.name, i.data_type, list(i.dims)) for i in config.input] == [
        (name, require_schema().TYPE_INT64, [-1]) for name in ("input_ids", "attention_mask", "token_type_ids")
    ]
    assert [(o.name, o.data_type, list(o.dims)) for o in config.output] == [
        (name, require_schema().TYPE_FP32, [-1]) for name in ("start_logits", "end_logits")
    ]
    (group,) = config.instance_group
    assert (group.kind, group.count) == (require_schema().ModelInstanceGroup.KIND_CPU, 3)
    assert {k: v.string_value for k, v in config.parameters.items()} == {"intra_op_thread_count": "2"}
    assert not config.HasField("dynamic_batching")
    (warmup,) = config.model_warmup
    assert {name: list(each.dims) for name, each in warmup.inputs.items()} == {i.name: [32] for i in PLAIN.inputs}


def test_on_gpus_requests_are_joined():
    config = parsed(write_config("faq", PLAIN, GPU, []))
    (group,) = config.instance_group
    assert (group.kind, group.count) == (require_schema().ModelInstanceGroup.KIND_GPU, 1)
    assert config.max_batch_size == 32
    assert config.dynamic_batching.max_queue_delay_microseconds == 500
    assert "intra_op_thread_count" not in config.parameters  # the CPU's threads have little to do there


def test_without_a_delay_what_waits_anyway_is_joined():
    config = parsed(write_config("faq", PLAIN, Running(4, 0), []))
    assert config.HasField("dynamic_batching")
    assert not config.dynamic_batching.max_queue_delay_microseconds


def test_a_version_names_its_bundle():
    text = write_config("faq", PLAIN, CPU, []) + bundle_parameter(1, "ab") + bundle_parameter(2, "cd")
    assert {k: v.string_value for k, v in parsed(text).parameters.items() if k.startswith("qadeploy")} == {
        "qadeploy_bundle_1": "ab",
        "qadeploy_bundle_2": "cd",
    }


WRONG = {
    "no such text": ("max_batch_size: 1", "max_batch_size: many", "line 2: is not a Triton model configuration"),
    "unknown field": ("max_batch_size: 1", "max_batches: 1", "line 2: is not a Triton model configuration"),
    "name": ('name: "faq"', 'name: "other"', "name is 'other', Triton requires the folder's, 'faq'"),
    "backend": ('backend: "onnxruntime"', 'backend: "tensorrt"', "backend is 'tensorrt', a bundle needs 'onnxruntime'"),
    "no batch": ("max_batch_size: 1", "max_batch_size: 0", "max_batch_size is 0"),
    "input lost": ('name: "input_ids"', 'name: "ids"', "input ids TYPE_INT64 [-1] is not the model's (it has none of"),
    "type": ("TYPE_INT64", "TYPE_INT32", "is not the model's (attention_mask TYPE_INT64 [-1])"),
    "size": (
        "data_type: TYPE_FP32\n  dims: -1",
        "data_type: TYPE_FP32\n  dims: 384",
        "is not the model's (end_logits TYPE_FP32 [-1])",
    ),
    "output": ('name: "end_logits"', 'name: "ends"', "lacks the model's output end_logits TYPE_FP32 [-1]"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_not_the_models_is_named(what):
    old, new, message = WRONG[what]
    text = write_config("faq", PLAIN, CPU, [])
    assert old in text
    with pytest.raises(InputError) as caught:
        parsed(text.replace(old, new))
    assert str(caught.value).startswith("repository/faq/config.pbtxt: ")
    assert message in str(caught.value)


def test_a_handwritten_configuration_is_read_too():
    """Written as in Triton's documentation: lists in brackets, commas, comments, the older platform for the backend."""
    tensors = Tensors((Tensor("ids", "TYPE_INT64", ANY),), (Tensor("logits", "TYPE_FP32", (-1, 2)),))
    text = """
      # ours
      platform: "onnxruntime_onnx"
      max_batch_size: 8
      input [ { name: "ids" data_type: TYPE_INT64 dims: [ -1 ] } ]
      output [ { name: "logits", data_type: TYPE_FP32, dims: [ -1, 2 ] } ]
      dynamic_batching { preferred_batch_size: [ 4, 8 ] }
    """
    assert list(check_config(text, PLACE, tensors).dynamic_batching.preferred_batch_size) == [4, 8]


@pytest.mark.parametrize("package", ["tritonclient", "google.protobuf"])
def test_without_its_packages_the_pip_line_is_named(package):
    script = f"""
import sys
sys.modules[{package!r}] = None  # so that importing it fails
from qadeploy.integrations.triton.model_config import require_schema
from qadeploy.errors import MissingExtraError
try:
    require_schema()
except MissingExtraError as error:
    print(error)
"""
    done = succeeded([sys.executable, "-c", script], timeout=60)
    assert "pip install 'qadeploy[triton]'" in done.stdout, done

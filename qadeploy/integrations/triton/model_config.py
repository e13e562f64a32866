"""Triton's config.pbtxt for a model, written and read with Triton's own schema, and checked against the model.

The schema is ``ModelConfig`` of model_config.proto, which the ``tritonclient`` package contains compiled. What the ONNX
Runtime backend understands: https://github.com/triton-inference-server/onnxruntime_backend#other-optimization-options-with-onnx-runtime;
the rest: https://github.com/triton-inference-server/server/blob/main/docs/user_guide/model_configuration.md.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from qadeploy.errors import BundleError, InputError, MissingExtraError
from qadeploy.inference.session import cpu_session

CONFIG = "config.pbtxt"
BACKEND = "onnxruntime"
# One parameter per version tells a client which bundle answers. Triton also returns parameters that it does not know.
BUNDLE_PARAMETER = "qadeploy_bundle_"
# The columns "Model Config" and "ONNX Runtime" of the table of data types in model_configuration.md.
_TYPES = {
    "tensor(bool)": "TYPE_BOOL",
    "tensor(int32)": "TYPE_INT32",
    "tensor(int64)": "TYPE_INT64",
    "tensor(float16)": "TYPE_FP16",
    "tensor(float)": "TYPE_FP32",
    "tensor(double)": "TYPE_FP64",
    "tensor(string)": "TYPE_STRING",
}
_WARM_TOKENS = 32  # any run creates kernels and arenas; a short run costs least
_PROTO = "tritonclient.grpc.model_config_pb2"


@dataclass(frozen=True, slots=True)
class Tensor:
    """An input or output as Triton names it: ``dims`` exclude the batch, -1 means any size."""

    name: str
    data_type: str
    dims: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.name} {self.data_type} [{', '.join(map(str, self.dims))}]"


@dataclass(frozen=True, slots=True)
class Tensors:
    """The inputs and outputs of a model, in order."""

    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]


@dataclass(frozen=True, slots=True)
class Running:
    """How Triton runs a model.

    ``max_batch`` is the most windows per run, ``delay`` how long a request may wait for others to be batched with it
    (microseconds; None: no batching). ``gpu`` puts an instance on every GPU; otherwise there are ``instances``
    on the CPU, each with ``threads`` threads.
    """

    max_batch: int
    delay: int | None
    gpu: bool = False
    instances: int = 1
    threads: int = 1


def tensors_of(model: bytes) -> Tensors:
    """The inputs and outputs of an ONNX model, according to ONNX Runtime.

    Raises BundleError if it cannot load the model, or a tensor has no leading batch of any size or a type unknown to Triton.
    """
    session = cpu_session(model, optimize=False)  # only its names are read
    return Tensors(tuple(map(_tensor, session.get_inputs())), tuple(map(_tensor, session.get_outputs())))


def _tensor(node: Any) -> Tensor:
    if node.type not in _TYPES:
        raise BundleError(f"model.onnx: {node.name} is {node.type}, which Triton does not support")
    if len(node.shape) < 2 or isinstance(node.shape[0], int):
        raise BundleError(f"model.onnx: {node.name} is {list(node.shape)}: Triton needs a leading batch of any size")
    return Tensor(node.name, _TYPES[node.type], tuple(d if isinstance(d, int) else -1 for d in node.shape[1:]))


def write_config(name: str, tensors: Tensors, running: Running, remarks: Sequence[str]) -> str:
    """The text of config.pbtxt, with ``remarks`` as comments above it. Raises MissingExtraError."""
    schema = require_schema()
    config = schema.ModelConfig(name=name, backend=BACKEND, max_batch_size=running.max_batch)
    for kind, field in ((tensors.inputs, config.input), (tensors.outputs, config.output)):
        for tensor in kind:
            data_type = schema.DataType.Value(tensor.data_type)
            field.add(name=tensor.name, data_type=data_type, dims=tensor.dims)
    if running.delay is not None:
        config.dynamic_batching.SetInParent()
        if running.delay:
            config.dynamic_batching.max_queue_delay_microseconds = running.delay
    group = schema.ModelInstanceGroup
    if running.gpu:
        config.instance_group.add(count=1, kind=group.KIND_GPU)
    else:
        config.instance_group.add(count=running.instances, kind=group.KIND_CPU)
        config.parameters["intra_op_thread_count"].string_value = str(running.threads)
    warmup = config.model_warmup.add(name="one short window", batch_size=1)
    for tensor in tensors.inputs:
        entry = warmup.inputs[tensor.name]
        entry.data_type = schema.DataType.Value(tensor.data_type)
        entry.dims.extend(_WARM_TOKENS if d < 0 else d for d in tensor.dims)
        entry.zero_data = True
    comments = "".join(f"# {line}\n" for line in remarks)
    return comments + str(_text_format().MessageToString(config))


def bundle_parameter(version: int, bundle_hash: str) -> str:
    """The lines to append to config.pbtxt that say which bundle a version is."""
    config = require_schema().ModelConfig()
    config.parameters[f"{BUNDLE_PARAMETER}{version}"].string_value = bundle_hash
    return str(_text_format().MessageToString(config))


def check_config(text: str, place: Path, tensors: Tensors) -> Any:
    """Reads a config.pbtxt by Triton's schema and checks it against a model; returns the ``ModelConfig`` message.

    Raises InputError if it is not such a file, or has another backend, no batch, or other tensors than the model.
    """
    config = require_schema().ModelConfig()
    try:
        _text_format().Parse(text, config)
    except _text_format().ParseError as error:
        raise InputError(f"{place}: line {error.GetLine()}: is not a Triton model configuration: {error}") from error
    if config.name not in {"", place.parent.name}:
        raise InputError(f"{place}: name is {config.name!r}, Triton requires the folder's, {place.parent.name!r}")
    if config.backend != BACKEND and config.platform != "onnxruntime_onnx":
        raise InputError(f"{place}: backend is {config.backend or config.platform!r}, a bundle needs {BACKEND!r}")
    if config.max_batch_size < 1:
        raise InputError(
            f"{place}: max_batch_size is {config.max_batch_size}: a bundle's model takes batches: give 1 or more"
        )
    names = require_schema().DataType.Name
    for kind, own, stated in (("input", tensors.inputs, config.input), ("output", tensors.outputs, config.output)):
        found = {each.name: Tensor(each.name, names(each.data_type), tuple(each.dims)) for each in stated}
        needed = {each.name: each for each in own}
        for tensor_name in sorted(found.keys() | needed.keys()):
            if tensor_name not in found:
                raise InputError(
                    f"{place}: lacks the model's {kind} {needed[tensor_name]}: give another name or repository"
                )
            if found[tensor_name] != needed.get(tensor_name):
                raise InputError(
                    f"{place}: {kind} {found[tensor_name]} is not the model's "
                    f"({needed.get(tensor_name) or 'it has none of that name'}): give another name or repository"
                )
    return config


def require_schema() -> ModuleType:
    """Triton's schema, ``tritonclient.grpc.model_config_pb2``. Raises MissingExtraError (``triton``).

    It is loaded from its file, because importing it by name would require grpcio, which it does not use.
    """
    if _PROTO in sys.modules:
        return sys.modules[_PROTO]
    client = importlib.util.find_spec("tritonclient")
    if client is None or not client.submodule_search_locations:
        raise MissingExtraError("a Triton model repository", "tritonclient", "triton")
    path = Path(client.submodule_search_locations[0], *_PROTO.split(".")[1:]).with_suffix(".py")
    spec = importlib.util.spec_from_file_location(_PROTO, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise MissingExtraError("a Triton model repository", "tritonclient with model_config_pb2", "triton")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except ImportError as error:
        raise MissingExtraError("a Triton model repository", "protobuf", "triton") from error
    sys.modules[_PROTO] = module
    return module


def _text_format() -> Any:
    require_schema()  # reports a missing protobuf
    from google.protobuf import text_format

    return text_format

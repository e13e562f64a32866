"""Stands in for Triton's ONNX Runtime backend, which is a C++ library that no package index has.

Triton loads it as a Python-based backend of the same name, for models whose config.pbtxt says ``backend: "onnxruntime"``
(https://github.com/triton-inference-server/backend/blob/main/docs/python_based_backends.md). The server's core does
its usual work: reading config.pbtxt, checking requests, forming batches, warming up. Like the real backend,
this one passes all requests of a batch to the model at once, concatenated.
"""

import json
from pathlib import Path

import numpy as np
import onnxruntime as ort
import triton_python_backend_utils as pb_utils  # the server provides it


class TritonPythonModel:
    def initialize(self, args):
        config = json.loads(args["model_config"])
        options = ort.SessionOptions()
        options.intra_op_num_threads = int(config["parameters"]["intra_op_thread_count"]["string_value"])
        folder = Path(args["model_repository"]) / args["model_version"]
        path = folder / (config.get("default_model_filename") or "model.onnx")
        self.session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self.inputs = [each["name"] for each in config["input"]]
        self.outputs = [each["name"] for each in config["output"]]

    def execute(self, requests):
        given = [[pb_utils.get_input_tensor_by_name(r, name).as_numpy() for name in self.inputs] for r in requests]
        feeds = dict(zip(self.inputs, map(np.concatenate, zip(*given, strict=True)), strict=True))
        found = self.session.run(self.outputs, feeds)
        ends = np.cumsum([len(each[0]) for each in given])
        return [
            pb_utils.InferenceResponse(
                [
                    pb_utils.Tensor(name, value[end - len(own[0]) : end])
                    for name, value in zip(self.outputs, found, strict=True)
                ]
            )
            for own, end in zip(given, ends, strict=True)
        ]

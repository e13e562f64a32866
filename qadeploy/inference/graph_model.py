"""A bundle's graph as it is, with whatever it takes and gives."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qadeploy.errors import BundleError
from qadeploy.inference.bundle import MODEL
from qadeploy.inference.layout import SessionSettings
from qadeploy.inference.session import onnxruntime

Outputs = dict[str, NDArray[Any]]
_KINDS: dict[str, Any] = {
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(float)": np.float32,
    "tensor(string)": object,
}


class GraphModel:
    """A model file run by ONNX Runtime alone, on one thread, with a manifest's session settings; all of its outputs.

    Raises BundleError where ONNX Runtime cannot load it, and on an input of a type that no bundle has.
    """

    def __init__(self, model: bytes, session: Mapping[str, Any] | None = None) -> None:
        ort = onnxruntime()
        settings = SessionSettings.from_manifest(session)
        options = ort.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 4
        for name, value in settings.config.items():
            options.add_session_config_entry(name, value)
        try:
            self._session = ort.InferenceSession(
                model,
                options,
                providers=["CPUExecutionProvider"],
                disabled_optimizers=list(settings.disabled_optimizers) or None,
            )
        except Exception as error:  # the binding raises one class a status code, all of them bare
            reason = " ".join(str(error).split())[:300]
            raise BundleError(f"{MODEL}: ONNX Runtime cannot load it: {reason}") from error
        inputs = self._session.get_inputs()
        for each in inputs:
            if each.type not in _KINDS:
                raise BundleError(f"{MODEL}: takes {each.name} as {each.type}: export it with qadeploy export")
        self._kinds = {each.name: _KINDS[each.type] for each in inputs}
        self.inputs = tuple(self._kinds)
        self.outputs = tuple(o.name for o in self._session.get_outputs())

    def run(self, feeds: Mapping[str, Any]) -> Outputs:
        """All outputs by name; of ``feeds`` it takes what the model takes."""
        given = {name: np.asarray(feeds[name], dtype=kind) for name, kind in self._kinds.items()}
        return dict(zip(self.outputs, self._session.run(None, given), strict=True))

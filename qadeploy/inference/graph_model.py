"""A bundle's graph with all of its inputs and outputs, whatever they are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qadeploy.errors import BundleError
from qadeploy.inference.bundle import MODEL
from qadeploy.inference.manifest import SessionSettings
from qadeploy.inference.session import cpu_session, outlives_forks, runtime_error

Outputs = dict[str, NDArray[Any]]
_KINDS: dict[str, Any] = {
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(float)": np.float32,
    "tensor(string)": object,
}


class GraphModel:
    """A model file on ONNX Runtime, on one CPU thread.

    Args:
        model: The bytes of the file.
        settings: The session settings; None means the defaults.

    Raises:
        BundleError: ONNX Runtime cannot load it, or an input has a type that no bundle's model has.
    """

    def __init__(self, model: bytes, settings: SessionSettings | None = None) -> None:
        self._session = cpu_session(model, settings)
        outlives_forks(self)
        inputs = self._session.get_inputs()
        for each in inputs:
            if each.type not in _KINDS:
                raise BundleError(f"{MODEL}: takes {each.name} as {each.type}: export it with qadeploy export")
        self._kinds = {each.name: _KINDS[each.type] for each in inputs}
        self.inputs = tuple(self._kinds)
        self.outputs = tuple(o.name for o in self._session.get_outputs())

    def run(self, feeds: Mapping[str, Any]) -> Outputs:
        """All outputs by name. Ignores ``feeds`` that are not inputs of the model. Raises BundleError if the run fails."""
        given = {name: np.asarray(feeds[name], dtype=kind) for name, kind in self._kinds.items()}
        try:
            found = self._session.run(None, given)
        except Exception as error:
            raise runtime_error("run", error) from error
        return {name: np.array(value) for name, value in zip(self.outputs, found, strict=True)}  # see outlives_forks

"""Export: a checkpoint to an fp32 bundle, through optimum, with logit parity proven."""

from __future__ import annotations

import contextlib
import logging
import shutil
import tempfile
import warnings
from pathlib import Path

from qadeploy.build.checkpoint import Checkpoint
from qadeploy.build.manifest import finish_bundle
from qadeploy.build.onnx_config import TASK, own_configs
from qadeploy.build.report import Reference
from qadeploy.bundle import MODEL, Bundle, open_bundle, writing_bundle
from qadeploy.errors import FailureError


def export(reference: Reference, out: Path) -> Bundle:
    """Writes the fp32 bundle ``out`` and returns it, verified.

    Raises FailureError where optimum cannot export the model, GateError above the tolerance of
    parity, InputError where ``out`` is something else than a bundle.
    """
    with writing_bundle(out) as work:
        with tempfile.TemporaryDirectory() as folder:
            _export_graph(reference.checkpoint, Path(folder))
            shutil.copyfile(Path(folder) / "model.onnx", work / MODEL)
        finish_bundle(reference, work, out.name, precision="fp32", made={"graph": "plain"}, exact=True)
    return open_bundle(out)


def _export_graph(checkpoint: Checkpoint, folder: Path) -> None:
    from optimum.exporters.onnx import onnx_export_from_model

    logging.getLogger("optimum").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tracer remarks; parity below is the judge
        try:
            with contextlib.redirect_stdout(None):
                onnx_export_from_model(
                    checkpoint.model,
                    folder,
                    task=TASK,
                    do_validation=False,
                    preprocessors=[],
                    custom_onnx_configs=own_configs(checkpoint),
                )
        except Exception as error:  # optimum raises ValueError, KeyError, RuntimeError, ... by model
            kind = getattr(checkpoint.model.config, "model_type", "unknown")
            raise FailureError(f"optimum cannot export a {kind} model: {' '.join(str(error).split())[:300]}") from error
    if not (folder / "model.onnx").is_file() or list(folder.glob("*.onnx_data")):
        raise FailureError("the exported model is larger than one ONNX file may be (2 GB), which a bundle must be")

"""What is drawn of a finished run: ``curves.png``, ``report.html`` and ``README.md``, for people to look at.

Nothing later reads them, so a failure to draw one loses neither the run nor the others; it is said aloud.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from qadeploy.data.readers import DataSet
from qadeploy.errors import CheckpointError
from qadeploy.files import write_text
from qadeploy.records import Answer
from qadeploy.reports.curves import draw_curves
from qadeploy.reports.report_page import report_page
from qadeploy.reports.run_card import run_card
from qadeploy.reports.run_report import Part, RunFacts, make_facts
from qadeploy.shipped import base_model_path
from qadeploy.training.features import FeatureSet

ROLES = (("train", "learned from"), ("dev", "chose the epoch"), ("held out", "only reported on"))


def draw_run(
    folder: Path,
    name: str,
    record: Mapping[str, Any],
    metrics: Mapping[str, Any],
    sets: Sequence[FeatureSet],
    answers: Sequence[Answer],
    data: DataSet,
    say: Callable[[str], None],
) -> None:
    """Draws into the run's ``folder``; what cannot be drawn is named by ``say``, with the reason and the place in the code.

    ``record`` and ``metrics`` are the contents of ``run.json`` and ``metrics.json``; ``sets`` the train, dev and,
    where there is one, held-out part; ``answers`` the best answers to the last of them, in order.
    """

    @cache
    def facts() -> RunFacts:
        return make_facts(
            name,
            record,
            metrics,
            [_part(*role, features) for role, features in zip(ROLES, sets, strict=False)],
            answers,
            skipped=data.skipped,
            first_taken=data.first_taken,
            shipped_base=_shipped_base(),
        )

    drawings: dict[str, Callable[[Path], None]] = {
        "curves.png": lambda path: draw_curves(metrics["epochs"], path),
        "report.html": lambda path: write_text(path, report_page(facts())),
        "README.md": lambda path: write_text(path, run_card(facts())),
    }
    for file, draw in drawings.items():
        try:
            draw(folder / file)
        except Exception as error:  # whatever it is: hours of training weigh more than a picture
            place = traceback.extract_tb(error.__traceback__)[-1]
            say(
                f"WARNING: {file} could not be drawn, the run is complete without it: {type(error).__name__}: {error} "
                f"({Path(place.filename).name}, line {place.lineno})"
            )


def _part(name: str, role: str, features: FeatureSet) -> Part:
    windows = tuple(end - begin for begin, end in zip(features.first, features.first[1:], strict=False))
    return Part(name, role, features.examples, windows)


def _shipped_base() -> str | None:
    with suppress(CheckpointError):
        return base_model_path().name
    return None

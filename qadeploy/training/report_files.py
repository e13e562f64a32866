"""The files of a finished run that people read: ``curves.png``, ``report.html`` and ``README.md``.

No later step reads them, so if one cannot be made, a warning says so, and the run and the other files stay.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path

from qadeploy.data.loading import DataSet
from qadeploy.files import write_text
from qadeploy.records import Answer
from qadeploy.reports.charts import draw_curves
from qadeploy.reports.facts import Part, RunFacts, RunRecord, make_facts
from qadeploy.reports.report_page import report_page
from qadeploy.reports.run_card import run_card
from qadeploy.training.features import FeatureSet
from qadeploy.training.run_log import RunLog


def write_report_files(
    folder: Path,
    run: RunRecord,
    sets: Sequence[FeatureSet],
    answers: Sequence[Answer],
    data: DataSet,
    log: RunLog,
    unlabelled: int = 0,
) -> None:
    """Writes the report files of a run.

    Args:
        folder: The run folder.
        run: What the run records about itself.
        sets: The train set, the dev set and, if there is one, the held-out set.
        answers: The best answers to the questions of the last set, in order.
        data: The questions as they were read.
        log: Gets a warning for each file that cannot be made, with the reason and the place in the code.
        unlabelled: How many of the last questions of the train set nobody annotated.
    """

    @cache
    def facts() -> RunFacts:
        parts = [Part(one.examples, tuple(end - begin for begin, end in pairwise(one.first))) for one in sets]
        parts[0] = replace(parts[0], unlabelled=unlabelled)
        return make_facts(run, parts, answers, skipped=data.skipped, first_taken=data.first_taken)

    files: dict[str, Callable[[Path], None]] = {
        "curves.png": lambda path: draw_curves(run.metrics["epochs"], path),
        "report.html": lambda path: write_text(path, report_page(facts())),
        "README.md": lambda path: write_text(path, run_card(facts())),
    }
    for name, write in files.items():
        try:
            write(folder / name)
        except Exception as error:  # of any kind: hours of training must not be lost for a picture
            place = traceback.extract_tb(error.__traceback__)[-1]
            log.warning(
                f"{name} cannot be made, the run is complete without it: {type(error).__name__}: {error} "
                f"({Path(place.filename).name}, line {place.lineno})"
            )

"""``qadeploy check`` as a function, and its options."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from qadeploy import options
from qadeploy.core.settings import QaSettings
from qadeploy.data.check import CheckedData, check_rows
from qadeploy.data.fields import DataOptions
from qadeploy.data.formats import load_rows
from qadeploy.data.lengths import Lengths, load_encoder, measure_lengths
from qadeploy.data.problems import Problem, Reason
from qadeploy.data.repair import Written, check_places, write_fixed
from qadeploy.options import check as check_declared
from qadeploy.options import option
from qadeploy.shipped import base_model_path


@dataclass(frozen=True, slots=True)
class CheckOptions(DataOptions):
    """The options for checking a file and writing the result."""

    fix: str | None = option(None, "Write usable and repaired rows to this JSONL file, rejected rows beside it.")
    max_bad: float | None = option(
        None, "Exit with 1 if a larger share of the rows cannot be used without a repair.", least=0, most=1
    )
    show: int = option(3, "Rows to show per class.", least=0)
    base: str | None = option(
        None, "Checkpoint or hub name whose tokenizer counts the tokens.", shown="the shipped base model"
    )
    max_seq_len: int | None = option(None, "Longest window in tokens.", least=16, shown="384")
    doc_stride: int | None = option(None, "Overlap of windows in tokens.", least=0, shown="128")
    token: str | None = options.hub_token()


def check_file(
    source: str, chosen: CheckOptions, *, lengths: bool = True
) -> tuple[CheckedData, Lengths | None, Written | None]:
    """Checks every row of a source.

    Args:
        source: ``handbook``, a file, or ``hub:NAME[:SPLIT]``.
        chosen: The options of the check.
        lengths: Whether to count tokens and windows too, which finds questions that leave no room for a context; with
            ``fix`` they are always counted.

    Returns:
        The rows, their lengths if they were counted, and the files that were written if ``chosen.fix`` names one.

    Raises:
        InputError: The source, an option or the path of ``fix`` cannot be used.
        MissingExtraError: The format needs an optional package.
    """
    check_declared(chosen)
    if chosen.fix:
        check_places(source, Path(chosen.fix))
    checked = check_rows(source, load_rows(source, chosen.token), chosen)
    measured = None
    if lengths or chosen.fix:  # --fix rejects questions that leave no room
        settings = QaSettings().changed(max_seq_len=chosen.max_seq_len, doc_stride=chosen.doc_stride)
        measured = measure_lengths(checked, load_encoder(chosen.base or str(base_model_path())), settings)
        too_long = Problem(Reason.TOO_LONG, "question", (settings.max_seq_len,))
        checked = checked.rejecting(frozenset(measured.too_long_rows), too_long)
    return checked, measured, write_fixed(checked, Path(chosen.fix)) if chosen.fix else None

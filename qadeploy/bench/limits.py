"""Limits that the first bundle of a bench must keep: minimum F1, maximum loss of F1, minimum speed-up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qadeploy.errors import InputError
from qadeploy.options import check as check_declared
from qadeploy.options import option

FLOAT = frozenset({"fp32", "bf16", "fp16"})


@dataclass(frozen=True, slots=True)
class Limits:
    """The limits for the first bundle; None for no limit.

    ``min_f1`` and ``max_f1_drop`` are percentage points; the drop is measured from the highest F1 of the other variants
    whose matmuls are in float (``FLOAT``), on the same questions. ``min_speedup`` is the median ratio of questions per
    second to the baseline: the pipeline, or the first peer if the pipeline does not run.
    """

    min_f1: float | None = option(None, "Exit with 1 if the first bundle's F1 is lower.", least=0, most=100)
    max_f1_drop: float | None = option(
        None,
        "Exit with 1 if its F1 is more than this many points below the best float variant (peer or fp32 bundle).",
        least=0,
        most=100,
    )
    min_speedup: float | None = option(
        None,
        "Exit with 1 if it is not at least this many times as fast as the pipeline (or the first peer).",
        least=0,
        most=1e6,
    )

    def check(self, peers: Sequence[str], others: Sequence[str]) -> None:
        """Raises InputError if a limit is out of range or has nothing to be compared with.

        ``peers`` are the requested peers, ``others`` the precisions of the bundles after the first.
        """
        check_declared(self)
        if self.min_speedup is not None and not peers:
            raise InputError("--min-speedup needs a peer to compare with: give --against pipeline")
        if self.max_f1_drop is not None and not peers and not FLOAT & set(others):
            raise InputError(
                "--max-f1-drop needs a float variant to compare with: give --against torch, or an fp32 bundle after the first"
            )

    def judge(self, report: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Each limit with the measured value, and whether it is ``held``; a limit that was not measured is not held."""
        first = report["variants"][0]
        sound = first["status"] == "ok"
        drop = first["f1_drop"] if sound else None
        speedup = first["speedup"] if sound and report["speedup_against_peer"] else None
        rows = (
            ("min_f1", self.min_f1, first["f1"] if sound else None, 1, ""),
            ("max_f1_drop", self.max_f1_drop, drop and drop["points"], -1, drop["against"] if drop else ""),
            ("min_speedup", self.min_speedup, speedup and speedup["median"], 1, report["speedup_against"]),
        )
        return [
            {
                "limit": name,
                "wanted": wanted,
                "found": found,
                "against": against,
                "held": found is not None and sign * found >= sign * wanted,
            }
            for name, wanted, found, sign, against in rows
            if wanted is not None
        ]


def complaint(report: Mapping[str, Any]) -> str:
    """Why the bench fails: limits that are not held, or a first bundle that did not run; "" if all is well."""
    first = report["variants"][0]
    if first["status"] != "ok":
        return f"{first['name']} could not be measured: {first['status']}"
    return "; ".join(_line(first["name"], row) for row in report["limits"] if not row["held"])


def _line(name: str, row: Mapping[str, Any]) -> str:
    flag = "--" + row["limit"].replace("_", "-")
    wanted, found = row["wanted"], row["found"]
    if found is None:
        missing = "no peer ran" if row["limit"] == "min_speedup" else "no other float variant ran"
        return f"{name}: {flag} {wanted:g} cannot be checked because {missing}"
    if row["limit"] == "min_f1":
        return f"{name}: F1 is {found:.2f}, {flag} requires at least {wanted:g}"
    if row["limit"] == "max_f1_drop":
        return f"{name}: F1 is {found:.2f} points below that of {row['against']}, {flag} allows {wanted:g}"
    return f"{name}: {found:.2f} times as fast as {row['against']}, {flag} requires at least {wanted:g}"

"""The limits of a bench: which are met, the messages on those that are not, and limits that cannot be checked."""

from __future__ import annotations

from typing import Any

import pytest

from qadeploy.bench.limits import Limits, complaint
from qadeploy.errors import InputError


def report(*, status: str = "ok", drop: float | None = 0.4, peer: bool = True) -> dict[str, Any]:
    first: dict[str, Any] = {"name": "ours", "status": status}
    if status == "ok":
        first |= {
            "f1": 60.0,
            "f1_drop": None if drop is None else {"points": drop, "against": "torch"},
            "speedup": {"median": 3.0},
        }
    return {"variants": [first], "speedup_against": "pipeline", "speedup_against_peer": peer}


def judged(limits: Limits, **options: Any) -> tuple[list[bool], str]:
    found = report(**options)
    found["limits"] = limits.judge(found)
    return [row["held"] for row in found["limits"]], complaint(found)


@pytest.mark.parametrize(
    ("limits", "held", "said"),
    [
        (Limits(), [], ""),
        (Limits(60.0, 0.4, 3.0), [True, True, True], ""),
        (Limits(min_f1=60.1), [False], "ours: F1 is 60.00, --min-f1 requires at least 60.1"),
        (Limits(max_f1_drop=0.3), [False], "ours: F1 is 0.40 points below that of torch, --max-f1-drop allows 0.3"),
        (
            Limits(min_speedup=3.01),
            [False],
            "ours: 3.00 times as fast as pipeline, --min-speedup requires at least 3.01",
        ),
    ],
)
def test_each_limit_is_held_to_its_bound(limits, held, said):
    assert judged(limits) == (held, said)


def test_what_gains_f1_has_no_drop():
    assert judged(Limits(max_f1_drop=0.0), drop=-1.5) == ([True], "")


def test_all_that_do_not_hold_are_named():
    held, said = judged(Limits(70, 0.1, 5))
    assert held == [False] * 3
    assert said.count("; ") == 2


def test_what_could_not_be_measured_does_not_hold():
    held, said = judged(Limits(max_f1_drop=0.5, min_speedup=1), drop=None, peer=False)
    assert held == [False, False]
    assert "--max-f1-drop 0.5 cannot be checked because no other float variant ran" in said
    assert "--min-speedup 1 cannot be checked because no peer ran" in said


def test_a_bundle_that_failed_fails_the_bench():
    held, said = judged(Limits(min_f1=0), status="failed: LogitsError: NaN")
    assert held == [False]
    assert said == "ours could not be measured: failed: LogitsError: NaN"


@pytest.mark.parametrize(
    ("limits", "peers", "others", "message"),
    [
        (Limits(min_f1=101), [], [], "min_f1 must be a number from 0 to 100, not 101"),
        (Limits(min_f1=float("nan")), [], [], "min_f1 must be"),
        (Limits(max_f1_drop=-1), ["torch"], [], "max_f1_drop must be"),
        (Limits(min_speedup=2), [], ["fp32"], "give --against pipeline"),
        (Limits(max_f1_drop=1), [], ["int8"], "give --against torch"),
    ],
)
def test_limits_without_sense_are_refused_before_anything_is_measured(limits, peers, others, message):
    with pytest.raises(InputError, match=message):
        limits.check(peers, others)


def test_a_float_bundle_beside_the_first_is_enough_for_a_drop():
    Limits(max_f1_drop=1).check([], ["fp32"])

"""What runs beside the server: the alert rule of the documentation."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from qadeploy.core.drift import Figure
from qadeploy.serve.metrics import Metrics

DOCS = Path(__file__).parents[1] / "docs"


def metrics() -> set[str]:
    """The names of all series of /metrics."""
    families = re.findall(r"^# TYPE (\S+) (\S+)$", Metrics().text().decode(), re.MULTILINE)
    ends = {"histogram": ("_bucket", "_count", "_sum")}
    return {family + end for family, kind in families for end in ends.get(kind, ("",))}


@pytest.fixture(scope="module")
def alert() -> str:
    """The rules of docs/serving.md."""
    (block,) = re.findall(r"^```yaml\n(groups:.*?)^```", (DOCS / "serving.md").read_text(), re.DOTALL | re.MULTILINE)
    return block


def test_the_alert_names_what_the_server_shows(alert):
    (group,) = yaml.safe_load(alert)["groups"]
    (rule,) = group["rules"]
    named = set(re.findall(r"qadeploy_\w+", rule["expr"]))
    assert len(named) == 3
    assert named <= metrics()
    assert set(re.findall(r"\{\{ \$labels\.(\w+)", rule["annotations"]["summary"])) == {"figure"}


def test_the_figures_are_documented():
    section = (DOCS / "serving.md").read_text().partition("\n## Drift\n")[2].partition("\n## ")[0]
    assert set(re.findall(r"`(\w+)`", "".join(re.findall(r"^\| (`.*?) \|", section, re.MULTILINE)))) == {
        "figure",
        *Figure,
    }


@pytest.mark.skipif(shutil.which("promtool") is None, reason="needs promtool (Debian: prometheus)")
def test_the_alert_fires_for_the_figure_that_drifts(alert, tmp_path):
    """Of two replicas half of the questions have no answer, which a tenth of the held-out ones had; lengths are the same."""
    (tmp_path / "rules.yml").write_text(alert)

    def series(replica: str, figure: str, le: str, per_minute: int) -> dict[str, str]:
        labels = f'hash="a",figure="{figure}",instance="{replica}"'
        name = f'qadeploy_drift_bucket{{{labels},le="{le}"}}' if le else f"qadeploy_drift_count{{{labels}}}"
        return {"series": name, "values": f"0+{per_minute}x600"}

    def held_out(figure: str, le: str, share: float) -> dict[str, str]:
        name = f'qadeploy_drift_held_out{{hash="a",figure="{figure}",le="{le}",instance="x"}}'
        return {"series": name, "values": f"{share}x600"}

    live = [
        series(replica, figure, le, rate)
        for replica in ("x", "y")
        for figure, le, rate in (
            ("no_answer", "0.0", 1),
            ("no_answer", "+Inf", 2),
            ("no_answer", "", 2),
            ("question_tokens", "8.0", 1),
            ("question_tokens", "+Inf", 2),
            ("question_tokens", "", 2),
        )
    ]
    stored = [
        held_out("no_answer", "0.0", 0.9),
        held_out("no_answer", "+Inf", 1),
        held_out("question_tokens", "8.0", 0.6),
        held_out("question_tokens", "+Inf", 1),
    ]
    message = "no_answer is not distributed as in the held-out data (distance 0.40)"
    fired = {
        "exp_labels": {"hash": "a", "figure": "no_answer", "severity": "warning"},
        "exp_annotations": {"summary": message},
    }
    case = {
        "interval": "1m",
        "input_series": live + stored,
        "alert_rule_test": [{"eval_time": "9h", "alertname": "QadeployDrift", "exp_alerts": [fired]}],
    }
    (tmp_path / "case.yml").write_text(yaml.safe_dump({"rule_files": ["rules.yml"], "tests": [case]}))
    done = subprocess.run(["promtool", "test", "rules", str(tmp_path / "case.yml")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr

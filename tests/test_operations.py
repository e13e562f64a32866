"""The alert rule and the Kubernetes objects of the documentation."""

from __future__ import annotations

import re
import shutil
from typing import Any

import kubernetes_validate
import pytest
import yaml

from qadeploy import Answerer
from qadeploy.core.drift import Figure
from qadeploy.options import declared
from qadeploy.serve.metrics import Metrics
from qadeploy.serve.settings import Settings
from qadeploy.shipped import base_bundle_path
from tests.container_steps import ROOT, order, parse
from tests.processes_for_tests import succeeded
from tests.servers_for_tests import Local, serving

DOCS = ROOT / "docs"
OBJECTS = {each["kind"]: each for each in yaml.safe_load_all((DOCS / "kubernetes.yaml").read_text())}
POD = OBJECTS["Deployment"]["spec"]["template"]


def metrics() -> set[str]:
    """The names of all series of /metrics."""
    families = re.findall(r"^# TYPE (\S+) (\S+)$", Metrics().text().decode(), re.MULTILINE)
    ends = {"histogram": ("_bucket", "_count", "_sum")}
    return {family + end for family, kind in families for end in ends.get(kind, ("",))}


def test_cut_connections_are_described_alike_in_the_metric_and_in_the_documentation():
    name = "qadeploy_connections_cut_total"
    (told,) = re.findall(rf"^# HELP {name} (.+)\.$", Metrics().text().decode(), re.MULTILINE)
    (row,) = re.findall(rf"^\| `{name}` \| (.+) \|$", (DOCS / "serving.md").read_text(), re.MULTILINE)
    assert row.replace("`", "") == told[0].lower() + told[1:]


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
    """Half of two replicas' questions have no answer, but a tenth of the held-out ones; lengths are the same."""
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
    succeeded(["promtool", "test", "rules", str(tmp_path / "case.yml")])


# ---------------------------------------------------------------- Kubernetes


@pytest.fixture(scope="module")
def local():
    with serving(Answerer.load(base_bundle_path(), device="cpu", threads=1), token="secret") as server:
        yield server


def container() -> dict[str, Any]:
    (found,) = POD["spec"]["containers"]
    return found


def image() -> dict[str, str]:
    """The instructions of the Dockerfile's cpu target, and its environment."""
    steps = [step for stage in order(parse((ROOT / "Dockerfile").read_text(), {}), "cpu") for step in stage.steps]
    variables = [part.split("=") for name, rest in steps if name == "ENV" for part in rest.split()]
    return {**dict(steps), **{name: value for name, value in variables if name.startswith("QADEPLOY_")}}


def settings() -> dict[str, Any]:
    """The settings that the pod runs with: the defaults, because it sets no times."""
    return {row.env: row.default for row in declared(Settings).values()}


@pytest.mark.parametrize("version", ["1.30", kubernetes_validate.latest_version()])
@pytest.mark.parametrize("kind", ["Service", "Deployment", "HorizontalPodAutoscaler"])
def test_objects_have_the_schema_of_kubernetes(kind, version):
    kubernetes_validate.validate(OBJECTS[kind], version, strict=True)


def test_there_is_no_object_that_is_not_validated():
    text = (DOCS / "kubernetes.yaml").read_text()
    assert sorted(OBJECTS) == sorted(re.findall(r"^kind: (\w+)$", text, re.MULTILINE))
    assert len(OBJECTS) == 3
    wrong = yaml.safe_load(yaml.safe_dump(OBJECTS["Deployment"]).replace("runAsNonRoot", "runAsNonRot"))
    with pytest.raises(kubernetes_validate.ValidationError, match="runAsNonRot"):
        kubernetes_validate.validate(wrong, "1.30", strict=True)


def test_objects_find_each_other():
    labels = POD["metadata"]["labels"]
    deployment, service, scaler = (OBJECTS[kind] for kind in ("Deployment", "Service", "HorizontalPodAutoscaler"))
    assert deployment["spec"]["selector"]["matchLabels"] == service["spec"]["selector"] == labels
    target = scaler["spec"]["scaleTargetRef"]
    assert target == {
        "apiVersion": deployment["apiVersion"],
        "kind": "Deployment",
        "name": deployment["metadata"]["name"],
    }
    assert "replicas" not in deployment["spec"]
    (port,) = container()["ports"]
    assert service["spec"]["ports"][0]["targetPort"] == port["name"]


def test_the_pod_fits_the_server_and_the_image(local: Local):
    (port,) = container()["ports"]
    probes = {name: container()[name] for name in ("startupProbe", "readinessProbe", "livenessProbe")}
    assert {probe["httpGet"]["port"] for probe in probes.values()} == {port["name"]}
    paths = {probe["httpGet"]["path"] for probe in probes.values()}
    annotations = POD["metadata"]["annotations"]
    for path in (*paths, annotations["prometheus.io/path"]):
        assert local.get(path).status_code == 200, path
    built = image()
    assert {str(port["containerPort"]), annotations["prometheus.io/port"]} == {built["EXPOSE"]}
    assert built["QADEPLOY_PORT"] == built["EXPOSE"]
    assert [each["name"] for each in container()["env"]] == ["QADEPLOY_TOKEN"]
    assert {each["name"] for each in container()["env"]} <= set(settings())
    mounts = {mount["name"]: mount for mount in container()["volumeMounts"]}
    assert set(mounts) == {volume["name"] for volume in POD["spec"]["volumes"]}
    assert container()["args"] == [mounts["bundle"]["mountPath"]]
    assert built["QADEPLOY_CACHE"].startswith(mounts["tmp"]["mountPath"] + "/")


def test_the_pod_has_no_rights():
    pod, own = POD["spec"]["securityContext"], container()["securityContext"]
    assert pod["runAsNonRoot"] is own["readOnlyRootFilesystem"] is True
    assert f"{pod['runAsUser']}:{pod['runAsGroup']}" == image()["USER"]
    assert own["allowPrivilegeEscalation"] is POD["spec"]["automountServiceAccountToken"] is False
    assert own["capabilities"] == {"drop": ["ALL"]}
    # Otherwise the address of the Service would be in a variable that the server reads.
    service = OBJECTS["Service"]["metadata"]["name"].upper()
    assert f"{service}_PORT" in settings()
    assert POD["spec"]["enableServiceLinks"] is False


def test_times_fit_the_server():
    known = settings()
    drain, request, load = (known[f"QADEPLOY_{name}"] for name in ("DRAIN_DELAY", "REQUEST_TIMEOUT", "LOAD_TIMEOUT"))
    assert POD["spec"]["terminationGracePeriodSeconds"] > drain + request + 1
    startup, ready = container()["startupProbe"], container()["readinessProbe"]
    assert startup["periodSeconds"] * startup["failureThreshold"] > load
    assert ready["periodSeconds"] * ready["failureThreshold"] < drain


def test_the_autoscaler_reads_a_metric_that_is_there(local: Local):
    (metric,) = OBJECTS["HorizontalPodAutoscaler"]["spec"]["metrics"]
    name = metric["pods"]["metric"]["name"]
    assert local.metric(name) == 0
    assert int(metric["pods"]["target"]["averageValue"]) < settings()["QADEPLOY_MAX_QUEUE"]
    page = (DOCS / "kubernetes.md").read_text()
    (block,) = re.findall(r"^```yaml\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    (rule,) = yaml.safe_load(block)["rules"]
    assert re.fullmatch(rf"{name}\{{.*\}}", rule["seriesQuery"])
    assert "name" not in rule  # the adapter keeps the name of the series
    labels = set(re.findall(r'(\w+)!=""', rule["seriesQuery"]))
    assert labels == set(rule["resources"]["overrides"])
    assert all(f"<<.{part}>>" in rule["metricsQuery"] for part in ("Series", "LabelMatchers", "GroupBy"))
    assert set(re.findall(r"qadeploy_\w+", page)) == {name}
    assert set(re.findall(r"QADEPLOY_\w+", page)) <= set(settings())

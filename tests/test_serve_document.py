"""The OpenAPI document: allowed requests are answered as it says, and forbidden ones are refused as it says."""

from __future__ import annotations

import itertools
import os
import time

import pytest
import schemathesis
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import positive_data_acceptance

from qadeploy import Answerer
from tests.servers_for_tests import serving

SECONDS = float(os.environ.get("QADEPLOY_FUZZ_SECONDS", "600"))
ROUTES = ("POST /v1/answer", "POST /", "GET /v1/model", "GET /health/live", "GET /health/ready", "GET /metrics")


PLATFORMS = (
    *("GET /ping", "POST /invocations", "GET /v2", "GET /v2/health/live", "GET /v2/health/ready"),
    *("GET /v2/models/{model}", "GET /v2/models/{model}/ready", "POST /v2/models/{model}/infer"),
)
SENT = [(route, GenerationMode.POSITIVE) for route in (*ROUTES, *PLATFORMS)]
SENT += [(route, GenerationMode.NEGATIVE) for route, _ in SENT if route.startswith("POST")]


@pytest.fixture(scope="module")
def document(bundle):
    with serving(Answerer.load(bundle, device="cpu", threads=1)) as server:
        yield schemathesis.openapi.from_asgi("/openapi.json", server.app)


def test_the_document_names_every_route(document):
    assert {operation.ok().label for operation in document.get_all_operations()} == {*ROUTES, *PLATFORMS}


@pytest.mark.parametrize(("route", "mode"), SENT)
def test_the_document_holds_for_anything_that_is_sent(document, route, mode):
    statuses = sent(document, route, mode)
    assert statuses
    assert max(statuses) < 500
    if mode is GenerationMode.POSITIVE and not route.endswith(
        "/infer"
    ):  # whose inputs have names that the document cannot say
        assert 200 in statuses


@pytest.mark.slow
def test_the_document_holds_for_minutes(document):
    end, found = time.monotonic() + SECONDS, set()
    for route, mode in itertools.cycle(SENT):
        found |= sent(document, route, mode, count=100, derandomize=False)
        if time.monotonic() > end:
            break
    assert max(found) < 500


def sent(document, route: str, mode: GenerationMode, *, count: int = 40, derandomize: bool = True) -> set[int]:
    """The statuses of ``count`` requests, each checked against the document."""
    operation = next(one.ok() for one in document.get_all_operations() if one.ok().label == route)
    statuses = set()

    @hypothesis_settings(
        max_examples=count,
        deadline=None,
        derandomize=derandomize,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def hold(case):
        if case.path_parameters and len(statuses) % 2 == 0:  # a random name would never be the model's
            case.path_parameters["model"] = "keepers"
        # An allowed body may still have a stride or a length that does not fit its texts.
        statuses.add(case.call_and_validate(excluded_checks=[positive_data_acceptance]).status_code)

    hold()
    return statuses

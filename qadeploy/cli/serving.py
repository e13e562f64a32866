"""``qadeploy serve``."""

from __future__ import annotations

import os
from typing import Any

from qadeploy.cli.common import bundle_argument, command, main, print_result
from qadeploy.cli.options import options_of
from qadeploy.errors import InputError
from qadeploy.serve.settings import Settings


@command(
    main,
    example="""
qadeploy serve bundles/faq-int8
qadeploy serve --corpus manuals
qadeploy serve bundles/faq-int8 --host 0.0.0.0 --port 80 --request-timeout 10
QADEPLOY_TOKEN=secret qadeploy serve bundles/faq-int8 --protect-metrics
""",
)
@bundle_argument
@options_of(Settings, env=True)
def serve(as_json: bool, bundle: str, **options: Any) -> None:
    """Answer questions over HTTP with BUNDLE: JSON at /v1/answer, a page at /, the API at /docs.

    Without BUNDLE, the newest under bundles/ is used, or the shipped bundle if there is none. Environment variables set
    the options too: QADEPLOY_MAX_QUEUE sets --max-queue, and QADEPLOY_BUNDLE sets BUNDLE.
    On SIGTERM the server is not ready at once, closes the listener after --drain-delay, answers running requests and exits 0.
    """
    from qadeploy.serve.run import serve as run

    if options["token"] is None and "QADEPLOY_TOKEN" in os.environ:  # click treats an empty variable as unset
        raise InputError("QADEPLOY_TOKEN is empty, so anyone could send requests: give it a token, or unset it")
    run(bundle, Settings(**options), lambda url, service: _say(as_json, url, service))


def _say(as_json: bool, url: str, service: Any) -> None:
    from qadeploy.serve.search import about

    bundle, workers, corpus = service.engine.answerer.bundle, service.scheduler.workers, service.corpus
    value = {
        "url": url,
        "bundle": bundle.name,
        "hash": service.engine.hash,
        "device": service.engine.device,
        "workers": workers,
        **({"corpus": about(corpus)} if corpus else {}),
    }
    source = f" from {corpus.documents:,} documents" if corpus else ""
    said = (
        f"{url} answers{source} with {bundle.name} ({service.engine.device}, {workers} at a time); the API: {url}/docs"
    )
    print_result(as_json, value, [said])

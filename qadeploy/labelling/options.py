"""The options of ``qadeploy label``."""

from __future__ import annotations

from dataclasses import dataclass

from qadeploy import options
from qadeploy.errors import InputError
from qadeploy.options import check, option


@dataclass(frozen=True, slots=True)
class LabelOptions:
    """The annotator, the model that proposes answers, and the server.

    Raises:
        InputError: A value is out of range, or the annotator's name is blank or not printable.
    """

    bundle: str | None = option(
        None, "Bundle whose model proposes answers.", shown="the newest under bundles/, or the shipped one"
    )
    predictions: str | None = option(
        None, "Answers that qadeploy answer wrote for the same rows, as proposals: a file, or a folder."
    )
    annotator: str | None = option(None, "Name that is written into each row.", shown="your login name")
    port: int = option(8001, "Port to listen on, on 127.0.0.1 only; 0 picks a free one.", least=0, most=65535)
    columns: str | None = options.columns()
    bundle_sha256: str | None = options.bundle_sha256()
    load_timeout: float = options.load_timeout()
    device: str = options.device()
    threads: int | None = options.threads()

    def __post_init__(self) -> None:
        check(self)
        name = self.annotator
        if name is not None and not (name.strip() and name.isprintable() and len(name) <= 100):
            raise InputError("--annotator: give a printable name of at most 100 characters")

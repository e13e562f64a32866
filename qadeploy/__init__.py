"""qadeploy: extractive question answering, from training data to a service."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qadeploy.inference.answerer import Answerer
from qadeploy.records import Answer, Example

if TYPE_CHECKING:
    from qadeploy.corpus.corpus import Corpus

__all__ = ["Answer", "Answerer", "Corpus", "Example", "__version__"]
__version__ = "0.2.0"


def __getattr__(name: str) -> Any:
    """Imports ``Corpus`` on first access: few services need its document readers."""
    if name == "Corpus":
        from qadeploy.corpus.corpus import Corpus

        return Corpus
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

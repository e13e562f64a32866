"""qadeploy: extractive question answering, from triplets to a service."""

from __future__ import annotations

from qadeploy.inference.answerer import Answerer
from qadeploy.records import Answer, Example

__all__ = ["Answer", "Answerer", "Example", "__version__"]
__version__ = "0.2.0"

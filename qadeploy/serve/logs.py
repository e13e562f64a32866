"""Logs as JSON lines on stderr: ``time``, ``level``, ``event``, and the fields of the event."""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Any

from qadeploy.errors import InputError

LEVELS = ("debug", "info", "warning", "error")


class JsonFormatter(logging.Formatter):
    """Formats a record as one line of JSON; ``extra={"fields": {...}}`` adds entries."""

    def format(self, record: logging.LogRecord) -> str:
        """Returns the line."""
        value: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            value["traceback"] = self.formatException(record.exc_info)
        return json.dumps(value)  # ASCII, so that a lone surrogate in a path cannot break the stream


def set_up(level: str) -> None:
    """Sends the logs of qadeploy, uvicorn and asyncio to stderr as JSON. Raises InputError on an unknown level."""
    if level not in LEVELS:
        raise InputError(f"--log-level is {level!r}: choose {', '.join(LEVELS)}")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    for name in ("qadeploy", "uvicorn", "asyncio"):
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.propagate = False
        logger.setLevel(level.upper())
    if level == "info":  # uvicorn logs its start and stop, which our own lines report
        logging.getLogger("uvicorn").setLevel(logging.WARNING)

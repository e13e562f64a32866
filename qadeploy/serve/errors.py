"""Every refusal and failure as an HTTP status and JSON of the same shape.

``{"error": {"type", "message", "limit", "flag"}, "request_id"}``: ``type`` is for programs, ``message`` for people;
``limit`` and ``flag`` are the limit that was exceeded and the flag that raises it, otherwise null.
"""

from __future__ import annotations

import math
from typing import Any

from qadeploy.errors import (
    InputError,
    LogitsError,
    QadeployError,
    QuestionTooLongError,
    StrideError,
    TooManyWindowsError,
)
from qadeploy.options import flag_of
from qadeploy.serve.settings import Settings

# The status and ``type`` of an error while answering; the first class that matches counts.
KINDS: tuple[tuple[type[QadeployError], int, str], ...] = (
    (QuestionTooLongError, 422, "question_too_long"),
    (StrideError, 422, "stride"),
    (TooManyWindowsError, 422, "too_many_windows"),
    (InputError, 422, "invalid_input"),
    (LogitsError, 500, "bad_logits"),
)


class RefusedError(QadeployError):
    """A request that gets no answer.

    Args:
        status: The HTTP status.
        kind: The ``type`` of the error.
        message: The message, for people.
        limit: The limit that was exceeded.
        setting: The name of the limit in ``Settings``.
        retry_after: Seconds after which to try again.
    """

    def __init__(
        self,
        status: int,
        kind: str,
        message: str,
        *,
        limit: float | None = None,
        setting: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.kind = kind
        self.limit = limit
        self.flag = None if setting is None else flag_of(setting)
        self.retry_after = retry_after

    @property
    def headers(self) -> dict[str, str]:
        """The response's headers: Retry-After in whole seconds, WWW-Authenticate."""
        found = {}
        if self.retry_after is not None:
            found["retry-after"] = str(max(1, math.ceil(self.retry_after)))
        if self.status == 401:
            found["www-authenticate"] = "Bearer"
        return found


def invalid(message: str) -> RefusedError:
    """The refusal of a request that contradicts itself or the schema."""
    return RefusedError(422, "invalid_request", message)


def over_limit(
    status: int, kind: str, message: str, limit: float, setting: str, retry_after: float | None = None
) -> RefusedError:
    """The refusal of a request that exceeds a limit; its flag ends the message."""
    message = f"{message} ({flag_of(setting)})"
    return RefusedError(status, kind, message, limit=limit, setting=setting, retry_after=retry_after)


def refusal(error: Exception, settings: Settings) -> RefusedError:
    """The refusal for an error while answering. Only the message of a QadeployError is shown to the caller."""
    if isinstance(error, RefusedError):
        return error
    for kind, status, name in KINDS:
        if isinstance(error, kind):
            if kind is TooManyWindowsError:
                limit = settings.max_windows
                message = f"{error} (a request may have {limit} windows: {flag_of('max_windows')})"
                return RefusedError(status, name, message, limit=limit, setting="max_windows")
            return RefusedError(status, name, str(error))
    return RefusedError(500, "internal", "the server failed to answer; its log has the reason under this request id")


def body(refused: RefusedError, request_id: str) -> dict[str, Any]:
    """The JSON of a refusal."""
    return {
        "error": {"type": refused.kind, "message": clean(str(refused)), "limit": refused.limit, "flag": refused.flag},
        "request_id": request_id,
    }


def clean(text: str) -> str:
    """The text with lone surrogates as escapes, so that UTF-8 can encode it."""
    return text.encode("utf-8", "backslashreplace").decode()

"""The settings of the server: one table, from which the flags, the environment variables and the documents come.

A setting ``max_queue`` is the flag ``--max-queue`` and the environment variable ``QADEPLOY_MAX_QUEUE``; the flag wins.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from qadeploy.errors import InputError
from qadeploy.inference.context_cache import DEFAULT_CACHE_BYTES
from qadeploy.inference.cuda import TOKENS as CUDA_BATCH_TOKENS


def _of(default: Any, about: str, kind: type, least: float | None = None, unset: str = "") -> Any:
    """A setting. ``unset`` says what None means."""
    return field(default=default, metadata={"help": about, "kind": kind, "least": least, "unset": unset})


@dataclass(frozen=True, slots=True)
class Settings:
    """How a server listens, schedules and what it refuses. Times in seconds, sizes in bytes, lengths as named.

    Raises InputError on a token that no header can hold.
    """

    host: str = _of("127.0.0.1", "Address to listen on; 0.0.0.0 or :: for all.", str)
    port: int = _of(8000, "Port to listen on; 0 takes a free one, which is printed.", int, 0)
    token: str | None = _of(
        None, "Bearer token that callers must send. In the environment it is hidden from ps.", str, unset="none needed"
    )
    protect_metrics: bool = _of(False, "Ask for the token on /metrics too.", bool)
    cors_origins: tuple[str, ...] = _of(
        (), "Origin whose pages may call the API; may be given several times.", tuple, unset="none"
    )
    device: str = _of("auto", "auto, cpu, cuda or cuda:N.", str)
    threads: int | None = _of(
        None, "Windows that run at a time on the CPU, on one thread each.", int, 1, unset="measured once, then cached"
    )
    context_cache_bytes: int = _of(DEFAULT_CACHE_BYTES, "Memory for tokenised contexts; 0 keeps none.", int, 0)
    max_queue: int = _of(512, "Questions that may wait or run; more are refused (429).", int, 1)
    max_wait: float = _of(
        4.0, "Seconds that a new request may have to wait for its turn; above that it is refused (429).", float, 0.0
    )
    max_batch_tokens: int = _of(
        CUDA_BATCH_TOKENS, "Tokens of one run on CUDA, padding included. On a CPU windows run alone.", int, 1
    )
    request_timeout: float = _of(30.0, "Seconds that a request may take, its upload included (408, 504).", float, 0.001)
    drain_delay: float = _of(
        5.0, "Seconds from SIGTERM, when /health/ready turns 503, until the listener closes.", float, 0.0
    )
    keep_alive: float = _of(75.0, "Seconds that an idle connection stays open.", float, 0.0)
    max_body_bytes: int = _of(4 * 2**20, "Bytes of a request's body (413).", int, 1)
    max_context_chars: int = _of(200_000, "Code points of a context (422).", int, 1)
    max_question_chars: int = _of(4_000, "Code points of a question (422).", int, 1)
    max_windows: int = _of(256, "Windows of one request, all its questions together (422).", int, 1)
    max_batch: int = _of(64, "Questions of one request (422).", int, 1)
    max_top_k: int = _of(100, "Answers to a question (422).", int, 1)
    max_answer_tokens: int = _of(128, "Largest max_answer_len that a request may ask for (422).", int, 1)
    log_text: bool = _of(False, "Write questions and contexts into the log.", bool)
    log_level: str = _of("info", "debug, info, warning or error.", str)

    def __post_init__(self) -> None:
        token = self.token
        if token is not None and not (token and token.isascii() and token.isprintable() and token == token.strip()):
            raise InputError("--token: give printable ASCII text without spaces around it, or leave it out")


@dataclass(frozen=True, slots=True)
class Row:
    """One setting as it is shown: ``default`` as text, ``flag`` and ``env`` as they are given."""

    name: str
    flag: str
    env: str
    default: str
    help: str
    kind: type
    least: float | None
    value: Any


def rows() -> list[Row]:
    """All settings, in order."""
    found = []
    for one in fields(Settings):
        known = one.metadata
        name = one.name.removesuffix("s") if known["kind"] is tuple else one.name
        default = "off" if one.default is False else known["unset"] or str(one.default)
        found.append(
            Row(
                one.name,
                flag_of(name),
                f"QADEPLOY_{name.upper()}",
                default,
                known["help"],
                known["kind"],
                known["least"],
                one.default,
            )
        )
    return found


def flag_of(name: str) -> str:
    """The flag of a setting: ``--max-queue`` of ``max_queue``."""
    return f"--{name.replace('_', '-')}"


def table() -> str:
    """The settings as a table in Markdown, as docs/serving.md has it."""
    lines = ["| flag | environment | default | what |", "|---|---|---|---|"]
    lines += [f"| `{row.flag}` | `{row.env}` | {row.default} | {row.help} |" for row in rows()]
    return "\n".join(lines) + "\n"

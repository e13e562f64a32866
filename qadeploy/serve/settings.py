"""The settings of the server.

A setting ``max_queue`` is the flag ``--max-queue`` and the environment variable ``QADEPLOY_MAX_QUEUE``; the flag wins.
"""

from __future__ import annotations

from dataclasses import dataclass

from qadeploy import options
from qadeploy.corpus.options import MOST_READ, READ
from qadeploy.errors import InputError
from qadeploy.inference.context_cache import DEFAULT_CACHE_BYTES
from qadeploy.inference.cuda import TOKENS as CUDA_BATCH_TOKENS
from qadeploy.options import check, option


@dataclass(frozen=True, slots=True)
class Settings:
    """How a server listens and schedules, and what it refuses. Times are in seconds, sizes in bytes.

    Raises:
        InputError: A value is out of range, or the token cannot be sent in a header.
    """

    host: str = option("127.0.0.1", "Address to listen on; 0.0.0.0 or :: for all.")
    port: int = option(8000, "Port to listen on; 0 picks a free one, which is printed.", least=0)
    token: str | None = option(
        None, "Bearer token that clients must send. Set in the environment, it is hidden from ps.", shown="none needed"
    )
    protect_metrics: bool = option(False, "Require the token for /metrics too.")
    cors_origins: tuple[str, ...] = option((), "Origin whose pages may call the API; may be given several times.")
    trusted_proxies: tuple[str, ...] = option(
        (),
        "Address or network of a proxy whose X-Forwarded-For names the client in the log; may be given several times.",
        named="--trusted-proxy",
    )
    bundle_sha256: str | None = options.bundle_sha256()
    corpus: str | None = option(
        None,
        "Documents from which questions without a context are answered: a folder, a file, or an index made by qadeploy "
        "index. The index of documents is kept in $QADEPLOY_CACHE and updated at each start.",
    )
    corpus_passages: int = option(
        READ, "Passages of the corpus that the model reads per question.", least=1, most=MOST_READ
    )
    feedback: str | None = option(
        None,
        "File to which POST /v1/feedback appends verdicts with question and context; without it the route does not exist.",
    )
    feedback_bytes: int = option(
        64 * 2**20, "Size above which the feedback file is renamed to FILE.1, which it replaces.", least=1
    )
    load_timeout: float = options.load_timeout()
    device: str = options.device()
    threads: int | None = option(
        None, "Windows that run in parallel on the CPU, one thread each.", least=1, shown="measured once, then cached"
    )
    context_cache_bytes: int = option(DEFAULT_CACHE_BYTES, "Memory for tokenised contexts; 0 keeps none.", least=0)
    max_queue: int = option(512, "Questions that may wait or run; more are refused (429).", least=1)
    max_wait: float = option(
        4.0,
        "Seconds that a new request may have to wait before it runs; if the queue is longer, it is refused (429).",
        least=0,
    )
    max_batch_tokens: int = option(
        CUDA_BATCH_TOKENS, "Tokens per run on CUDA, padding included. On a CPU windows run alone.", least=1
    )
    request_timeout: float = option(
        30.0, "Seconds that a request may take, including its upload (408, 504).", least=0.001
    )
    drain_delay: float = option(
        5.0, "Seconds from SIGTERM, when /health/ready begins to return 503, until the listener closes.", least=0
    )
    keep_alive: float = option(75.0, "Seconds that an idle connection stays open.", least=0)
    max_connections: int | None = option(
        None,
        "Open connections. One more closes the connection that has waited longest for its client; if none waits for its "
        "client, the new one is refused (503).",
        least=1,
        shown="what the limit of open files allows, at most 4096",
    )
    head_timeout: float = option(10.0, "Seconds that the head of a request may take to arrive (408).", least=0.001)
    max_head_bytes: int = option(32 * 2**10, "Bytes per request line and headers (431).", least=1)
    max_body_bytes: int = option(4 * 2**20, "Bytes per request body (413).", least=1)
    max_upload_bytes: int = option(
        256 * 2**20, "Bytes of all request bodies together. Beyond that, the slowest upload is cut off.", least=1
    )
    max_context_chars: int = option(
        200_000, "Code points per context, or of all passages of a question (422).", least=1
    )
    max_passages: int = option(100, "Passages per question (422).", least=1)
    max_question_chars: int = option(4_000, "Code points per question (422).", least=1)
    max_windows: int = option(256, "Windows per request, for all of its questions (422).", least=1)
    max_batch: int = option(64, "Questions per request (422).", least=1)
    max_top_k: int = option(100, "Answers per question (422).", least=1)
    max_answer_tokens: int = option(128, "The largest max_answer_len of a request (422).", least=1)
    log_text: bool = option(False, "Write questions and contexts to the log.")
    log_level: str = option("info", "debug, info, warning or error.")

    def __post_init__(self) -> None:
        check(self)
        token = self.token
        if token is not None and not (token and token.isascii() and token.isprintable() and token == token.strip()):
            raise InputError("--token: give printable ASCII text without spaces around it, or leave it out")
        if self.protect_metrics and token is None:
            raise InputError("--protect-metrics: needs a --token that protects them")
        bad = [origin for origin in self.cors_origins if set(origin) & set(", \t")]
        if bad:
            raise InputError(
                f"--cors-origin {bad[0]}: give one origin per flag; in the environment, separate them by spaces"
            )
        for name, what in (("host", "an address"), ("corpus", "a folder, a file or an index"), ("feedback", "a file")):
            if getattr(self, name) == "":
                raise InputError(f"--{name} is empty: give {what}, or leave it out")
        if self.corpus is not None and self.corpus_passages > self.max_passages:
            raise InputError(
                f"--corpus-passages is {self.corpus_passages}, but a question may have {self.max_passages}: "
                "lower it, or raise --max-passages"
            )

"""Answers from a model on a Triton server, or another server that speaks the Open Inference Protocol v2 over HTTP.

Windows and spans are made here, by the same encoder and decoder as everywhere else; only the logits come from the server:

    answerer = triton_answerer("http://localhost:8000", "repository/faq/1")
    answerer.answer("Who keeps the lamp?", "Mungo Strand keeps the lamp.")

The protocol: https://github.com/kserve/open-inference-protocol/blob/main/specification/protocol/inference_rest.md, with
Triton's extensions for binary tensors and the model's configuration, if the server has them.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import numpy as np

from qadeploy.core.windows import pad_batch
from qadeploy.errors import InputError, MissingExtraError, RemoteError
from qadeploy.inference.answerer import Answerer, refuse_in_graph
from qadeploy.inference.bundle import Bundle, open_bundle
from qadeploy.inference.context_cache import DEFAULT_CACHE_BYTES
from qadeploy.inference.cuda import batches, unpadded
from qadeploy.inference.session import Pending
from qadeploy.integrations.triton.model_config import BUNDLE_PARAMETER, CONFIG
from qadeploy.records import LOGIT_NAMES, FloatArray, Logits, Window

_INTEGERS: dict[str, np.dtype[Any]] = {"INT64": np.dtype(np.int64), "INT32": np.dtype(np.int32)}
_FLOATS = frozenset({"FP32", "FP16"})
# Triton only batches requests of equal length. On a GPU a longer window costs little, and lengths that are multiples of
# this make few shapes; on a CPU every token of padding costs time.
_GPU_MULTIPLE = 64
_CONNECTIONS = 4
_HEADER_LENGTH = "Inference-Header-Content-Length"  # with Triton's binary tensors: the bytes of JSON before the tensors


@dataclass(frozen=True, slots=True)
class TritonOptions:
    """How a model on a server is called.

    Attributes:
        version: The model's version on the server; "" is the newest. If another is served later, ``run`` raises RemoteError,
            because the tokenizer belongs to a version.
        batch: Most windows per request, padded to the longest of them. None: 1 for a model on CPUs, its
            ``max_batch_size`` for one on GPUs.
        multiple: Pad further to a multiple of this many tokens. None: 1 for a model on CPUs, 64 for one on GPUs.
            Windows of a model without ``attention_mask`` are never padded.
        connections: Concurrent requests. None: 2 for each of the model's instances, at least 4.
        timeout: Seconds to wait for a connection and for an answer.
        headers: HTTP headers of every request.
    """

    version: str = ""
    batch: int | None = None
    multiple: int | None = None
    connections: int | None = None
    timeout: float = 60.0
    headers: Mapping[str, str] | None = None

    def __post_init__(self) -> None:
        for name in ("batch", "multiple", "connections"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} {value} is below 1")
        if not self.timeout > 0:
            raise InputError(f"timeout {self.timeout} is not above 0 seconds")


@dataclass(frozen=True, slots=True)
class ServedModel:
    """What a server reports about a model; fields that it does not report are 1 or empty."""

    version: str
    inputs: Mapping[str, np.dtype[Any]]
    max_batch: int
    instances: int
    gpu: bool
    bundle: str
    binary: bool


def triton_answerer(
    url: str,
    bundle: str | Path,
    *,
    name: str | None = None,
    context_cache_bytes: int = DEFAULT_CACHE_BYTES,
    **options: Any,
) -> Answerer:
    """An answerer whose model runs on a server.

    Raises what ``TritonModel`` raises, and InputError and BundleError for the folder.

    Args:
        url: The server's URL (``http://`` or ``https://``, host, port, optionally a path).
        bundle: The folder of the bundle that the server runs, such as a version's in the model repository: it has the
            tokenizer and the settings. Its graph must not return spans or text.
        name: The model's name on the server. Default: the folder's or, in a model repository, its parent's.
        context_cache_bytes: As for ``Answerer.load``.
        options: The fields of ``TritonOptions``.
    """
    opened = open_bundle(bundle)
    refuse_in_graph(opened)
    encoder = opened.load_encoder()
    folder = opened.folder.resolve()
    default = folder.parent.name if (folder.parent / CONFIG).is_file() else folder.name
    model = TritonModel(url, name or default, opened, TritonOptions(**options))
    return Answerer(encoder, opened.settings, model, opened, context_cache_bytes=context_cache_bytes)


class TritonModel:
    """A model on a server as a function from windows to logits. Thread-safe, and usable after a fork.

    Raises MissingExtraError (``triton``), RemoteError if the server cannot be reached or lacks the bundle's model.
    """

    device = "server"

    def __init__(self, url: str, name: str, bundle: Bundle, options: TritonOptions | None = None) -> None:
        options = options or TritonOptions()
        self.url = url
        self.name = name
        self._requested_version = str(options.version)
        self._timeout = options.timeout
        self._headers = dict(options.headers or {})
        self._base = _base(url)
        self._protocol, self._urllib3 = _client_modules()
        self._pad_token_id = bundle.encoder.pad_token_id
        self._connect(_CONNECTIONS)
        self.served = self._look(bundle)
        self.threads = options.connections or max(2 * self.served.instances, _CONNECTIONS)
        self._connect(self.threads)
        self.inputs = tuple(self.served.inputs)
        gpu = self.served.gpu
        self._masked = "attention_mask" in self.inputs
        self._batch = min(options.batch or (self.served.max_batch if gpu else 1), self.served.max_batch)
        self._multiple = (options.multiple or (_GPU_MULTIPLE if gpu else 1)) if self._masked else 1
        self._longest = bundle.encoder.position_limit

    def run(self, windows: Sequence[Window]) -> list[Logits]:
        """Start and end logits of each window, float32 ``[tokens]`` each, in order.

        Raises RemoteError if the server fails, does not answer in time, or sends something else.
        """
        return self.start(windows).result()

    def start(self, windows: Sequence[Window]) -> Pending:
        """Sends the windows, in as many concurrent requests as there are connections, and returns without waiting."""
        lengths = [self._padded(len(window)) for window in windows]
        requests = [
            rows[i : i + self._batch]
            for rows in batches(lengths, tokens=self._batch * max(lengths, default=1), masked=self._masked)
            for i in range(0, len(rows), self._batch)
        ]
        work = [partial(self._ask, [windows[i] for i in rows], lengths[rows[0]]) for rows in requests]
        pool = self._mine()
        places = list(itertools.chain.from_iterable(requests))
        again = lambda: self.run(windows) if windows else []  # noqa: E731
        return Pending(again, [pool.submit(each) for each in work], places=places)

    def _padded(self, tokens: int) -> int:
        """The length to which a window is padded: at most the model's limit."""
        up = -(-tokens // self._multiple) * self._multiple
        return max(tokens, min(up, self._longest)) if self._longest else up

    def _ask(self, windows: Sequence[Window], tokens: int) -> list[Logits]:
        """One request: the windows' logits, without those of the padding."""
        protocol, served = self._protocol, self.served
        given = pad_batch(windows, self._pad_token_id, tokens=tokens)
        inputs = []
        for name, kind in served.inputs.items():
            tensor = protocol.InferInput(name, [len(windows), tokens], "INT32" if kind == np.int32 else "INT64")
            tensor.set_data_from_numpy(given[name].astype(kind, copy=False), binary_data=served.binary)
            inputs.append(tensor)
        outputs = [protocol.InferRequestedOutput(name, binary_data=served.binary) for name in LOGIT_NAMES]
        reply = self._infer(inputs, outputs)
        version = str(reply.get_response().get("model_version") or "")
        if version and served.version and version != served.version:
            raise RemoteError(
                f"{self.url}: now answers with version {version} of {self.name}, but this client was made for version "
                f"{served.version}: make a new one with the bundle of that version"
            )
        return unpadded([self._logits(reply, name, (len(windows), tokens)) for name in LOGIT_NAMES], windows)

    def _logits(self, reply: Any, name: str, shape: tuple[int, int]) -> FloatArray:
        try:
            found = reply.as_numpy(name)
        except Exception as error:  # numpy or the client may raise anything on wrong bytes
            raise RemoteError(f"{self.url}: {self.name} answered {name} that cannot be read: {error}") from error
        if found is None or found.shape != shape or found.dtype.kind != "f":
            what = "nothing" if found is None else f"{found.dtype} {list(found.shape)}"
            raise RemoteError(f"{self.url}: {self.name} answered {what} for {name}, but float {list(shape)} is needed")
        logits: FloatArray = found.astype(np.float32, copy=False)
        return logits

    def _look(self, bundle: Bundle) -> ServedModel:
        """What the server reports about the model, checked against the bundle."""
        extensions = self._json("GET", "").get("extensions") or []
        try:
            told = self._json("GET", self._path())
        except RemoteError as error:
            raise RemoteError(f"{error}{self._others(extensions)}") from error
        inputs = self._check_inputs(told, bundle)
        versions = [str(each) for each in told.get("versions") or []]
        version = self._requested_version or max(versions, key=lambda v: (len(v), v), default="")
        if self._send("GET", f"{self._path()}/ready").status != 200:
            raise RemoteError(f"{self.url}: model {self.name} is not ready: wait for it, or see the server's log")
        config: dict[str, Any] = {}
        if "model_configuration" in extensions:
            config = self._json("GET", f"{self._path()}/config")
        stored = (config.get("parameters") or {}).get(f"{BUNDLE_PARAMETER}{version}", {}).get("string_value", "")
        if stored and stored != bundle.hash:
            raise RemoteError(
                f"{self.url}: version {version} of {self.name} is the bundle {stored[:12]}, but {bundle.folder} is "
                f"{bundle.hash[:12]}: give the folder of the bundle that the server runs, or another version"
            )
        groups = config.get("instance_group") or []
        return ServedModel(
            version,
            inputs,
            max(int(config.get("max_batch_size") or 1), 1),
            sum(int(group.get("count") or 1) for group in groups) or 1,
            bool(groups) and all(group.get("kind") == "KIND_GPU" for group in groups),
            stored,
            "binary_tensor_data" in extensions,
        )

    def _check_inputs(self, told: Mapping[str, Any], bundle: Bundle) -> dict[str, np.dtype[Any]]:
        """The model's inputs and their types. Raises RemoteError if they, or the outputs, are not the bundle's."""
        needed = [str(name) for name in bundle.manifest["inputs"]]
        given = {str(each["name"]): each for each in told.get("inputs") or []}
        if set(given) != set(needed):
            raise self._differs(f"takes {_names(given)}", f"{_names(needed)}")
        for name, each in given.items():
            if each["datatype"] not in _INTEGERS:
                raise self._differs(f"takes {name} as {each['datatype']}", "INT64 or INT32")
        outputs = {str(each["name"]): each for each in told.get("outputs") or []}
        if not set(LOGIT_NAMES) <= set(outputs):
            raise self._differs(f"gives {_names(outputs)}", _names(LOGIT_NAMES))
        for name in LOGIT_NAMES:
            if outputs[name]["datatype"] not in _FLOATS:
                raise self._differs(f"gives {name} as {outputs[name]['datatype']}", "FP32 or FP16")
        for name, each in [*given.items(), *((name, outputs[name]) for name in LOGIT_NAMES)]:
            shape = [int(size) for size in each["shape"]]
            if len(shape) != 2 or shape[1] != -1:
                raise self._differs(f"has {name} in the shape {shape}", "[windows, tokens], tokens of any number (-1)")
        return {name: _INTEGERS[str(given[name]["datatype"])] for name in needed}

    def _differs(self, found: str, needed: str) -> RemoteError:
        return RemoteError(
            f"{self.url}: model {self.name} {found}, but the bundle needs {needed}: name the model that was made from this bundle"
        )

    def _others(self, extensions: Sequence[str]) -> str:
        """The models that the server has, if it reports them."""
        if "model_repository" not in extensions:
            return ""
        index = self._json("POST", "/repository/index")
        names = sorted({str(each["name"]) for each in index})
        return f" (it has {_names(names)})" if names else " (it has no model)"

    def _path(self) -> str:
        version = f"/versions/{quote(self._requested_version, safe='')}" if self._requested_version else ""
        return f"/models/{quote(self.name, safe='')}{version}"

    def _infer(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> Any:
        """The protocol's ``infer``: a result whose tensors ``as_numpy`` returns."""
        client = self._protocol.InferenceServerClient
        body, header_length = client.generate_request_body(inputs, outputs=outputs)
        headers = {_HEADER_LENGTH: str(header_length)} if header_length is not None else {}
        reply = self._send("POST", f"{self._path()}/infer", body, headers)
        if reply.status != 200:
            raise self._refused(reply)
        length = reply.headers.get(_HEADER_LENGTH)
        try:
            return client.parse_response_body(reply.data, header_length=int(length) if length is not None else None)
        except Exception as error:  # bytes that are not the protocol's raise anything
            raise self._silent(error) from error

    def _json(self, method: str, path: str) -> Any:
        reply = self._send(method, path)
        if reply.status != 200:
            raise self._refused(reply)
        try:
            return reply.json()
        except ValueError as error:
            raise self._silent(error) from error

    def _send(self, method: str, path: str, body: bytes | None = None, headers: Mapping[str, str] | None = None) -> Any:
        """One request. Raises RemoteError if there is no reply in time."""
        errors = self._urllib3.exceptions
        try:
            url = f"{self._base}/v2{path}"
            return self._connections.request(method, url, body=body, headers={**self._headers, **(headers or {})})
        except errors.NewConnectionError as error:
            raise self._silent(error.__cause__ or error) from error
        except errors.TimeoutError as error:
            raise RemoteError(
                f"{self.url}: did not answer within {self._timeout:g} s: raise timeout, or see what the server is busy with"
            ) from error
        except (errors.HTTPError, OSError) as error:
            raise self._silent(error) from error

    def _refused(self, reply: Any) -> RemoteError:
        """The error for a reply that is not a success."""
        try:
            reason = str(reply.json()["error"])
        except (ValueError, LookupError, TypeError):
            reason = f"HTTP {reply.status}"
        return RemoteError(f"{self.url}: {self.name}: {reason.strip()}")

    def _silent(self, error: BaseException) -> RemoteError:
        reason = f"{type(error).__name__}: {error}".rstrip(": ")
        return RemoteError(f"{self.url}: no inference server answers ({reason}): is it running?")

    def _connect(self, connections: int) -> None:
        """Creates this process's connections, and the threads that wait for replies."""
        self._pid = os.getpid()
        self._connections = self._urllib3.PoolManager(
            maxsize=connections, timeout=self._urllib3.Timeout(self._timeout), retries=False
        )
        self._pool = ThreadPoolExecutor(connections, thread_name_prefix="qadeploy-triton")

    def _mine(self) -> ThreadPoolExecutor:
        """The threads of this process: a forked child has none, and must not use its parent's connections."""
        if self._pid != os.getpid():
            self._connect(self.threads)
        return self._pool


def _base(url: str) -> str:
    """The address before ``/v2``. Raises InputError."""
    try:
        parts = urlsplit(url)
        wrong = parts.scheme not in {"http", "https"} or not parts.hostname or bool(parts.query) or bool(parts.fragment)
        _ = parts.port
    except ValueError:
        wrong = True
    if wrong:
        raise InputError(f"server {url!r}: give a URL such as http://localhost:8000 (the HTTP port, not that of gRPC)")
    return url.rstrip("/")


def _client_modules() -> tuple[Any, Any]:
    """The modules that write and read the protocol's messages, and that send them."""
    try:
        import tritonclient.http as protocol
        import urllib3
    except (ImportError, RuntimeError) as error:  # RuntimeError: tritonclient without [http]
        raise MissingExtraError("a Triton server's client", "tritonclient[http]", "triton") from error
    return protocol, urllib3


def _names(names: Sequence[str] | Mapping[str, Any]) -> str:
    return ", ".join(names) or "nothing"

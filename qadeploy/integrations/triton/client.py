"""Answers from a model on a Triton server, or another that speaks the Open Inference Protocol v2 over HTTP.

Windows and spans are made here, by the same encoder and decoder as everywhere; only the logits come from the server:

    answerer = triton_answerer("http://localhost:8000", "repository/faq/1")
    answerer.answer("Who keeps the lamp?", "Mungo Strand keeps the lamp.")

The protocol: https://github.com/kserve/open-inference-protocol/blob/main/specification/protocol/inference_rest.md, with
Triton's extensions for binary tensors and the model's configuration, if the server has them.
"""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import numpy as np

from qadeploy.core.windows import pad_batch
from qadeploy.errors import InputError, MissingExtraError, RemoteError
from qadeploy.inference.answerer import Answerer, refuse_in_graph
from qadeploy.inference.bundle import Bundle, open_bundle
from qadeploy.inference.context_cache import DEFAULT_CACHE_BYTES
from qadeploy.inference.cuda import batches
from qadeploy.inference.session import Pending
from qadeploy.integrations.triton.model_config import BUNDLE_PARAMETER, CONFIG
from qadeploy.records import LOGIT_NAMES, FloatArray, Logits, Window

_INTEGERS: dict[str, np.dtype[Any]] = {"INT64": np.dtype(np.int64), "INT32": np.dtype(np.int32)}
_FLOATS = frozenset({"FP32", "FP16"})
# Triton joins requests of one length only. On a GPU a longer window costs little, and lengths that are multiples of
# this make few shapes; on a CPU every token of padding is computed.
_GPU_MULTIPLE = 64
_CONNECTIONS = 4
_Value = TypeVar("_Value")


@dataclass(frozen=True, slots=True)
class TritonOptions:
    """How a model on a server is called.

    Attributes:
        version: Its version there; "" is the newest. If another is served later, ``run`` raises RemoteError, because a
            tokenizer belongs to its version.
        batch: Windows per request at most, padded to the longest of them. None: one at a time for a model on CPUs,
            its ``max_batch_size`` for one on GPUs.
        multiple: Pad further to a multiple of so many tokens. None: 1 for a model on CPUs, 64 for one on GPUs.
            Windows of a model without ``attention_mask`` are never padded.
        connections: Requests at once. None: 2 for each of the model's instances, at least 4.
        timeout: Seconds, for a connection and for an answer.
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
    """What a server reports about a model; 1 or empty for what it does not report."""

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
        url: The server's (``http://`` or ``https://``, host, port, perhaps a path).
        bundle: The folder of the bundle that the server runs, such as a version's in the model repository: it has the
            tokenizer and the settings. Its spans must not be in its graph.
        name: The model's on the server. Default: the folder's, or its model's in a repository.
        context_cache_bytes: As for ``Answerer.load``.
        options: The fields of ``TritonOptions``.
    """
    opened = open_bundle(bundle)
    refuse_in_graph(opened)
    encoder = opened.load_encoder()
    model = TritonModel(url, name or _model_name(opened), opened, TritonOptions(**options))
    return Answerer(encoder, opened.settings, model, opened, context_cache_bytes=context_cache_bytes)


def _model_name(bundle: Bundle) -> str:
    folder = bundle.folder.resolve()
    return folder.parent.name if (folder.parent / CONFIG).is_file() else folder.name


class TritonModel:
    """A model on a server as a function from windows to logits. Thread-safe, and usable after a fork.

    Raises MissingExtraError (``triton``), RemoteError if the server cannot be reached, does not have the model, or has
    another than the bundle's.
    """

    device = "server"

    def __init__(
        self,
        url: str,
        name: str,
        bundle: Bundle,
        options: TritonOptions | None = None,
    ) -> None:
        options = options or TritonOptions()
        self.url = url
        self.name = name
        self._asked_version = str(options.version)
        self._timeout = options.timeout
        self._headers = dict(options.headers or {})
        self._address = _address(url)
        self._client_module, self._server_error = _tritonclient()
        self._local = threading.local()
        self._pid = os.getpid()
        self._pad_token_id = bundle.encoder.pad_token_id
        with ThreadPoolExecutor(1) as aside:  # a client's event loop belongs to its thread
            self.served = aside.submit(self._look, bundle).result()
        self.threads = options.connections or max(2 * self.served.instances, _CONNECTIONS)
        self._pool = self._new_pool()
        self.inputs = tuple(self.served.inputs)
        gpu, masked = self.served.gpu, "attention_mask" in self.inputs
        self._batch = min(options.batch or (self.served.max_batch if gpu else 1), self.served.max_batch)
        self._multiple = (options.multiple or (_GPU_MULTIPLE if gpu else 1)) if masked else 1
        self._longest = bundle.encoder.position_limit
        self._masked = masked

    def run(self, windows: Sequence[Window]) -> list[Logits]:
        """Start and end logits of each window, float32 ``[tokens]`` each, in order.

        Raises RemoteError if the server fails, does not answer in time, or sends something else.
        """
        return self.start(windows).result()

    def start(self, windows: Sequence[Window]) -> Pending:
        """Sends the windows, with as many requests at once as there are connections, and returns."""
        lengths = [self._padded(len(window)) for window in windows]
        requests = [
            rows[i : i + self._batch]
            for rows in batches(lengths, tokens=self._batch * max(lengths, default=1), masked=self._masked)
            for i in range(0, len(rows), self._batch)
        ]
        work = [partial(self._ask, [windows[i] for i in rows], lengths[rows[0]]) for rows in requests]
        pool = self._mine()
        return _Replies([pool.submit(each) for each in work], requests, lambda: self.run(windows))

    def _padded(self, tokens: int) -> int:
        """The length to which a window is padded: at most what the model takes."""
        up = -(-tokens // self._multiple) * self._multiple
        return max(tokens, min(up, self._longest)) if self._longest else up

    def _ask(self, windows: Sequence[Window], tokens: int) -> list[Logits]:
        """One request: the windows' logits, without those of the padding."""
        module, served = self._client_module, self.served
        given = pad_batch(windows, self._pad_token_id, tokens=tokens)
        inputs = []
        for name, kind in served.inputs.items():
            tensor = module.InferInput(name, [len(windows), tokens], "INT32" if kind == np.int32 else "INT64")
            tensor.set_data_from_numpy(given[name].astype(kind, copy=False), binary_data=served.binary)
            inputs.append(tensor)
        outputs = [module.InferRequestedOutput(name, binary_data=served.binary) for name in LOGIT_NAMES]
        reply = self._call(
            lambda client: client.infer(
                self.name, inputs, model_version=self._asked_version, outputs=outputs, headers=self._headers
            )
        )
        version = str(reply.get_response().get("model_version") or "")
        if version and served.version and version != served.version:
            raise RemoteError(
                f"{self.url}: now answers with version {version} of {self.name}, this client was made for version "
                f"{served.version}: make a new one with the bundle of that version"
            )
        starts, ends = (self._logits(reply, name, (len(windows), tokens)) for name in LOGIT_NAMES)
        return [(starts[i, : len(w)], ends[i, : len(w)]) for i, w in enumerate(windows)]

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
        """What the server has, checked against the bundle."""
        server = self._call(lambda client: client.get_server_metadata(headers=self._headers))
        extensions = server.get("extensions") or []
        try:
            told = self._call(lambda client: client.get_model_metadata(self.name, self._asked_version, self._headers))
        except RemoteError as error:
            raise RemoteError(f"{error}{self._others(extensions)}") from error
        inputs = self._check_inputs(told, bundle)
        versions = [str(each) for each in told.get("versions") or []]
        version = self._asked_version or max(versions, key=lambda v: (len(v), v), default="")
        if not self._call(lambda client: client.is_model_ready(self.name, self._asked_version, self._headers)):
            raise RemoteError(f"{self.url}: model {self.name} is not ready: wait for it, or see the server's log")
        config: dict[str, Any] = {}
        if "model_configuration" in extensions:
            config = self._call(lambda client: client.get_model_config(self.name, self._asked_version, self._headers))
        stored = (config.get("parameters") or {}).get(f"{BUNDLE_PARAMETER}{version}", {}).get("string_value", "")
        if stored and stored != bundle.hash:
            raise RemoteError(
                f"{self.url}: version {version} of {self.name} is the bundle {stored[:12]}, {bundle.folder} is "
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
            f"{self.url}: model {self.name} {found}, the bundle's needs {needed}: name the model that was made from this bundle"
        )

    def _others(self, extensions: Sequence[str]) -> str:
        """The models that the server has, if it reports them."""
        if "model_repository" not in extensions:
            return ""
        index = self._call(lambda client: client.get_model_repository_index(headers=self._headers))
        names = sorted({str(each["name"]) for each in index})
        return f" (it has {_names(names)})" if names else " (it has no model)"

    def _call(self, work: Callable[[Any], _Value]) -> _Value:
        """Calls this thread's client, since a client must stay in its thread, and turns its errors into ours."""
        client = getattr(self._local, "client", None)
        if client is None:
            client = self._local.client = self._new_client()
        try:
            return work(client)
        except self._server_error as error:
            raise RemoteError(f"{self.url}: {self.name}: {str(error.message()).strip()}") from error
        except TimeoutError as error:
            self._local.client = None  # its connection may still get the late answer
            raise RemoteError(
                f"{self.url}: did not answer within {self._timeout:g} s: raise timeout, or see what the server is busy with"
            ) from error
        except Exception as error:  # sockets, HTTP and JSON raise their own errors
            self._local.client = None
            reason = f"{type(error).__name__}: {error}".rstrip(": ")
            raise RemoteError(f"{self.url}: no inference server answers ({reason}): is it running?") from error

    def _new_client(self) -> Any:
        host, ssl = self._address
        options: dict[str, Any] = {}
        if ssl:
            import gevent.ssl

            options = {"ssl": True, "ssl_context_factory": gevent.ssl.create_default_context}
        return self._client_module.InferenceServerClient(
            host, connection_timeout=self._timeout, network_timeout=self._timeout, **options
        )

    def _new_pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(self.threads, thread_name_prefix="qadeploy-triton")

    def _mine(self) -> ThreadPoolExecutor:
        """The threads of this process: a forked child has none, and must not use its parent's connections."""
        if self._pid != os.getpid():
            self._local = threading.local()
            self._pool = self._new_pool()
            self._pid = os.getpid()
        return self._pool


class _Replies(Pending):
    """Pending requests; their windows are returned in the order they were given."""

    def __init__(
        self,
        futures: Sequence[Future[list[Logits]]],
        requests: Sequence[Sequence[int]],
        again: Callable[[], list[Logits]],
    ) -> None:
        self._again = again
        self._places = list(itertools.chain.from_iterable(requests))
        super().__init__(self._in_child, futures)

    def _in_child(self) -> list[Logits]:
        """In a forked child, or without windows: runs all again, in the order of the requests."""
        found = self._again() if self._places else []
        return [found[i] for i in self._places]

    def result(self) -> list[Logits]:
        found = dict(zip(self._places, super().result(), strict=True))
        return [found[i] for i in range(len(found))]


def _address(url: str) -> tuple[str, bool]:
    """Host, port and path for the client, and whether it is https. Raises InputError."""
    try:
        parts = urlsplit(url)
        wrong = parts.scheme not in {"http", "https"} or not parts.hostname or bool(parts.query) or bool(parts.fragment)
        port = parts.port
    except ValueError:
        wrong, port = True, None
    if wrong:
        raise InputError(f"server {url!r}: give a URL such as http://localhost:8000 (the HTTP port, not that of gRPC)")
    host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname
    ssl = parts.scheme == "https"
    return f"{host}:{port or (443 if ssl else 80)}{parts.path.rstrip('/')}", ssl


def _tritonclient() -> tuple[Any, Any]:
    try:
        import tritonclient.http as module
        from tritonclient.utils import InferenceServerException
    except (ImportError, RuntimeError) as error:  # RuntimeError: tritonclient without [http]
        raise MissingExtraError("a Triton server's client", "tritonclient[http]", "triton") from error
    return module, InferenceServerException


def _names(names: Sequence[str] | Mapping[str, Any]) -> str:
    return ", ".join(names) or "nothing"

"""Answers from a model on a Triton server, or another that speaks the Open Inference Protocol v2 over HTTP.

Windows and spans are made here, by the encoder and decoder of every other answerer; only the logits come from the server:

    answerer = triton_answerer("http://localhost:8000", "repository/faq/1")
    answerer.answer("Who keeps the lamp?", "Mungo Strand keeps the lamp.")

The protocol: https://github.com/kserve/open-inference-protocol/blob/main/specification/protocol/inference_rest.md, with
Triton's extensions for binary tensors and the model's configuration where the server has them.
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
from tokenizers import Tokenizer

from qadeploy.core.windows import Encoder, pad_batch
from qadeploy.errors import InputError, MissingExtraError, RemoteError
from qadeploy.inference.answerer import Answerer, refuse_in_graph
from qadeploy.inference.bundle import TOKENIZER, Bundle, open_bundle
from qadeploy.inference.context_cache import DEFAULT_CACHE_BYTES
from qadeploy.inference.cuda import batches
from qadeploy.inference.session import Pending
from qadeploy.integrations.triton.model_config import BUNDLE_PARAMETER, CONFIG
from qadeploy.records import FloatArray, Window

Logits = tuple[FloatArray, FloatArray]
_OUTPUTS = ("start_logits", "end_logits")
_INTEGERS: dict[str, np.dtype[Any]] = {"INT64": np.dtype(np.int64), "INT32": np.dtype(np.int32)}
_FLOATS = frozenset({"FP32", "FP16"})
# Triton joins requests of one length only. On a GPU a longer window costs little, and lengths that are multiples of
# this make few shapes; on a CPU every token of padding is computed.
_GPU_MULTIPLE = 64
_CONNECTIONS = 4
_Value = TypeVar("_Value")


@dataclass(frozen=True, slots=True)
class ServedModel:
    """What a server says of a model. What it does not say is 1, or empty."""

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
    version: str = "",
    batch: int | None = None,
    multiple: int | None = None,
    connections: int | None = None,
    timeout: float = 60.0,
    headers: Mapping[str, str] | None = None,
    context_cache_bytes: int = DEFAULT_CACHE_BYTES,
) -> Answerer:
    """An answerer whose model runs on the server at ``url`` (``http://`` or ``https://``, host, port, perhaps a path).

    ``bundle`` is the folder of the same bundle that the server runs, such as a version's in the model repository: it gives
    tokenizer and settings. ``name`` is the model's on the server (default: the folder's, or that of its model in a
    repository); the other options are those of ``TritonModel``. Raises what ``TritonModel`` does, and InputError and
    BundleError for the folder, which must not be of a bundle with its spans in the graph.
    """
    opened = open_bundle(bundle)
    refuse_in_graph(opened)
    encoder = Encoder(Tokenizer.from_str(opened.read(TOKENIZER).decode("utf-8")), opened.encoder)
    model = TritonModel(
        url,
        name or _model_name(opened),
        opened,
        version=version,
        batch=batch,
        multiple=multiple,
        connections=connections,
        timeout=timeout,
        headers=headers,
    )
    return Answerer(encoder, opened.settings, model, opened, context_cache_bytes=context_cache_bytes)


def _model_name(bundle: Bundle) -> str:
    folder = bundle.folder.resolve()
    return folder.parent.name if (folder.parent / CONFIG).is_file() else folder.name


class TritonModel:
    """A model on a server as a function from windows to logits. Safe under threads, and after a fork.

    ``connections`` requests are under way at once at most (default: 2 for each of the model's instances, 4 or more), each of at most ``batch`` windows, padded to the longest
    of them and on to a ``multiple`` of tokens. By default both follow the server: a model on CPUs gets windows one by one,
    unpadded, one on GPUs its ``max_batch_size`` in multiples of 64 tokens. A model without ``attention_mask``
    cannot tell padding from text: its windows are never padded. ``version`` "" is the newest; once another is served,
    ``run`` raises RemoteError, since a tokenizer belongs to its version. ``timeout`` is in seconds, for a
    connection and for an answer; ``headers`` go with every request.

    Raises InputError on options out of range, MissingExtraError (``triton``), RemoteError where the server cannot be
    reached, has not this model, or has another than the bundle's.
    """

    device = "server"

    def __init__(
        self,
        url: str,
        name: str,
        bundle: Bundle,
        *,
        version: str = "",
        batch: int | None = None,
        multiple: int | None = None,
        connections: int | None = None,
        timeout: float = 60.0,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        for option, value in (("batch", batch), ("multiple", multiple), ("connections", connections)):
            if value is not None and value < 1:
                raise InputError(f"{option} {value} is below 1")
        if not timeout > 0:
            raise InputError(f"timeout {timeout} is not above 0 seconds")
        self.url = url
        self.name = name
        self._asked_version = str(version)
        self._timeout = timeout
        self._headers = dict(headers or {})
        self._address = _address(url)
        self._client_module, self._server_error = _tritonclient()
        self._local = threading.local()
        self._pid = os.getpid()
        self._pad_token_id = bundle.encoder.pad_token_id
        with ThreadPoolExecutor(1) as aside:  # a client's event loop belongs to its thread
            self.served = aside.submit(self._look, bundle).result()
        self.threads = connections or max(2 * self.served.instances, _CONNECTIONS)
        self._pool = self._new_pool()
        self.inputs = tuple(self.served.inputs)
        gpu, masked = self.served.gpu, "attention_mask" in self.inputs
        self._batch = min(batch or (self.served.max_batch if gpu else 1), self.served.max_batch)
        self._multiple = (multiple or (_GPU_MULTIPLE if gpu else 1)) if masked else 1
        self._longest = bundle.encoder.position_limit
        self._masked = masked

    def run(self, windows: Sequence[Window]) -> list[Logits]:
        """Start and end logits of each window, float32 ``[tokens]`` each, in order.

        Raises RemoteError where the server fails, does not answer in time, or answers something else.
        """
        return self.start(windows).result()

    def start(self, windows: Sequence[Window]) -> Pending:
        """Sends windows on their way, as many requests at once as there are connections, and returns."""
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
        """The length that a window is sent with: at most what the model takes."""
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
        outputs = [module.InferRequestedOutput(name, binary_data=served.binary) for name in _OUTPUTS]
        reply = self._call(
            lambda client: client.infer(
                self.name, inputs, model_version=self._asked_version, outputs=outputs, headers=self._headers
            )
        )
        version = str(reply.get_response().get("model_version") or "")
        if version and served.version and version != served.version:
            raise RemoteError(
                f"{self.url}: now answers with version {version} of {self.name}, this client was made for version "
                f"{served.version}: make it anew, with the bundle of that version"
            )
        starts, ends = (self._logits(reply, name, (len(windows), tokens)) for name in _OUTPUTS)
        return [(starts[i, : len(w)], ends[i, : len(w)]) for i, w in enumerate(windows)]

    def _logits(self, reply: Any, name: str, shape: tuple[int, int]) -> FloatArray:
        try:
            found = reply.as_numpy(name)
        except Exception as error:  # numpy's and the client's own, by what is wrong with the bytes
            raise RemoteError(f"{self.url}: {self.name} answered {name} that cannot be read: {error}") from error
        if found is None or found.shape != shape or found.dtype.kind != "f":
            what = "nothing" if found is None else f"{found.dtype} {list(found.shape)}"
            raise RemoteError(f"{self.url}: {self.name} answered {what} for {name}, float {list(shape)} is needed")
        logits: FloatArray = found.astype(np.float32, copy=False)
        return logits

    def _look(self, bundle: Bundle) -> ServedModel:
        """What the server has, held against the bundle."""
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
        """The model's inputs and their types. Raises RemoteError where they, or the outputs, are not the bundle's."""
        needed = [str(name) for name in bundle.manifest["inputs"]]
        given = {str(each["name"]): each for each in told.get("inputs") or []}
        if set(given) != set(needed):
            raise self._differs(f"takes {_names(given)}", f"{_names(needed)}")
        for name, each in given.items():
            if each["datatype"] not in _INTEGERS:
                raise self._differs(f"takes {name} as {each['datatype']}", "INT64 or INT32")
        outputs = {str(each["name"]): each for each in told.get("outputs") or []}
        if not set(_OUTPUTS) <= set(outputs):
            raise self._differs(f"gives {_names(outputs)}", _names(_OUTPUTS))
        for name in _OUTPUTS:
            if outputs[name]["datatype"] not in _FLOATS:
                raise self._differs(f"gives {name} as {outputs[name]['datatype']}", "FP32 or FP16")
        for name, each in [*given.items(), *((name, outputs[name]) for name in _OUTPUTS)]:
            shape = [int(size) for size in each["shape"]]
            if len(shape) != 2 or shape[1] != -1:
                raise self._differs(f"has {name} in the shape {shape}", "[windows, tokens], tokens of any number (-1)")
        return {name: _INTEGERS[str(given[name]["datatype"])] for name in needed}

    def _differs(self, found: str, needed: str) -> RemoteError:
        return RemoteError(
            f"{self.url}: model {self.name} {found}, the bundle's needs {needed}: name the model that was made of this bundle"
        )

    def _others(self, extensions: Sequence[str]) -> str:
        """The models that the server has, where it tells them."""
        if "model_repository" not in extensions:
            return ""
        index = self._call(lambda client: client.get_model_repository_index(headers=self._headers))
        names = sorted({str(each["name"]) for each in index})
        return f" (it has {_names(names)})" if names else " (it has no model)"

    def _call(self, work: Callable[[Any], _Value]) -> _Value:
        """A call of this thread's client, whose errors are ours. A client must stay in its thread."""
        client = getattr(self._local, "client", None)
        if client is None:
            client = self._local.client = self._new_client()
        try:
            return work(client)
        except self._server_error as error:
            raise RemoteError(f"{self.url}: {self.name}: {str(error.message()).strip()}") from error
        except TimeoutError as error:
            self._local.client = None  # whose connection has a late answer on its way
            raise RemoteError(
                f"{self.url}: did not answer within {self._timeout:g} s: raise timeout, or see what the server is busy with"
            ) from error
        except Exception as error:  # of sockets, HTTP, JSON: each library its own
            self._local.client = None
            reason = f"{type(error).__name__}: {error}".rstrip(": ")
            raise RemoteError(f"{self.url}: no inference server answers there ({reason}): is it running?") from error

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
        """The threads of this process: a forked child has not its parent's, and must not use their connections."""
        if self._pid != os.getpid():
            self._local = threading.local()
            self._pool = self._new_pool()
            self._pid = os.getpid()
        return self._pool


class _Replies(Pending):
    """Requests under way; their windows are given back in the order they came in."""

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
        """In a child forked meanwhile, or of no windows: all anew, in the order of the requests."""
        found = self._again() if self._places else []
        return [found[i] for i in self._places]

    def result(self) -> list[Logits]:
        found = dict(zip(self._places, super().result(), strict=True))
        return [found[i] for i in range(len(found))]


def _address(url: str) -> tuple[str, bool]:
    """Host, port and path as the client takes them, and whether it is https. Raises InputError."""
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

"""The variants of benchmarks/gpu.py: our two paths and the peers, each a function from windows to logits."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.gpu_plan import (
    BASE,
    COMPILED,
    DWARFS,
    E2E_ALL,
    E2E_ONE,
    EAGER,
    EVERY,
    LATENCY,
    MANY_384,
    MIXED,
    ONE_128,
    ONE_384,
    OPTIMUM,
    ORT_PLAIN,
    ORT_SORTED,
    PIPELINE,
    REFERENCE,
    SHAPES,
    SORTED,
    THROUGHPUT,
    GpuVariant,
    ModelPlan,
)
from qadeploy.bench.workload import windows_of
from qadeploy.core.windows import pad_batch
from qadeploy.data.loading import read
from qadeploy.inference.answerer import Answerer, LogitsModel
from qadeploy.inference.cuda import DeviceRunner, batches, in_batches, unpadded
from qadeploy.inference.session import OnnxModel, onnxruntime, session_options
from qadeploy.machine import usable_cpus
from qadeploy.records import NO_ANSWER, Answer, IntArray, Logits, Window
from qadeploy.shipped import HANDBOOK, base_model_path
from qadeploy.timing import spread

FP16 = "fp16.pickle"


def make_checkpoint(name: str, folder: Path, dry: bool) -> Path:
    """The base model's folder, or a folder with random weights of a BERT's shape and the base model's tokenizer."""
    base = base_model_path()
    if name == BASE:
        return base
    import torch
    from transformers import AutoTokenizer, BertConfig, BertForQuestionAnswering

    hidden, layers, heads, inner = (DWARFS if dry else SHAPES)[name]
    tokenizer = AutoTokenizer.from_pretrained(base)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=max(len(tokenizer), 30_522),
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=inner,
        max_position_embeddings=512,
    )
    BertForQuestionAnswering(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


class Padded(LogitsModel):
    """A model that is called with padded batches: of 32 in the given order, or by length within a token budget."""

    def __init__(self, call: Callable[[dict[str, IntArray]], Logits], pad: int, *, by_length: bool) -> None:
        self._call, self._pad, self._by_length = call, pad, by_length

    def run(self, windows: Sequence[Window]) -> list[Logits]:
        """Start and end logits of each window, in order."""
        rows = [list(range(i, min(i + 32, len(windows)))) for i in range(0, len(windows), 32)]
        if self._by_length:
            rows = batches([len(w) for w in windows])
        return in_batches(windows, rows, lambda own: unpadded(self._call(pad_batch(own, self._pad)), own))


def torch_call(model: Any) -> Callable[[dict[str, IntArray]], Logits]:
    """A torch model as a function from a batch to its start and end logits."""
    import torch

    def call(batch: dict[str, IntArray]) -> Logits:
        with torch.inference_mode():
            output = model(**{k: torch.from_numpy(v).to(model.device) for k, v in batch.items()})
        starts, ends = (x.float().cpu().numpy() for x in (output.start_logits, output.end_logits))
        return starts, ends

    return call


class OnnxSession:
    """``InferenceSession`` with its defaults; raises RuntimeError if CUDA is requested but not available."""

    def __init__(self, model: bytes, device: str) -> None:
        ort = onnxruntime()
        if device.startswith("cuda") and hasattr(ort, "preload_dlls"):
            ort.preload_dlls()
        wanted, values = provider(device)
        providers = [(wanted, values), "CPUExecutionProvider"] if device.startswith("cuda") else [wanted]
        self.session = ort.InferenceSession(model, session_options(), providers=providers)
        if self.session.get_providers()[0] != wanted:
            raise RuntimeError(f"{wanted} was requested, but {self.session.get_providers()[0]} came")
        kinds = {"tensor(int32)": np.int32, "tensor(int64)": np.int64}
        self._kinds = {i.name: kinds[i.type] for i in self.session.get_inputs()}

    def __call__(self, batch: Mapping[str, Any]) -> Logits:
        """Start and end logits ``[rows, tokens]``."""
        feeds = {name: batch[name].astype(kind, copy=False) for name, kind in self._kinds.items()}
        starts, ends = self.session.run(["start_logits", "end_logits"], feeds)
        return starts, ends


class OursOnCpu(LogitsModel):
    """The CUDA runner on the CPU provider, so that a dry run exercises it."""

    def __init__(self, model: bytes, pad: int, longest: int) -> None:
        self.runner = DeviceRunner(
            onnxruntime(),
            lambda graphs: OnnxSession(model, "cpu").session,
            place=("cpu", 0),
            pad_token_id=pad,
            longest=longest,
        )
        self.run_batch, self.notes = self.runner.run_many, self.runner.notes

    def run(self, windows: Sequence[Window]) -> list[Logits]:
        """Start and end logits of each window, in order."""
        return self.runner.run(windows)


def provider(device: str) -> tuple[str, dict[str, int]]:
    """ONNX Runtime's provider of a device, and its options."""
    if not device.startswith("cuda"):
        return "CPUExecutionProvider", {}
    return "CUDAExecutionProvider", {"device_id": int(device.partition(":")[2] or 0)}


def first(found: Sequence[Answer]) -> Answer:
    """The best answer, or an empty one."""
    return found[0] if found else NO_ANSWER


def export(name: str, folder: Path, dry: bool) -> Path:
    """A model's checkpoint, ONNX graph and fp16 graph in a folder below ``folder``; made unless they exist already."""
    from qadeploy.export.fp16 import to_fp16
    from qadeploy.export.onnx import export_graph
    from qadeploy.inference.bundle import MODEL
    from qadeploy.training.checkpoint import load_checkpoint

    place = folder / name.replace(" ", "-")
    if (place / FP16).is_file():
        return place
    (place / "onnx").mkdir(parents=True, exist_ok=True)
    path = make_checkpoint(name, place / "checkpoint", dry)
    checkpoint = load_checkpoint(path)
    export_graph(checkpoint, place / "onnx")
    config = checkpoint.model.config
    converted = to_fp16(
        (place / "onnx" / MODEL).read_bytes(),
        {
            "model_type": config.model_type,
            "layers": config.num_hidden_layers,
            "heads": config.num_attention_heads,
            "hidden": config.hidden_size,
        },
    )
    (place / f"{FP16}.tmp").write_bytes(pickle.dumps((path, converted)))
    (place / f"{FP16}.tmp").rename(place / FP16)
    return place


class Subject:
    """The model of this process: its checkpoint, its graphs, its questions, and the loaders of its variants."""

    def __init__(self, plan: ModelPlan) -> None:
        from qadeploy.training.checkpoint import load_checkpoint

        self.plan, self.folder = plan, export(plan.model, Path(plan.exports), plan.dry)
        self.path, self.fp16 = pickle.loads((self.folder / FP16).read_bytes())
        self.checkpoint = load_checkpoint(self.path)
        self.encoder, self.settings = self.checkpoint.encoder, self.checkpoint.settings
        self.pad = self.encoder.config.pad_token_id
        self.examples = tuple(spread(read(str(HANDBOOK)).examples, plan.questions))
        self.pairs = [(e.question, e.context) for e in self.examples]
        self.windows = windows_of(self.encoder, self.settings, self.examples)
        self.sample = max(self.windows, key=len)

    def window(self, tokens: int) -> Window:
        """A window of exactly ``tokens`` tokens, repeated from a real window."""
        tokens = min(tokens, self.encoder.config.position_limit)
        ids = np.resize(self.sample.input_ids, tokens)
        types = None if self.sample.token_type_ids is None else np.resize(self.sample.token_type_ids, tokens)
        return Window(ids, types, 1, tokens - 2, 0, 0)

    def around(self, name: str, precision: str, model: Any, scenarios: frozenset[str], **more: Any) -> GpuVariant:
        """A model with our encoder and decoder around it."""
        answerer = Answerer(self.encoder, self.settings, model, context_cache_bytes=0)
        return GpuVariant(
            name,
            precision,
            more.pop("run", model.run),
            lambda q, c: first(answerer.answer(q, c)),
            lambda pairs: [first(found) for found in answerer.answer_batch(pairs)],
            scenarios=scenarios,
            **more,
        )

    def load_reference(self) -> GpuVariant:
        """Torch fp32, whose answers the others are compared with."""
        from qadeploy.training.checkpoint import TorchModel

        model = TorchModel(self.checkpoint.model.to(self.plan.device), self.pad)
        return self.around(REFERENCE, "fp32", model, frozenset())

    def load_ours(self) -> Iterator[GpuVariant]:
        """Our latency and throughput paths, which share sessions."""
        model: Any
        if self.plan.on_gpu:
            model = OnnxModel(
                lambda: self.fp16.model,
                device=self.plan.device,
                pad_token_id=self.pad,
                longest=self.encoder.config.position_limit,
            )
            model.warm_up(self.sample)
        else:
            model = OursOnCpu(self.fp16.model, self.pad, self.encoder.config.position_limit)
        one, many = frozenset({ONE_128, ONE_384, E2E_ONE}), frozenset({ONE_128, ONE_384, MANY_384, MIXED, E2E_ALL})
        yield self.around(LATENCY, "fp16", model, one, notes=model.notes)
        yield self.around(THROUGHPUT, "fp16", model, many, run=model.run_batch, notes=model.notes)

    def load_plain(self) -> Iterator[GpuVariant]:
        """Our fp16 graph in a session with its defaults."""
        session = OnnxSession(self.fp16.model, self.plan.device)
        for name, by_length in ((ORT_PLAIN, False), (ORT_SORTED, True)):
            yield self.around(name, "fp16", Padded(session, self.pad, by_length=by_length), EVERY)

    def load_torch(self, name: str) -> GpuVariant:
        """The checkpoint in fp16 (fp32 on a CPU), with eager or fused attention, compiled or not."""
        import torch
        from transformers import AutoModelForQuestionAnswering

        dtype = torch.float16 if self.plan.on_gpu else torch.float32
        attention = "eager" if name == EAGER else "sdpa"
        model: Any = AutoModelForQuestionAnswering.from_pretrained(
            self.path, dtype=dtype, attn_implementation=attention
        )
        model = model.eval().to(self.plan.device)
        precision = "fp16" if self.plan.on_gpu else "fp32"
        if name == COMPILED:
            model = torch.compile(model, dynamic=True)
        return self.around(
            name, precision, Padded(torch_call(model), self.pad, by_length=name in {SORTED, COMPILED}), EVERY
        )

    def load_optimum(self) -> GpuVariant:
        """Optimum's ONNX model on its own export (fp32), which binds inputs and outputs by itself on CUDA.

        Raises RuntimeError if CUDA is requested but not available.
        """
        from optimum.onnxruntime import ORTModelForQuestionAnswering

        from qadeploy.bench.peers.setup import quiet

        self.checkpoint.model.config.save_pretrained(self.folder / "onnx")
        wanted, values = provider(self.plan.device)
        with quiet():
            model = ORTModelForQuestionAnswering.from_pretrained(
                self.folder / "onnx", provider=wanted, provider_options=values
            )
        if model.provider != wanted:
            raise RuntimeError(f"{wanted} was requested, but {model.provider} came")
        return self.around(OPTIMUM, "fp32", Padded(torch_call(model), self.pad, by_length=True), EVERY)

    def load_pipeline(self) -> GpuVariant:
        """Transformers' question-answering pipeline on torch, as most people call it."""
        from qadeploy.bench.peers.pipeline import load

        options = {
            "max_seq_len": self.settings.max_seq_len,
            "doc_stride": self.settings.doc_stride,
            "max_answer_len": self.settings.max_answer_len,
        }
        asker = load(str(self.path), self.plan.device, usable_cpus(), options)
        return GpuVariant(
            PIPELINE, "fp32", None, asker.answer_one, asker.answer_all, scenarios=frozenset({E2E_ONE, E2E_ALL})
        )


if __name__ == "__main__":
    export(sys.argv[1], Path(sys.argv[2]), dry=sys.argv[3] == "dry")

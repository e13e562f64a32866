"""Training speed, TF32 and compilation: what PyTorch is told, and that the numbers stay the same."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qadeploy.errors import FailureError, InputError
from qadeploy.training import speed
from qadeploy.training.checkpoint import load_checkpoint
from qadeploy.training.speed import Speed, compiled, float32_attention, has_tf32, tf32_matmuls
from qadeploy.training.train import train
from tests.conftest import tiny_options

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 1)


# ---------------------------------------------------------------- attention on a CPU


def test_attention_is_in_float32_under_autocast_on_a_cpu_and_learns_the_same(tiny_checkpoint):
    """With a mask as models give it, forward and backward, against the model in float32 throughout."""
    model = load_checkpoint(tiny_checkpoint).model.train()
    model.set_attn_implementation("sdpa")
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    real = torch.nn.functional.scaled_dot_product_attention
    seen: list[torch.dtype] = []

    def watched(query: Any, *args: Any, **options: Any) -> Any:
        seen.append(query.dtype)
        return real(query, *args, **options)

    def gradient(device: torch.device, autocast: bool) -> torch.Tensor:
        model.zero_grad()
        inputs = {
            "input_ids": torch.arange(12).reshape(2, 6) + 5,
            "attention_mask": torch.tensor([[1] * 6, [1] * 4 + [0] * 2]),
        }
        with float32_attention(device), torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            output = model(**inputs)
        (output.start_logits.float().sum() + output.end_logits.float().square().sum()).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    torch.nn.functional.scaled_dot_product_attention = watched
    try:
        exact, mixed = gradient(CPU, False), gradient(CPU, True)
        assert set(seen) == {torch.float32}
        assert torch.nn.functional.scaled_dot_product_attention is watched  # as it was
        assert torch.nn.functional.cosine_similarity(exact, mixed, dim=0) > 0.999
        seen.clear()
        with pytest.raises(ValueError, match="out of it"), float32_attention(CPU):
            raise ValueError("out of it")
        assert torch.nn.functional.scaled_dot_product_attention is watched
        with float32_attention(CUDA):  # PyTorch's own are fastest there
            assert torch.nn.functional.scaled_dot_product_attention is watched
    finally:
        torch.nn.functional.scaled_dot_product_attention = real


# ---------------------------------------------------------------- TF32


@pytest.mark.parametrize(("capability", "expected"), [((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_tf32_is_for_ampere_and_later_and_for_the_time_of_training(capability, expected, monkeypatch):
    asked: list[torch.device] = []

    def told(device: torch.device) -> tuple[int, int]:
        asked.append(device)
        return capability  # type: ignore[no-any-return]

    monkeypatch.setattr(torch.cuda, "get_device_capability", told)
    before = torch.get_float32_matmul_precision()
    assert before == "highest"
    assert has_tf32(CUDA) is expected

    def interrupted() -> None:
        with tf32_matmuls(CUDA):
            assert torch.get_float32_matmul_precision() == ("high" if expected else "highest")
            raise ValueError("out of it")

    with pytest.raises(ValueError, match="out of it"):
        interrupted()
    assert torch.get_float32_matmul_precision() == before
    assert set(asked) == {CUDA}
    asked.clear()
    assert not has_tf32(CPU)
    with tf32_matmuls(CPU):
        assert torch.get_float32_matmul_precision() == before
    assert not asked


def test_tf32_is_chosen_without_a_word_from_torch(monkeypatch):
    """The warning has the text of torch 2.9's; a CPU build does not emit it."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    real = torch.get_float32_matmul_precision

    def warns() -> str:
        warnings.warn(
            "Please use the new API settings to control TF32 behavior, such as ...", UserWarning, stacklevel=1
        )
        return real()

    monkeypatch.setattr(torch, "get_float32_matmul_precision", warns)
    with tf32_matmuls(CUDA):
        assert real() == "high"
    assert real() == "highest"


# ---------------------------------------------------------------- windows a second, memory


class Clock:
    """Seconds that pass when the test says so, and the calls to the GPU."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        self.events: list[tuple[str, torch.device]] = []
        monkeypatch.setattr(speed.time, "perf_counter", self.read)
        for name in ("synchronize", "reset_peak_memory_stats", "max_memory_allocated"):
            monkeypatch.setattr(torch.cuda, name, partial(self.asked, name))

    def read(self) -> float:
        return self.now

    def asked(self, name: str, device: torch.device) -> int:
        self.events.append((name, device))
        if name == "synchronize":
            self.now += 1.0  # what was still under way
        return 3 * 2**30


def epoch(watch: Speed, number: int, run: Callable[[], None]) -> None:
    watch.on_epoch_begin(None, SimpleNamespace(epoch=number - 1), None)
    run()
    watch.on_epoch_end(None, SimpleNamespace(epoch=float(number)), None)


def test_an_epoch_on_a_gpu_ends_when_the_gpu_is_done(monkeypatch):
    clock = Clock(monkeypatch)
    seen = SimpleNamespace(windows=0)
    watch = Speed(CUDA, lambda: seen.windows, processes=2)

    def work(windows: int, seconds: float) -> None:
        seen.windows += windows
        clock.now += seconds

    watch.on_train_begin(None, None, None)
    assert clock.events == [("reset_peak_memory_stats", CUDA)]
    epoch(watch, 1, lambda: work(100, 3.0))
    clock.now += 50.0  # the evaluation
    epoch(watch, 2, lambda: work(100, 1.0))
    row = {"epoch": 1, "windows": 200, "seconds": 4.0, "windows_per_second": 50.0, "peak_memory_bytes": 3 * 2**30}
    assert watch.rows == [row, {**row, "epoch": 2, "seconds": 2.0, "windows_per_second": 100.0}]
    assert [name for name, _ in clock.events[1:]] == ["synchronize", "max_memory_allocated"] * 2
    assert {device for _, device in clock.events} == {CUDA}
    assert watch.row(2) == watch.rows[1]
    assert watch.row(0) is None
    assert watch.summary() == {"windows_per_second": 66.7, "peak_memory_bytes": 3 * 2**30, "epochs": watch.rows}


def test_on_a_cpu_the_memory_is_the_processes_and_no_gpu_is_asked(monkeypatch):
    clock = Clock(monkeypatch)
    monkeypatch.setattr(speed, "peak_memory", lambda: None)
    watch = Speed(CPU, lambda: 0, rows=[{"epoch": 1, "windows": 10, "seconds": 2.0, "peak_memory_bytes": 7}])
    watch.on_train_begin(None, None, None)

    def work() -> None:
        clock.now += 1.0

    epoch(watch, 2, work)
    assert watch.rows[1]["peak_memory_bytes"] is None
    assert watch.summary()["peak_memory_bytes"] == 7
    assert clock.events == []
    assert Speed(CPU, lambda: 0).summary() == {"windows_per_second": None, "peak_memory_bytes": None, "epochs": []}


def test_a_run_tells_its_speed(tiny):
    found = tiny.metrics["speed"]
    windows = tiny.metrics["steps"] / 3 * 8
    assert [row["epoch"] for row in found["epochs"]] == [1, 2, 3]
    for row in found["epochs"]:
        assert windows - 8 < row["windows"] <= windows
        assert row["windows_per_second"] == pytest.approx(row["windows"] / row["seconds"], rel=0.05)
        assert 2**25 < row["peak_memory_bytes"] <= found["peak_memory_bytes"] < 2**40
    assert found["windows_per_second"] > 0
    report = (tiny.run / "report.html").read_text(encoding="utf-8")
    assert f'<td class="number">{found["epochs"][0]["windows_per_second"]:,.1f}</td>' in report


# ---------------------------------------------------------------- batches by tokens


def test_a_run_by_tokens(tiny, tiny_checkpoint, tmp_path):
    said: list[str] = []
    options = tiny_options(
        tiny.data, tiny_checkpoint, tmp_path / "run", batch_size=None, batch_tokens=300, device="cpu", epochs=2
    )
    found = train(options, said.append, progress=False).metrics
    line = next(line for line in said if line.startswith("4 training"))
    assert f"on cpu in fp32, 2 epochs of {found['steps'] // 2} steps of at most 300 tokens (" in line
    assert {row["windows"] for row in found["speed"]["epochs"]} == {76}  # of 96 questions, 20 are the dev set
    card = (tmp_path / "run" / "README.md").read_text(encoding="utf-8")
    assert "batch tokens 300" in card
    assert "batch size" not in card
    losses = [row["train_loss"] for row in found["epochs"][1:]]
    assert losses[1] < losses[0] < 2 * found["epochs"][0]["eval_loss"]  # means over windows, like the others


def test_tokens_that_hold_no_window_are_refused_before_anything_is_written(tiny, tiny_checkpoint, tmp_path):
    options = tiny_options(tiny.data, tiny_checkpoint, tmp_path / "run", batch_tokens=5)
    with pytest.raises(InputError, match="batch-tokens 5 is too small for the longest window"):
        train(options, lambda line: None, progress=False)
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- compilation


class Counting:
    """A compiler that runs the graphs as they are, and counts them."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        self.graphs += 1
        return graph.forward


def test_a_compiled_model_is_the_same_model_and_lengths_do_not_compile_anew(tiny_checkpoint):
    model = load_checkpoint(tiny_checkpoint).model.eval()
    names = list(model.state_dict())
    batches = [torch.arange(rows * n).reshape(rows, n) % 50 for rows, n in ((2, 9), (3, 14), (5, 31), (4, 20), (7, 8))]
    plain = [model(input_ids=ids).start_logits for ids in batches]
    counting = Counting()
    with compiled(model, True, counting):
        for ids, expected in zip(batches, plain, strict=True):
            torch.testing.assert_close(model(input_ids=ids).start_logits, expected)
            if ids is batches[0]:
                first = counting.graphs
        assert 1 <= first == counting.graphs
        assert list(model.state_dict()) == names
    assert model._compiled_call_impl is None
    with compiled(model, False, counting):
        assert model._compiled_call_impl is None


def test_a_model_that_does_not_compile_is_an_error_that_says_what_to_do(tiny_checkpoint):
    def broken(graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        raise RuntimeError("no C++ compiler")

    model = load_checkpoint(tiny_checkpoint).model.eval()
    with pytest.raises(FailureError, match=r"--torch-compile: .*leave it out"), compiled(model, True, broken):
        model(input_ids=torch.ones((1, 5), dtype=torch.int64))
    model(input_ids=torch.ones((1, 5), dtype=torch.int64))  # and runs as it did


def test_a_run_that_is_compiled_learns_the_same(tiny, tiny_checkpoint, tmp_path, monkeypatch):
    counting = Counting()
    monkeypatch.setattr("qadeploy.training.train.compiled", partial(compiled, backend=counting))
    options = tiny_options(tiny.data, tiny_checkpoint, tmp_path / "run", torch_compile=True)
    said: list[str] = []
    found = train(options, said.append, progress=False).metrics
    assert counting.graphs > 0
    assert any(", compiled, 3 epochs" in line for line in said)
    for mine, his in zip(found["epochs"], tiny.metrics["epochs"], strict=True):
        assert mine["eval_loss"] == pytest.approx(his["eval_loss"], rel=1e-3)
    files = {p.name for p in Path(tmp_path / "run" / "checkpoint").iterdir()}
    assert files == {p.name for p in (tiny.run / "checkpoint").iterdir()}
    assert load_checkpoint(tmp_path / "run" / "checkpoint").model.state_dict().keys() == (
        load_checkpoint(tiny.run / "checkpoint").model.state_dict().keys()
    )

"""A bench report as lines for the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_HEAD = (
    f"{'q/s':>7} {'x':>6} {'(range)':>13} {'win/s':>7} {'p50 ms':>7} {'p95 ms':>7} {'p99 ms':>7} {'EM':>5} {'F1':>5} "
    f"{'size':>8} {'memory':>8} {'start':>7} {'peak':>5}"
)
DASH = "-"


def lines(report: Mapping[str, Any]) -> list[str]:
    """The table of variants, the split of our own time, the meaning of the columns, the environment, and the limits."""
    variants = report["variants"]
    width = max(7, *(len(v["name"]) for v in variants))
    result = [f"{'variant':<{width}} {_HEAD}"]
    result += [f"{v['name']:<{width}} {_figures(v) if v['status'] == 'ok' else v['status']}" for v in variants]
    result += [_split_line(v) for v in variants if v.get("split")]
    result += [f"{v['name']}: {v['remark']}" for v in variants if v.get("remark")]
    result += [f"{v['name']}: start-up and memory: {v['cold_note']}" for v in variants if v.get("cold_note")]
    result += legend(report)
    result += [environment(report), *limit_lines(report)]
    return result


def legend(report: Mapping[str, Any]) -> list[str]:
    """The workload, and the meaning of each column."""
    workload, rounds = report["workload"], report["rounds"]
    sound = [v for v in report["variants"] if v["status"] == "ok"]
    single = max((v["latency_questions"] for v in sound), default=0)
    cold = max((v["peak_memory_questions"] for v in sound), default=0)
    windows = f" in {workload['windows']} windows" if workload["windows"] else ""
    text = [
        f"{workload['questions']} questions of {workload['source']}{windows}; q/s: all at once, median of {rounds} interleaved "
        f"rounds; x: times {report['speedup_against'] or 'nothing'}; p50 to p99: {single} questions one at a time, text to answer",
        f"memory: peak resident set of a process that answers {cold} questions; start: from Python's start to the first "
        "answer",
    ]
    peak = report["peak"]
    if peak and workload["operations_per_question"]:
        text.append(
            f"peak: useful operations per second ({workload['operations_per_question'] / 1e9:.2f} G per question, no padding) over the "
            f"most that {peak['threads']} threads reach in ONNX Runtime's matmul: {peak['int8'] / 1e9:,.0f} G int8, "
            f"{peak['fp32'] / 1e9:,.0f} G fp32"
        )
    else:
        text.append(f"peak: {report['peak_note'] or workload['operations_note']}")
    return text


def environment(report: Mapping[str, Any]) -> str:
    """CPU, threads, instruction sets, versions, bundles and commit in one line."""
    found = report["environment"]
    packages = found["packages"]
    versions = [f"{name} {packages[name]}" for name in shown_packages(report)]
    bundles = [f"{b['name']} {b['sha256'][:12]}" for b in report["bundles"]]
    return (
        f"on {found['device']}: {found['cpu']['model']}, {found['threads']} threads ({', '.join(found['cpu']['features']) or 'no known vector features'}); "
        f"qadeploy {found['qadeploy']} ({found['commit'] or 'no commit'}), Python {found['python']}, {', '.join(versions)}; bundles: {', '.join(bundles)}"
    )


def shown_packages(report: Mapping[str, Any]) -> list[str]:
    """The installed packages that a variant's speed depends on."""
    names = (
        *("onnxruntime", "onnxruntime-gpu", "tokenizers", "numpy"),
        *("torch", "transformers", "optimum-onnx", "openvino", "nncf"),
    )
    return [name for name in names if report["environment"]["packages"].get(name)]


def limit_lines(report: Mapping[str, Any]) -> list[str]:
    """A line per limit: the limit, the measured value, and whether it is held."""
    text = []
    for row in report["limits"]:
        found = "not measured" if row["found"] is None else f"{row['found']:.2f}"
        against = f" (against {row['against']})" if row["against"] else ""
        flag = "--" + row["limit"].replace("_", "-")
        text.append(f"{flag} {row['wanted']:g}: {found}{against}, {'held' if row['held'] else 'NOT HELD'}")
    return text


def _figures(v: Mapping[str, Any]) -> str:
    ratio, (low, high) = v["speedup"]["median"], v["speedup"]["range"]
    latency = v["latency_ms"]
    memory, start, share = v["peak_memory_bytes"], v["startup_seconds"], v["peak_share"]
    windows, of_peak = v["windows_per_second"], share and share["text_to_answers"]
    return (
        f"{v['questions_per_second']:>7.1f} {ratio:>6.2f} {f'({low:.2f}-{high:.2f})':>13} "
        f"{f'{windows:.1f}' if windows else DASH:>7} "
        f"{latency['p50']:>7.1f} {latency['p95']:>7.1f} {latency['p99']:>7.1f} {v['exact_match']:>5.1f} {v['f1']:>5.1f} "
        f"{v['size_bytes'] / 1e6:>5.1f} MB {f'{memory / 1e6:.0f} MB' if memory else DASH:>8} "
        f"{f'{start:.2f} s' if start else DASH:>7} {f'{of_peak:.2f}' if of_peak else DASH:>5}"
    )


def _split_line(v: Mapping[str, Any]) -> str:
    split = v["split"]
    ms, shares = split["ms_per_question"], split["shares"]
    parts = ", ".join(f"{name} {ms[name]:.2f} ms ({shares[name]:.0%})" for name in shares)
    return (
        f"{v['name']}: a question's time is {parts}; text to answers runs at {split['text_to_answers_of_model_alone']:.2f} "
        "of the speed of the model alone"
    )

"""Training windows per second: qadeploy's training against the recipe of transformers' run_qa.py, side by side.

    python -m benchmarks.training_speed SQUAD.json benchmarks/results/training_speed.json

The recipe, written here from its documented behaviour: a fast tokenizer pads every window to 384 tokens
(``padding="max_length"``, overlap 128), the first annotated answer is the target, and the plain Trainer runs
with ``default_data_collator`` and the model's own loss. qadeploy: unpadded windows, batches of similar length,
loss over valid positions. Each runs in fp32, the recipe's default, and in bf16.

The same for all: machine, base model, training questions (with their first annotation), windows (checked token
by token), batch size, epochs, learning rate and its schedule, weight decay, optimizer, seeds. The Trainer's loop
is timed from the first step to the last: no loading, no tokenising, no evaluation. Every model then answers the
same held-out questions through qadeploy's decoder, so that F1 depends only on the training. The variants take
turns within a seed, and the order rotates with the seeds; ratios are taken within a seed. The process's CPU time
is given beside wall-clock time, for a machine that is not idle.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments, default_data_collator, set_seed
from transformers.trainer_callback import PrinterCallback

from benchmarks.harness import Json, report, run, write_report
from qadeploy.core.metrics import Scores, bootstrap_interval
from qadeploy.core.settings import QaSettings
from qadeploy.data.loading import hash_examples, read
from qadeploy.evaluation.scoring import evaluate
from qadeploy.files import hash_file
from qadeploy.records import Example
from qadeploy.shipped import base_model_path
from qadeploy.training.checkpoint import Checkpoint, load_checkpoint, torch_answerer
from qadeploy.training.features import FeatureSet, make_features
from qadeploy.training.options import TrainOptions
from qadeploy.training.trainer import SpanTrainer, training_arguments
from qadeploy.training.training_set import TrainingSet, collate

LENGTH, OVERLAP = 384, 128
HELD_OUT_SEED, HELD_OUT_ARTICLES = 13, 8  # the articles that models/prepare_data.py keeps from the base model
PEER = "recipe fp32"


@dataclass(frozen=True, slots=True)
class TrainingPlan:
    """The settings that all variants share."""

    base: str
    train: tuple[Example, ...]
    held_out: tuple[Example, ...]
    batch_size: int
    learning_rate: float
    epochs: int


@dataclass(frozen=True, slots=True)
class Loop:
    """A finished training loop: clock and CPU seconds, steps, windows trained on (over all epochs), tokens computed."""

    seconds: float
    cpu_seconds: float
    steps: int
    windows: int
    tokens: int


class Stopwatch(TrainerCallback):  # type: ignore[misc]  # transformers has no types
    """Times a Trainer's loop from its first step to its last."""

    seconds = cpu_seconds = 0.0

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Starts the clocks."""
        self._started = time.perf_counter(), time.process_time()

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        """Stops the clocks once the device is done."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds = time.perf_counter() - self._started[0]
        self.cpu_seconds = time.process_time() - self._started[1]


# ---------------------------------------------------------------- data


def parts(source: str, train_count: int, held_out_count: int) -> tuple[tuple[Example, ...], tuple[Example, ...]]:
    """Training questions (first annotation only) and held-out questions: by the data's split, otherwise by article."""
    data = read(source)
    held_out = data.part("validation")
    rest = tuple(e for e in data.examples if e.split != "validation")
    if not held_out:
        articles = json.loads(Path(source).read_text(encoding="utf-8"))["data"]
        titles = {p["context"]: a["title"] for a in articles for p in a["paragraphs"]}
        chosen = set(random.Random(HELD_OUT_SEED).sample(sorted(set(titles.values())), HELD_OUT_ARTICLES))
        held_out = tuple(e for e in data.examples if titles[e.context] in chosen)
        rest = tuple(e for e in data.examples if titles[e.context] not in chosen)
    generator = random.Random(HELD_OUT_SEED)
    train = _draw(generator, rest, train_count)
    return tuple(replace(e, answers=e.answers[:1]) for e in train), _draw(generator, held_out, held_out_count)


def _draw(generator: random.Random, examples: Sequence[Example], count: int) -> tuple[Example, ...]:
    """``count`` of the examples, or all, in their order."""
    return tuple(examples[i] for i in sorted(generator.sample(range(len(examples)), min(count, len(examples)))))


# ---------------------------------------------------------------- the two trainings


def arguments(plan: TrainingPlan, seed: int, precision: str, folder: str, **more: Any) -> TrainingArguments:
    """The arguments of both trainings; the schedule and the decay are qadeploy's defaults."""
    options = TrainOptions()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return training_arguments(
        device,
        output_dir=folder,
        num_train_epochs=float(plan.epochs),
        learning_rate=plan.learning_rate,
        per_device_train_batch_size=plan.batch_size,
        weight_decay=options.weight_decay,
        warmup_ratio=options.warmup_ratio,
        bf16=precision == "bf16",
        optim="adamw_torch_fused",
        save_strategy="no",
        report_to=[],
        seed=seed,
        disable_tqdm=True,
        dataloader_pin_memory=device.type == "cuda",
        **more,
    )


def run_loop(trainer: Trainer, windows: int) -> Loop:
    """Trains and measures the time and the tokens of all batches, padding included."""
    if trainer.accelerator.mixed_precision != ("bf16" if trainer.args.bf16 else "no"):
        raise SystemExit(f"the Trainer computes in {trainer.accelerator.mixed_precision}, which was not requested")
    watch, collate_batch, tokens = Stopwatch(), trainer.data_collator, 0

    def counted(rows: Any) -> Any:
        nonlocal tokens
        batch = collate_batch(rows)
        tokens += batch["input_ids"].numel()
        return batch

    trainer.data_collator = counted
    trainer.add_callback(watch)
    trainer.remove_callback(PrinterCallback)
    steps = trainer.train().global_step
    return Loop(watch.seconds, watch.cpu_seconds, steps, round(windows * trainer.args.num_train_epochs), tokens)


def train_recipe(plan: TrainingPlan, checkpoint: Checkpoint, seed: int, precision: str, folder: str) -> Loop:
    """The recipe of run_qa.py with its defaults for windows and padding."""
    rows = recipe_features(plan.train, checkpoint.tokenizer)
    trainer = Trainer(
        model=checkpoint.model,
        args=arguments(plan, seed, precision, folder),
        train_dataset=rows,
        data_collator=default_data_collator,
    )
    return run_loop(trainer, len(rows))


def recipe_features(examples: Sequence[Example], tokenizer: Any) -> list[dict[str, list[int] | int]]:
    """Windows padded to ``LENGTH`` by the tokenizer, labelled with the first answer, or with CLS if it lies outside."""
    encoded = tokenizer(
        [e.question.lstrip() for e in examples],
        [e.context for e in examples],
        truncation="only_second",
        max_length=LENGTH,
        stride=OVERLAP,
        padding="max_length",
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    rows: list[dict[str, list[int] | int]] = []
    for i, source in enumerate(encoded["overflow_to_sample_mapping"]):
        answers, offsets = examples[source].answers, encoded["offset_mapping"][i]
        context = [k for k, part in enumerate(encoded.sequence_ids(i)) if part == 1]
        first = last = encoded["input_ids"][i].index(tokenizer.cls_token_id)
        if answers and context:
            begins = [k for k in context if offsets[k][0] <= answers[0].start]
            ends = [k for k in context if offsets[k][1] >= answers[0].end]
            inside = offsets[context[0]][0] <= answers[0].start and offsets[context[-1]][1] >= answers[0].end
            if inside and begins and ends:
                first, last = begins[-1], ends[0]
        inputs = {name: encoded[name][i] for name in tokenizer.model_input_names if name in encoded}
        rows.append({**inputs, "start_positions": first, "end_positions": last})
    return rows


def train_own(plan: TrainingPlan, checkpoint: Checkpoint, seed: int, precision: str, folder: str) -> Loop:
    """Training as ``qadeploy train`` does it."""
    features = own_features(plan.train, checkpoint)
    pad = checkpoint.encoder.config.pad_token_id
    trainer = SpanTrainer(
        model=checkpoint.model,
        args=arguments(plan, seed, precision, folder, remove_unused_columns=False),
        train_dataset=TrainingSet(features),
        data_collator=lambda batch: collate(batch, pad),
    )
    return run_loop(trainer, len(features))


def own_features(examples: Sequence[Example], checkpoint: Checkpoint) -> FeatureSet:
    """The windows that qadeploy makes under the recipe's limits."""
    return make_features(examples, checkpoint.encoder, QaSettings(LENGTH, OVERLAP), "training data")


# ---------------------------------------------------------------- measuring

Train = Callable[[TrainingPlan, Checkpoint, int, str, str], Loop]
KINDS: dict[str, Train] = {"recipe": train_recipe, "qadeploy": train_own}


def check_windows(plan: TrainingPlan) -> dict[str, Any]:
    """The facts about the windows. Raises SystemExit if the two trainings would see different ones."""
    checkpoint = load_checkpoint(plan.base)
    own = own_features(plan.train, checkpoint)
    padded = recipe_features(plan.train, checkpoint.tokenizer)
    differing = sum(
        f.window.input_ids.tolist() != row["input_ids"][: sum(row["attention_mask"])]  # type: ignore[index,arg-type]
        for f, row in zip(own.features, padded, strict=True)
    )
    labels = sum(
        f.positions[0].tolist() != [row["start_positions"], row["end_positions"]]
        for f, row in zip(own.features, padded, strict=True)
    )
    if differing:
        raise SystemExit(f"{differing} of {len(own)} windows differ between the two trainings: nothing to compare")
    tokens = [len(f.window) for f in own.features]
    return {
        "count": len(own),
        "with_answer": own.with_answer,
        "labelled_differently": labels,
        "tokens": sum(tokens),
        "mean_tokens": round(statistics.mean(tokens), 1),
    }


def measure(plan: TrainingPlan, kind: str, precision: str, seed: int) -> tuple[Loop, Scores]:
    """Trains one variant from the base, and scores it in fp32 on the held-out questions."""
    set_seed(seed)
    own = kind == "qadeploy"
    overrides = dict.fromkeys(("attention_probs_dropout_prob", "attention_dropout"), 0.0) if own else {}
    checkpoint = load_checkpoint(plan.base, None, **overrides)
    set_seed(seed)
    with tempfile.TemporaryDirectory() as folder:
        loop = KINDS[kind](plan, checkpoint, seed, precision, folder)
    # A fresh model around the weights, because Accelerate leaves the autocast of bf16 on the one it trained.
    trained = replace(load_checkpoint(plan.base), settings=QaSettings(LENGTH, OVERLAP), new_head=False)
    trained.model.load_state_dict(checkpoint.model.state_dict())
    return loop, evaluate(torch_answerer(trained, "auto"), plan.held_out).scores


@dataclass(frozen=True, slots=True)
class TrainedRun:
    """One variant trained with one seed."""

    seed: int
    loop: Loop
    scores: Scores
    load_average: float  # of the machine, over the minute before


RATES: dict[str, Callable[[Loop], float]] = {
    "per_second": lambda loop: loop.windows / loop.seconds,
    "per_cpu_second": lambda loop: loop.windows / loop.cpu_seconds,
}


def summary(name: str, runs: Sequence[TrainedRun], peers: Sequence[TrainedRun], real_tokens: int) -> dict[str, Any]:
    """Medians and ranges of a variant; its ratios and differences to the peer, within each seed."""
    result: dict[str, Any] = {"name": name}
    for unit, rate in RATES.items():
        rates = [rate(run.loop) for run in runs]
        result[f"windows_{unit}"] = _spread(rates)
        result[f"ratio_{unit}"] = _spread([own / rate(peer.loop) for own, peer in zip(rates, peers, strict=True)])
    result["real_tokens_share"] = real_tokens / statistics.mean(run.loop.tokens for run in runs)
    result["f1"] = _spread([run.scores.f1 for run in runs])
    # The mean over the seeds for each question; the bootstrap resamples questions.
    rows = np.mean([r.scores.rows_f1 - p.scores.rows_f1 for r, p in zip(runs, peers, strict=True)], axis=0)
    result["f1_difference"] = {
        "mean": 100 * float(rows.mean()),
        "interval": list(bootstrap_interval(rows)),
        "by_seed": [r.scores.f1 - p.scores.f1 for r, p in zip(runs, peers, strict=True)],
    }
    return result


def _spread(values: Sequence[float]) -> dict[str, Any]:
    return {
        "mean": statistics.mean(values),
        "median": statistics.median(values),
        "range": [min(values), max(values)],
        "stdev": statistics.stdev(values) if len(values) > 1 else None,
    }


def _run_values(run: TrainedRun) -> dict[str, Any]:
    scores = {"f1": run.scores.f1, "exact_match": run.scores.exact_match}
    return {"seed": run.seed, **asdict(run.loop), **scores, "load_average_before": run.load_average}


def _ratios(runs: dict[str, list[dict[str, Any]]], name: str, peer: str, seconds: str) -> str:
    """Median and range of the ratios of windows per second, within each seed."""
    found = [
        (own["windows"] / own[seconds]) / (other["windows"] / other[seconds])
        for own, other in zip(runs[name], runs[peer], strict=True)
    ]
    return f"{statistics.median(found):.2f} ({min(found):.2f} to {max(found):.2f})"


def lines(found: Json) -> list[str]:
    """The report as a table in Markdown."""
    result = [
        f"| training | windows/s | x {PEER} | by CPU time | x the recipe in the same precision, by CPU time | real tokens "
        f"of all computed | F1 by seed | F1 against {PEER} |",
        "|---|---|---|---|---|---|---|---|",
    ]
    runs = found["runs"]
    for v in found["variants"]:
        name = v["name"]
        alike = f"recipe {name.split()[1]}"
        low, high = v["f1_difference"]["interval"]
        seeds = ", ".join(f"{run['f1']:.1f}" for run in runs[name])
        result.append(
            f"| {name} | {v['windows_per_second']['median']:.2f} | {_ratios(runs, name, PEER, 'seconds')} "
            f"| {_ratios(runs, name, PEER, 'cpu_seconds')} | {_ratios(runs, name, alike, 'cpu_seconds')} "
            f"| {100 * v['real_tokens_share']:.0f} % | {seeds} "
            f"| {v['f1_difference']['mean']:+.1f} ({low:+.1f} to {high:+.1f}) |"
        )
    setting, environment = found["setting"], found["environment"]
    windows, packages = setting["windows"], environment["packages"]
    base_f1 = "" if found["base_f1"] is None else f" ({found['base_f1']:.1f} before training)"
    result += [
        "",
        f"{windows['count']} windows of {setting['train_questions']} questions of {setting['data']}, {windows['mean_tokens']} tokens "
        f"in the mean; F1 on {setting['held_out_questions']} held-out questions{base_f1}; base {setting['base']}, batches of "
        f"{setting['batch_size']}, {setting['epochs']} epoch(s), learning rate {setting['learning_rate']:g}, seeds "
        f"{', '.join(str(seed) for seed in setting['seeds'])}. {environment['cpu']['model']}, {environment['threads']} thread(s), "
        f"torch {packages['torch']}, transformers {packages['transformers']}, commit {str(environment['commit'])[:12]}.",
    ]
    return result


def make_report(
    plan: TrainingPlan, data: str, windows: dict[str, Any], base_f1: float | None, runs: dict[str, list[TrainedRun]]
) -> dict[str, Any]:
    """Everything as plain JSON values."""
    weights = Path(plan.base) / "model.safetensors"
    return report(
        environment={
            "threads": torch.get_num_threads(),
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        },
        setting={
            "data": Path(data).name,
            "train_sha256": hash_examples(plan.train),
            "held_out_sha256": hash_examples(plan.held_out),
            "train_questions": len(plan.train),
            "held_out_questions": len(plan.held_out),
            "windows": windows,
            "base": Path(plan.base).name,
            "base_sha256": hash_file(weights) if weights.is_file() else None,
            "batch_size": plan.batch_size,
            "learning_rate": plan.learning_rate,
            "epochs": plan.epochs,
            "seeds": [run.seed for run in runs[PEER]],
            "window_tokens": LENGTH,
            "overlap_tokens": OVERLAP,
        },
        base_f1=base_f1,
        peer=PEER,
        variants=[summary(n, runs[n], runs[PEER], windows["tokens"] * plan.epochs) for n in runs],
        runs={name: [_run_values(run) for run in done] for name, done in runs.items()},
    )


@click.command(help=__doc__)
@click.argument("data")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--base", help="Checkpoint folder to start from.  [default: the base model that ships]")
@click.option("--train-questions", default=1200, show_default=True)
@click.option("--held-out-questions", default=400, show_default=True)
@click.option("--batch-size", default=16, show_default=True)
@click.option("--learning-rate", default=1e-4, show_default=True)
@click.option("--epochs", default=1, show_default=True)
@click.option("--seeds", default="1,2,3", show_default=True)
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads of PyTorch.  [default: all]")
def main(data: str, out: Path, base: str | None, seeds: str, threads: int | None, **options: Any) -> None:
    """Measures, prints the table and writes the JSON, again after each seed."""
    if threads:
        torch.set_num_threads(threads)
    train, held_out = parts(data, options.pop("train_questions"), options.pop("held_out_questions"))
    plan = TrainingPlan(base or str(base_model_path()), train, held_out, **options)
    windows = check_windows(plan)
    start = load_checkpoint(plan.base)
    base_f1 = None if start.new_head else evaluate(torch_answerer(start, "auto"), held_out).scores.f1
    click.echo(f"{len(train)} training questions, windows {windows}, base F1 {base_f1}", err=True)
    variants = [(kind, precision) for precision in ("fp32", "bf16") for kind in KINDS]
    runs: dict[str, list[TrainedRun]] = {f"{kind} {precision}": [] for kind, precision in variants}
    for turn, seed in enumerate(int(s) for s in seeds.split(",")):
        shift = turn % len(variants)
        for kind, precision in variants[shift:] + variants[:shift]:
            load = os.getloadavg()[0]
            loop, scores = measure(plan, kind, precision, seed)
            runs[f"{kind} {precision}"].append(TrainedRun(seed, loop, scores, load))
            rates = ", ".join(f"{rate(loop):.2f} windows {unit}" for unit, rate in RATES.items())
            click.echo(f"seed {seed}, {kind} {precision}: {rates}, F1 {scores.f1:.2f}", err=True)
        found = make_report(plan, data, windows, base_f1, runs)
        write_report(out, found)
    for line in lines(found):
        click.echo(line)


if __name__ == "__main__":
    run(main)

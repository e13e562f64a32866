"""The log of a run: ``train`` passes values, and this module words the lines.

Warnings have their own method, so that no code needs to search the lines for them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from qadeploy.core.metrics import Scores, bootstrap_interval
from qadeploy.core.settings import QaSettings, any_unanswerable
from qadeploy.core.unknown import MANY_UNKNOWN
from qadeploy.data.wording import plural
from qadeploy.records import Answer, Example
from qadeploy.training import distributed
from qadeploy.training.features import FeatureSet
from qadeploy.training.negatives import ExamplesWithNegatives
from qadeploy.training.options import FEW_EXAMPLES, TrainOptions
from qadeploy.training.run_data import RunData
from qadeploy.training.selection import ANSWER_SHARE
from qadeploy.training.speed import has_tf32
from qadeploy.training.torch_device import device_name
from qadeploy.training.trainer import SpanTrainer

Say = Callable[[str], object]
_INDENT = " " * 17


@dataclass(frozen=True, slots=True)
class RunLog:
    """Where a run reports to.

    Attributes:
        say: Called with one line at a time.
        warn: Called with the text of each warning. By default it goes to ``say``, after "WARNING: ".
    """

    say: Say
    warn: Say | None = None

    def step(self, name: str, text: str) -> None:
        """A line that begins with the name of a step."""
        self.say(f"{name:<{len(_INDENT)}}{text}")

    def detail(self, text: str) -> None:
        """A line below a step."""
        self.say(f"{_INDENT}{text}")

    def warning(self, text: str) -> None:
        """A warning; the run continues."""
        if self.warn:
            self.warn(text)
        else:
            self.detail(f"WARNING: {text}")

    def raw_data(self, data: RunData) -> None:
        """Step 1: what was read."""
        found = data.found
        self.step(
            "1 raw data",
            f"{plural(len(found.examples), 'question')} on {plural(_passages(found.examples), 'passage')} from {found.source}",
        )
        if found.skipped:
            self.detail(f"{found.skipped:,} ambiguous rows skipped")
        if found.first_taken:
            self.detail(f"{found.first_taken:,} ambiguous answers located at their first occurrence")
        example = data.train.examples[0]
        self.detail(f"e.g. {_clip(example.question)} -> {_clip(_gold(example))}")

    def splits(self, data: RunData, options: TrainOptions) -> None:
        """Step 2: how the questions are split."""
        origin = f"of {options.dev_data}" if options.dev_data else "carved by passage"
        held_out = f", held out {len(data.held_out.examples):,} (only reported)" if data.held_out else ""
        self.step(
            "2 preprocessing",
            f"train {len(data.train.examples):,}, dev {len(data.dev.examples):,} ({origin}, chooses the epoch){held_out}",
        )
        total = sum(e.split != "validation" for e in data.found.examples)
        if not options.dev_data and len(data.dev.examples) > 2 * max(1, options.dev_fraction * total):
            self.warning(
                f"the dev set holds {len(data.dev.examples):,} of {total:,} questions, because those on one passage stay "
                "together: add questions on other passages, or give --dev-data"
            )
        if len(data.train.examples) < FEW_EXAMPLES:
            self.detail("few examples: unless you set them, the learning rate and the batch size are small")
            if distributed.count() > 1 and not any_unanswerable(data.train.examples):
                self.detail("no negatives, which train in one process: the model will not learn to give no answer")
        example = data.train.examples[0]
        gold = example.answers[0] if example.answers else None
        where = f"answer at code points {gold.start}-{gold.end}" if gold else "no answer"
        self.detail(f"e.g. {where} of {len(example.context)}")

    def crops(self, count: int) -> None:
        """How many copies of questions are on a part of their context, if any."""
        if count:
            self.detail(f"train crops: {count:,} copies of questions, each on a part of its context")

    def negatives(self, name: str, made: ExamplesWithNegatives) -> None:
        """How many negatives were made for a set of questions, if any."""
        if made.on_other_passages or made.answer_removed:
            self.detail(
                f"{name} negatives: {made.on_other_passages:,} on other passages, {made.answer_removed:,} on their own "
                "without the answer"
            )

    def leaks(self, data: RunData, unlabelled: Sequence[Example] = ()) -> None:
        """Warns of dev and held-out passages that are also in the training data or among the ``unlabelled`` questions."""
        seen = {e.context for e in (*data.train.examples, *unlabelled)}
        where = "in the training data" + (" or in --unlabelled" if unlabelled else "")
        for name, scored in (("dev", data.dev), ("held-out", data.held_out)):
            contexts = {e.context for e in scored.examples} if scored else set()
            if contexts & seen:
                self.warning(f"{len(contexts & seen):,} {name} passages are also {where}, so their scores are too high")
            seen |= contexts

    def features(self, train: FeatureSet, dev: FeatureSet, settings: QaSettings, cached: bool) -> None:
        """Step 3: the windows."""
        self.step(
            "3 features",
            f"train {len(train):,} windows ({train.with_answer:,} with an answer), dev {len(dev):,}; at most "
            f"{settings.max_seq_len} tokens, overlap {settings.doc_stride}{' (from the cache)' if cached else ''}",
        )

    def masked_windows(self, count: int, *, taught: bool) -> None:
        """How many training windows have no usable label, if any."""
        if count:
            what = "only the teacher labels them" if taught else "they are left out of training"
            self.detail(f"{count:,} train windows contain an answer's text that is not annotated: {what}")

    def unknown_tokens(self, share: float) -> None:
        """Warns if the tokenizer does not know many of the tokens."""
        if share > MANY_UNKNOWN:
            self.warning(
                f"{share:.0%} of the tokens of contexts and questions are unknown to the base's tokenizer: a model cannot learn "
                "them. Give a --base whose tokenizer knows this language or script, such as a multilingual one"
            )

    def labelled_window(self, features: FeatureSet, token_text: Callable[[int], str]) -> None:
        """The first window with an answer, and its answer's tokens."""
        labelled = (f for f in features.features if f.positions[0, 0] != f.window.null_index)
        feature = next(labelled, features.features[0])
        first, last = feature.positions[0]
        tokens = " ".join(token_text(int(i)) for i in feature.window.input_ids[first : last + 1])
        self.detail(f"e.g. tokens {first}-{last} of {len(feature.window)} are the answer: {tokens}")

    def training(self, trainer: SpanTrainer, options: TrainOptions, device: torch.device, precision: str) -> None:
        """Step 4: what is trained, where, and in which steps."""
        windows, passes = len(trainer.train_dataset), options.gradient_accumulation_steps
        processes = distributed.count()
        batch, batches = f"{options.batch_size} windows", math.ceil(windows / (options.batch_size or 1))
        if trainer.batches is not None:
            batches = len(trainer.batches)
            bounds = [f"{options.batch_tokens} tokens"] if options.batch_tokens else []
            bounds += [batch] if options.batch_size else []
            batch = f"at most {' and '.join(bounds)} ({windows / batches:.1f} windows)"
        self.step(
            "4 training",
            f"{sum(p.numel() for p in trainer.model.parameters()) / 1e6:.1f} M parameters on {device_name(device)} in "
            f"{precision}{', matmuls in TF32' if has_tf32(device) else ''}{', compiled' if options.torch_compile else ''}, "
            f"{plural(int(trainer.args.num_train_epochs), 'epoch')} of {plural(math.ceil(batches / passes), 'step')} of {f'{passes} x ' if passes > 1 else ''}"
            f"{batch}, learning rate {options.learning_rate:g}{f', {processes} processes' if processes > 1 else ''}",
        )
        if trainer.args.num_train_epochs > options.patience:
            self.detail(f"training stops after {plural(options.patience, 'epoch')} without a better dev F1")
        length = len(trainer.train_dataset[0].feature.window)
        self.detail(f"e.g. a window of {length} tokens -> start and end logits [1, {length}] each")

    def mean_of_epochs(self, row: dict[str, Any], best: dict[str, Any], kept: bool) -> None:
        """The dev scores of the mean of the epochs, and whether it is kept."""
        why = "kept" if kept else f"not kept, because epoch {best['epoch']} is better, beyond chance"
        self.detail(
            f"mean of the {row['epochs']} epochs' weights: eval loss {row['eval_loss']:.4f}, accuracy "
            f"{row['eval_accuracy']:.4f}, EM {row['eval_exact_match']:.1f}, F1 {row['eval_f1']:.1f}: {why}"
        )

    def chosen(self, epoch: int, averaged: int | None, settings: QaSettings, options: TrainOptions) -> None:
        """Step 5: the model that is kept, the best epoch's or the mean of the ``averaged`` epochs."""
        origin = "as given" if options.max_answer_len else f"fits {ANSWER_SHARE} % of the training answers"
        kept = f"mean of {averaged} epochs" if averaged else f"best epoch {epoch}"
        self.step("5 evaluation", f"{kept}; max_answer_len {settings.max_answer_len} {origin}")

    def choice(
        self,
        name: str,
        calibration: dict[str, Any],
        no_answer: dict[str, float] | None,
        settings: QaSettings,
        *,
        threshold_given: bool = False,
        tuned: bool = True,
    ) -> None:
        """The effect of the temperature and the null threshold on a set of questions."""
        line = (
            f"{name}: temperature {settings.temperature:.3f}: calibration error (ECE) "
            f"{calibration['ece_before']:.3f} -> {calibration['ece']:.3f}"
        )
        if no_answer is not None:
            line += (
                f"; null threshold {settings.null_threshold:+.3f}: F1 {no_answer['f1']:.1f} (at 0: "
                f"{no_answer['f1_threshold_0']:.1f}, always answering: {no_answer['f1_always_answer']:.1f})"
            )
            if threshold_given:
                line += "; the threshold as given"
            elif not tuned:
                line += "; NOT tuned, because the dev set has too few questions with an answer, or too few without one"
        self.detail(line)

    def answer(self, example: Example, answer: Answer) -> None:
        """One answer beside its annotation."""
        self.detail(f"e.g. {_clip(example.question)} -> {_clip(answer.text)}, annotated {_clip(_gold(example))}")

    def scores(self, name: str, scores: Scores) -> None:
        """Accuracy, EM and F1."""
        low, high = bootstrap_interval(scores.rows_f1)
        has, parts = scores.rows_has_answer, ""
        if has.any() and not has.all():
            parts = f"; HasAns F1 {100 * scores.rows_f1[has].mean():.1f}, NoAns {100 * scores.rows_f1[~has].mean():.1f}"
        self.detail(
            f"{name}: accuracy {scores.accuracy / 100:.3f}, EM {scores.exact_match:.1f}, F1 {scores.f1:.1f} "
            f"(95 % interval {low:.1f} to {high:.1f}) on {plural(scores.total, 'question')}{parts}"
        )


def _clip(text: str, width: int = 70) -> str:
    text = " ".join(text.split())
    return f'"{text}"' if len(text) <= width else f'"{text[: width - 3]}..."'


def _gold(example: Example) -> str:
    return example.answers[0].text if example.answers else "(no answer)"


def _passages(examples: Sequence[Example]) -> int:
    return len({e.context for e in examples})

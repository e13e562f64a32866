"""An invented run for report tests: awkward texts in several scripts, and the facts that training would record."""

from __future__ import annotations

from typing import Any

from qadeploy.records import Annotation, Answer, Example
from qadeploy.reports.facts import Part, RunFacts, RunRecord, make_facts

EVIL = (
    '</style></script><script>document.title = "owned"</script><img src="http://evil.example/x.png" onerror=alert(1)>'
)
ARABIC = "يحتفظ مونغو بالمصباح في الغرفة الثالثة"
FAMILY = "\U0001f468\u200d\U0001f469\u200d\U0001f467"  # one emoji of five code points


def example(name: str, question: str, context: str, *answers: str) -> Example:
    """An example whose answers are at their first place in the context."""
    return Example(name, question, context, tuple(Annotation(a, context.index(a)) for a in answers))


def answer(context: str, text: str, score: float) -> Answer:
    """The first occurrence of a text as an answer."""
    start = context.index(text)
    return Answer(text, start, start + len(text), score)


LONG = (
    "Start. "
    + "The quay is long and wet. " * 80
    + "Ada keeps the lamp. "
    + "The quay is dry. " * 90
    + "Bela has a rope. "
)

JUDGED: tuple[tuple[Example, str, float], ...] = (
    (example("evil", f"Who wrote {EVIL}?", f"Ada & Bela wrote {EVIL} once.", "Ada"), EVIL, 0.97),
    (example("rtl", "من يحتفظ بالمصباح؟", ARABIC, "مونغو"), "الغرفة", 0.95),
    (example("emoji", "Who waves?", f"At noon {FAMILY} wave, Ada sleeps.", FAMILY), "Ada", 0.5),
    (example("long", "What does Bela have?", LONG, "a rope"), "the lamp", 0.4),
    (
        example("two", "When did the ferry leave?", "It left at six, or about six sharp.", "six", "six sharp"),
        "at six",
        0.7,
    ),
    (example("none", "Which dog barked?", "No dog is here."), "dog", 0.2),
    (example("null", "How many doors?", "The hall has nine doors.", "nine"), "", 0.3),
    *(
        (example(f"ok{i}", f"Where is box {i}?", f"Box {i} is in hall {i}.", f"hall {i}"), f"hall {i}", 0.8)
        for i in range(12)
    ),
)
ANSWERS = tuple(answer(e.context, text, score) if text else Answer("", 0, 0, score) for e, text, score in JUDGED)
EXAMPLES = tuple(e for e, _, _ in JUDGED)
LEARNED = (example("t1", "Who sits?", "Cora sits.", "Cora"), example("t2", "Who runs?", "Dora runs.", "Dora"))

RECORD: dict[str, Any] = {
    "status": "complete",
    "options": {
        "data": "faq & answers.jsonl", "base": "base", "out": "runs/fa q", "eval_data": None, "dev_fraction": 0.1,
        "epochs": 3, "learning_rate": 1e-4, "batch_size": 16, "weight_decay": 0.01, "warmup_ratio": 0.06, "patience": 2,
        "seed": 13, "max_seq_len": None, "doc_stride": None, "attention_dropout": 0.0, "precision": "auto",
        "on_ambiguous": "first",
    },
    "precision": "fp32",
    "seed": 13,
    "data_sha256": "0" * 64,
    "base": {"name": "base", "sha256": "1" * 64, "commit": None, "license": "cc-by-4.0"},
    "versions": {"python": "3.11", "qadeploy": "1.2.3"},
    "machine": {"cpu_count": 2, "device": "cpu", "tf32": False},
}  # fmt: skip


def epoch(number: int, train: float | None, dev: float, f1: float, observation: str = "") -> dict[str, Any]:
    """A row of the table of epochs."""
    return {
        "epoch": number, "train_loss": train, "eval_loss": dev, "eval_accuracy": f1 / 200, "eval_exact_match": f1 / 2,
        "eval_f1": f1, "observation": observation,
    }  # fmt: skip


METRICS: dict[str, Any] = {
    "best_epoch": 2,
    "settings": {"max_seq_len": 64, "doc_stride": 16, "max_answer_len": 15},
    "epochs": [
        epoch(0, None, 4.0, 20.0, "the base model, before training"),
        epoch(1, 2.5, 2.0, 50.0, "loss falls, accuracy rises"),
        epoch(2, 1.5, 1.8, 60.0, "loss falls, accuracy rises"),
        epoch(3, 0.9, 2.1, 55.0, "overfitting: eval loss rises while train loss falls; accuracy falls"),
    ],
    "speed": {
        "windows_per_second": 40.0,
        "peak_memory_bytes": 3 * 2**29,
        "epochs": [
            {
                "epoch": n,
                "windows": 120,
                "seconds": 3.0,
                "windows_per_second": 1239.0 + n,
                "peak_memory_bytes": 3 * 2**29,
            }
            for n in (1, 2)
        ],
    },
    "held_out_base": {"exact_match": 10.0, "f1": 20.0, "accuracy": 9.0, "total": len(JUDGED)},
    "dev_base": {"exact_match": 15.0, "f1": 30.0, "accuracy": 14.0, "total": len(JUDGED)},
    "seconds": 236.4,
}


SEARCH: dict[str, Any] = {
    "trials": [
        {"settings": {"learning_rate": 1e-4, "epochs": 3, "negatives": 1}, "f1": 60.0, "seconds": 90.2},
        {"settings": {"learning_rate": 3.2e-4, "epochs": 5, "negatives": 3}, "f1": 64.5, "seconds": 163.0},
        {
            "settings": {"learning_rate": 2.7e-5, "epochs": 2, "negatives": 2},
            "f1": None,
            "seconds": 4.0,
            "error": "training ran out of <memory>",
        },
    ],
    "best": 2,
    "folds": None,
}


def parts(held_out: bool = True) -> list[Part]:
    """The parts of the run."""
    judged = Part(EXAMPLES, tuple(5 if e.id == "long" else 1 for e in EXAMPLES))
    learned = Part(LEARNED, (1, 2))
    return [learned, Part(LEARNED[:1], (1,)), judged] if held_out else [learned, judged]


def facts(metrics: dict[str, Any] | None = None, *, held_out: bool = True, **changes: Any) -> RunFacts:
    """The facts of the run, with changed metrics."""
    return make_facts(RunRecord("fa q", RECORD, {**METRICS, **(metrics or {})}), parts(held_out), ANSWERS, **changes)

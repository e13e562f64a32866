"""The model card of a run (``README.md``), from the same facts as its report."""

from __future__ import annotations

import re

from qadeploy.inference.front_matter import base_label, front_matter
from qadeploy.reports import findings
from qadeploy.reports.run_report import PartFacts, RunFacts, ScoreFacts

_SHOWN_OPTIONS = (
    "epochs",
    "learning_rate",
    "batch_size",
    "batch_tokens",
    "weight_decay",
    "warmup_ratio",
    "patience",
    "seed",
)


def run_card(facts: RunFacts) -> str:
    """Markdown with the hub's front matter: use, data, results with intervals, limits seen, how to run, training."""
    head = front_matter(
        facts.name,
        library="transformers",
        base=facts.record["base"],
        source=facts.source if facts.held_out else f"{facts.source} (dev part)",
        scores={"exact_match": facts.after.exact_match, "f1": facts.after.f1},
        tags=["qadeploy"],
    )
    sections = [
        f"# {facts.name}",
        f"Extractive question answering: {_code(base_label(facts.record['base']))}, fine-tuned on "
        f"{_code(facts.source)} by qadeploy. `report.html` beside this card shows the curves, the mistakes and the "
        "configuration.",
        "## Intended use",
        _use(facts),
        "## How to run it",
        _code_block("python", _python(facts)),
        "The same, without PyTorch and faster, after an export to ONNX:",
        _code_block("sh", facts.export_command),
        "## Results",
        _results(facts),
        "## Limits seen",
        _list(_limits(facts)),
        "## Data",
        _parts(facts),
        _list(facts.data_remarks) if facts.data_remarks else "",
        findings.caption_check(facts),
        "## Training",
        _training(facts),
        _code_block("sh", facts.command),
        _licence(facts),
    ]
    return head + "\n\n".join(text for text in sections if text) + "\n"


def _use(facts: RunFacts) -> str:
    settings = facts.settings
    text = (
        "It finds the answer to a question inside a given text, and returns it as a piece of that text with its place and a "
        "probability. It writes nothing of its own, knows nothing but the text, and was measured only on data like "
        f"{_code(facts.source)}. Long texts are read in windows of {settings['max_seq_len']} tokens; an answer has at most "
        f"{settings['max_answer_len']}."
    )
    if not facts.no_answer:
        return f"{text} It answers every question, also where the text holds no answer."
    return f"{text} It can tell that the text holds no answer."


def _python(facts: RunFacts) -> str:
    return (
        "from qadeploy.training.checkpoint import load_checkpoint, torch_answerer\n\n"
        f"answerer = torch_answerer(load_checkpoint({str(facts.record['options']['out']) + '/checkpoint'!r}))\n"
        'answerer.answer("Who keeps the lamp?", "Mungo Strand keeps the lamp.")'
    )


def _results(facts: RunFacts) -> str:
    rows = [("after fine-tuning", facts.after)]
    if facts.before:
        rows.insert(0, ("base model", facts.before))
    lines = ["| | EM (95 % interval) | F1 (95 % interval) | accuracy (95 % interval) |", "|---|---|---|---|"]
    lines += [f"| {name} | {' | '.join(_cells(scores))} |" for name, scores in rows]
    remark = "" if facts.held_out else ", which also chose the epoch, so that the scores flatter a little"
    return "\n".join([*lines, "", f"Percent, on {facts.judged}{remark}. {findings.calibration_error(facts)}"])


def _cells(scores: ScoreFacts) -> list[str]:
    return [
        f"{value:.1f}" + (f" ({interval[0]:.1f} to {interval[1]:.1f})" if interval else "")
        for value, interval in (
            (scores.exact_match, scores.exact_match_interval),
            (scores.f1, scores.f1_interval),
            (scores.accuracy, scores.accuracy_interval),
        )
    ]


def _limits(facts: RunFacts) -> list[str]:
    seen = list(findings.weaknesses(facts))
    seen = [text for text in seen if text not in facts.data_remarks] or [
        "No group of questions stood out as weaker than the rest."
    ]
    return (
        [*seen, findings.caption_mistakes(facts).partition(";")[0].rstrip(".") + "; `report.html` shows the worst."]
        if (facts.wrong)
        else seen
    )


def _parts(facts: RunFacts) -> str:
    lines = [
        "| part | questions | passages | without answer | words a passage (median, most) | words an answer |",
        "|---|---|---|---|---|---|",
    ]
    return "\n".join([*lines, *(_part(p) for p in facts.parts)])


def _part(part: PartFacts) -> str:
    return (
        f"| {part.name}: {part.role} | {part.questions:,} | {part.passages:,} | {part.without_answer:,} | "
        f"{part.context_words[0]:,}, {part.context_words[1]:,} | {part.answer_words[0]:,}, {part.answer_words[1]:,} |"
    )


def _training(facts: RunFacts) -> str:
    options, record = facts.record["options"], facts.record
    chosen = ", ".join(
        f"{n.replace('_', ' ')} {_number(options[n])}" for n in _SHOWN_OPTIONS if options.get(n) is not None
    )
    versions = ", ".join(f"{name} {number}" for name, number in record["versions"].items())
    return (
        f"{findings.course(facts)} {chosen[:1].upper()}{chosen[1:]}, precision {record['precision']}; {versions}; "
        f"{facts.seconds:.0f} s. SHA-256 of the data: `{record['data_sha256']}`."
    )


def _licence(facts: RunFacts) -> str:
    if facts.base_license:
        return f"Licence: {_code(facts.base_license)} is the base model's; the data may add terms of their own."
    return "Licence: the base model's and the data's, neither of which is known here."


def _number(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _list(texts: tuple[str, ...] | list[str]) -> str:
    return "\n".join(f"- {text}" for text in texts)


def _code(text: str) -> str:
    """Inline code, whatever back ticks or line ends a name holds."""
    flat = " ".join(text.split())
    ticks = "`" * (1 + max((len(run) for run in re.findall("`+", flat)), default=0))
    return f"{ticks}{flat}{ticks}" if ticks == "`" else f"{ticks} {flat} {ticks}"


def _code_block(language: str, text: str) -> str:
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text}\n{fence}"

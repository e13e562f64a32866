"""The model card of a run (``README.md``), from the same facts as its report."""

from __future__ import annotations

import re
from pathlib import Path

from qadeploy.inference.front_matter import base_label, front_matter
from qadeploy.reports import findings
from qadeploy.reports.facts import RunFacts
from qadeploy.reports.page import render, value

_TEMPLATE = Path(__file__).with_name("run_card.md.j2")
_OPTIONS = (
    "epochs", "learning_rate", "batch_size", "batch_tokens", "weight_decay", "warmup_ratio", "patience", "seed",
)  # fmt: skip


def run_card(facts: RunFacts) -> str:
    """Returns Markdown with the hub's front matter: use, how to run it, results, limits, data, training."""
    run, after = facts.run, facts.after
    options = run.record["options"]
    head = front_matter(
        run.name,
        library="transformers",
        base=run.record["base"],
        dataset=run.source,
        dev_set=not facts.held_out,
        scores={"exact_match": after.exact_match, "f1": after.f1},
        tags=["qadeploy"],
    )
    chosen = [f"{name.replace('_', ' ')} {value(options[name])}" for name in _OPTIONS if options.get(name) is not None]
    text = render(
        _TEMPLATE,
        facts=facts,
        findings=findings,
        code=_code,
        code_block=_code_block,
        base=base_label(run.record["base"]),
        options=", ".join(chosen).capitalize(),
        python="from qadeploy.training.checkpoint import load_checkpoint, torch_answerer\n\n"
        f"answerer = torch_answerer(load_checkpoint({str(options['out']) + '/checkpoint'!r}))\n"
        'answerer.answer("Who keeps the lamp?", "Mungo Strand keeps the lamp.")',
    )
    return head + re.sub(r"\n{3,}", "\n\n", text).rstrip() + "\n"


def _code(text: str) -> str:
    """The text as inline code, even if it contains backticks or line breaks."""
    flat = " ".join(text.split())
    ticks = "`" * (1 + max((len(run) for run in re.findall("`+", flat)), default=0))
    return f"{ticks}{flat}{ticks}" if ticks == "`" else f"{ticks} {flat} {ticks}"


def _code_block(text: str, language: str) -> str:
    """The text as a fenced code block, even if it contains backticks."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text}\n{fence}"

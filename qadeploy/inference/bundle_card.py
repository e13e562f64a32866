"""The model card of a bundle, filled from its manifest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qadeploy.inference.front_matter import front_matter


def bundle_card(name: str, manifest: Mapping[str, Any], usage: Sequence[str] = ()) -> str:
    """The model card as Markdown: what the model is, how to use it and what was measured.

    Args:
        name: The name of the bundle.
        manifest: Its manifest.
        usage: Lines that show how to use the bundle; by default with the Answerer.
    """
    settings, measured, parity = manifest["settings"], manifest["measured"], manifest["parity"]
    source = manifest["source"]
    base = source["run"]["base"] if source["run"] else None
    load, ask = f'answerer = Answerer.load("{name}")', 'answerer.answer(question="...", context="...", top_k=3)'
    parts = [
        front_matter(
            name,
            library="qadeploy",
            base=base,
            dataset=measured["data"],
            dev_set=measured.get("dev_set", False),
            scores=measured,
            tags=["onnx", manifest["precision"]],
        )
        + f"# {name}",
        f"An extractive question-answering model ({manifest['precision']}, ONNX), exported by qadeploy from `{source['checkpoint']}`.",
        "\n".join(usage or ["```python", "from qadeploy import Answerer", "", load, ask, "```"]),
        f"Windows of at most {settings['max_seq_len']} tokens overlap by {settings['doc_stride']}"
        + (f" ({settings['long_seq_len']} tokens if a context needs several)" if settings.get("long_seq_len") else "")
        + f"; answers have at most {settings['max_answer_len']} tokens. Scores are probabilities at temperature {settings['temperature']:.3f}.",
    ]
    if settings["null_threshold"] is not None:
        parts.append(
            "Trained with questions that have no answer: unless `allow_no_answer=False`, the null answer (the empty text) comes "
            f"first if its logit exceeds that of the best span by more than {settings['null_threshold']:.3f}."
        )
    low, high = measured["f1_interval"]
    judges = f"{measured['data']}{', dev set' if measured.get('dev_set') else ''}"
    parts.append(
        f"Measured on {judges} ({measured['total']} questions): EM {measured['exact_match']:.1f}, "
        f"F1 {measured['f1']:.1f} (95 % interval {low:.1f} to {high:.1f}); "
        f"change of F1 against PyTorch {measured['f1_change']:+.2f}."
    )
    if "NoAns_total" in measured and "HasAns_total" in measured:
        parts.append(
            f"F1 {measured['HasAns_f1']:.1f} on the {measured['HasAns_total']} questions with an answer, "
            f"{measured['NoAns_f1']:.1f} on the {measured['NoAns_total']} without."
        )
    parts.append(
        f"Logits against PyTorch on {parity['windows']} real windows of {parity['shortest']} to {parity['longest']} tokens: "
        f"they differ by at most {parity['max_abs_diff']:.1e}."
    )
    return "\n\n".join(parts) + "\n"

"""PyTorch with our encoder and decoder, in padded batches of similar length: float32 and bfloat16."""

from __future__ import annotations

from qadeploy.bench.peers.setup import Setup, torch_with, weights_bytes
from qadeploy.bench.variant import Asker, Variant, around, host


def prepare(setup: Setup, precision: str) -> Variant:
    """The checkpoint in ``fp32`` or ``bf16``. Raises FailureError (no checkpoint), MissingExtraError."""
    checkpoint = setup.found_checkpoint()
    torch_with(setup.threads)
    return Variant(
        f"PyTorch {precision}",
        precision,
        weights_bytes(checkpoint, 4 if precision == "fp32" else 2),
        "qadeploy.bench.peers.eager:load",
        {
            "checkpoint": checkpoint,
            "bundle": str(setup.bundle.folder),
            "precision": precision,
            **setup.given("device", "threads", "allow_no_answer", "trust_remote_code"),
        },
        "torch" if precision == "fp32" else f"torch-{precision}",
        "with our windows and spans",
    )


def load(
    checkpoint: str,
    bundle: str,
    precision: str,
    device: str,
    threads: int,
    allow_no_answer: bool,
    trust_remote_code: bool = False,
) -> Asker:
    """The checkpoint as ``torch_answerer`` runs it, with weights and arithmetic in ``precision``."""
    torch = torch_with(threads)
    from qadeploy.training.checkpoint import Hub, load_checkpoint, torch_answerer

    found = load_checkpoint(checkpoint, Hub(trust_remote_code=trust_remote_code))
    answerer = torch_answerer(found, device)
    if precision == "bf16":
        found.model.to(torch.bfloat16)
    return around(host(bundle, lambda encoder: answerer.model), allow_no_answer)

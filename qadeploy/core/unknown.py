"""Unknown tokens: all text that a tokenizer has no token for becomes the same token, so a model cannot tell it apart."""

from __future__ import annotations

import json
from collections.abc import Iterable

import numpy as np
from tokenizers import Tokenizer

from qadeploy.records import IntArray

MANY_UNKNOWN = 0.05  # a share of all tokens


def unknown_id(tokenizer: Tokenizer) -> int | None:
    """Returns the id of the unknown token, or None if the tokenizer has none (byte-level BPE)."""
    model = json.loads(tokenizer.to_str())["model"]
    if "unk_id" in model:  # Unigram
        return None if model["unk_id"] is None else int(model["unk_id"])
    token = model.get("unk_token")
    return None if token is None else tokenizer.token_to_id(token)


def unknown_share(ids: Iterable[IntArray], unknown: int | None) -> float:
    """Returns the share of unknown tokens among all tokens, from 0 to 1; 0 if there are no tokens.

    Args:
        ids: The token ids of each text, without special tokens.
        unknown: What ``unknown_id`` returned.
    """
    every = np.concatenate([np.zeros(0, dtype=np.int64), *ids])
    return float((every == unknown).mean()) if unknown is not None and len(every) else 0.0

"""Two models that read the same text with tokenizers of their own: what each makes of it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from onnxpress.arrays import Ids
from onnxpress.evaluation.inputs import longest
from onnxpress.evaluation.kind import Opened
from onnxpress.evaluation.metrics import ROWS, log_softmax
from onnxpress.evaluation.modes import prompt
from onnxpress.evaluation.texts import load_tokenizer


def compare_reading(candidate: Opened, reference: Opened, pieces: Iterable[Ids]) -> dict[str, float]:
    """Perplexities of both on the text of `pieces`, windows [1, length] of the candidate's ids.

    Both are per token of the reference's tokenizer: whatever the candidate loses by splitting words further, or cannot
    write at all, is in its figure. `more_tokens`: how many more it needs. Nothing where a tokenizer is missing.
    """
    readers: list[tuple[Opened, Any]] = [(opened, load_tokenizer(opened.folder)) for opened in (candidate, reference)]
    if any(tokenizer is None or opened.model.last_only for opened, tokenizer in readers):
        return {}
    losses, tokens = [0.0, 0.0], [0, 0]
    for piece in pieces:
        text = readers[0][1].decode(piece[0].tolist(), skip_special_tokens=True)
        rows = _fitting(text, readers)
        for side, ((opened, _), ids) in enumerate(zip(readers, rows, strict=True)):
            losses[side] += _loss(opened.model, ids)
            tokens[side] += len(ids) - 1
    if not tokens[1]:
        return {}
    mean = [float(np.exp(min(loss / tokens[1], 700.0))) for loss in losses]
    return {"perplexity": mean[0], "reference_perplexity": mean[1], "more_tokens": tokens[0] / tokens[1] - 1}


def _fitting(text: str, readers: Sequence[tuple[Opened, Any]]) -> list[list[int]]:
    """As much of the beginning of a text as both models have positions for, as ids with a first token before them."""
    while True:
        rows = [[opened.starts[0], *reader.encode(text, add_special_tokens=False).ids] for opened, reader in readers]
        shares = [longest(opened, len(row)) / len(row) for (opened, _), row in zip(readers, rows, strict=True)]
        if min(shares) == 1:
            return rows
        text = text[: int(len(text) * min(shares))]


def _loss(model: Any, ids: Sequence[int]) -> float:
    """- log p of all tokens but the first, in nats."""
    row = np.array([ids], np.int64)
    if len(ids) < 2:
        return 0.0
    logits = prompt(model, row, np.arange(len(ids) - 1)).logits
    total = 0.0
    for start in range(0, len(logits), ROWS):
        scores = log_softmax(logits[start : start + ROWS])
        total -= float(scores[np.arange(len(scores)), row[0, start + 1 : start + 1 + len(scores)]].sum())
    return total

"""What a change did to a model, in numbers: pure numpy, no runtime.

Logits are [..., vocabulary] float32; divergences are in nats and computed in float64 over a few rows at a time, so
that a window of 512 tokens over 150,000 words needs no more memory than its logits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxpress.errors import BadInputError, VerificationError

ROWS = 32
"""Rows whose log-probabilities are held at once."""


def log_softmax(logits: NDArray[Any]) -> NDArray[np.float64]:
    """Log-probabilities over the last axis."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return shifted


def require_finite(values: NDArray[Any], what: str) -> None:
    """Raise VerificationError naming the first place where `values` is NaN or infinite."""
    bad = ~np.isfinite(values)
    if bad.any():
        place = ", ".join(str(i) for i in np.argwhere(bad)[0])
        raise VerificationError(
            f"{what}: {np.count_nonzero(bad)} of {bad.size} values are NaN or infinite, the first at [{place}]"
        )


@dataclass
class Divergence:
    """Running sums over tokens of how far a candidate's next-token distributions are from the reference's."""

    tokens: int = 0
    kl_sum: float = 0.0
    agreed: int = 0
    max_difference: float = 0.0
    """Largest difference of two log-probabilities."""
    targets: int = 0
    loss_sum: float = 0.0
    reference_loss_sum: float = 0.0

    def add(self, reference: NDArray[Any], candidate: NDArray[Any], targets: NDArray[np.int64] | None = None) -> None:
        """Add logits [tokens, vocabulary] of both; `targets` [<= tokens] are the words that really followed."""
        if reference.shape != candidate.shape:
            raise BadInputError(
                f"the reference has logits {list(reference.shape)}, the candidate {list(candidate.shape)}",
                hint="both need the same vocabulary" if reference.shape[-1] != candidate.shape[-1] else None,
            )
        for start in range(0, len(reference), ROWS):
            expected, found = log_softmax(reference[start : start + ROWS]), log_softmax(candidate[start : start + ROWS])
            self.kl_sum += float((np.exp(expected) * (expected - found)).sum())
            self.agreed += int((expected.argmax(-1) == found.argmax(-1)).sum())
            self.max_difference = max(self.max_difference, float(np.abs(expected - found).max()))
            if targets is not None:
                words = targets[start : start + ROWS]
                rows = np.arange(len(words))
                self.loss_sum -= float(found[rows, words].sum())
                self.reference_loss_sum -= float(expected[rows, words].sum())
                self.targets += len(words)
        self.tokens += len(reference)

    @property
    def kl(self) -> float:
        """Mean over tokens of KL(reference || candidate), in nats; never below 0."""
        return max(0.0, self.kl_sum / self.tokens)

    @property
    def top1_agreement(self) -> float:
        """Share of tokens for which both put the same word first."""
        return self.agreed / self.tokens

    @property
    def perplexity(self) -> float | None:
        return _perplexity(self.loss_sum / self.targets) if self.targets else None

    @property
    def reference_perplexity(self) -> float | None:
        return _perplexity(self.reference_loss_sum / self.targets) if self.targets else None

    def figures(self) -> dict[str, float]:
        result = {"kl": self.kl, "top1_agreement": self.top1_agreement, "max_difference": self.max_difference}
        if self.targets:
            result["perplexity"] = _perplexity(self.loss_sum / self.targets)
            result["reference_perplexity"] = _perplexity(self.reference_loss_sum / self.targets)
        return result


def _perplexity(loss: float) -> float:
    """exp of the mean loss in nats, kept finite for a model that is destroyed."""
    return float(np.exp(min(loss, 700.0)))


def cosine(a: NDArray[Any], b: NDArray[Any]) -> NDArray[np.float64]:
    """Cosine along the last axis; two zero vectors are alike (1), a zero vector and another are not (0)."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    both_zero = ~a.any(axis=-1) & ~b.any(axis=-1)
    result: NDArray[np.float64] = np.where(both_zero, 1.0, (a * b).sum(-1) / np.where(norms == 0, 1, norms))
    return result


def ranks(values: NDArray[Any]) -> NDArray[np.float64]:
    """Ranks from 1, ties sharing their mean rank."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    mean: NDArray[np.float64] = (last - (counts - 1) / 2)[inverse.reshape(-1)]
    return mean


def spearman(a: NDArray[Any], b: NDArray[Any]) -> float:
    """Rank correlation, Pearson's of the ranks; BadInputError below two values or when one side is constant."""
    if len(a) != len(b) or len(a) < 2:
        raise BadInputError(f"rank correlation of {len(a)} and {len(b)} values")
    x, y = (ranks(v) - (len(v) + 1) / 2 for v in (a, b))
    norm = np.sqrt((x * x).sum() * (y * y).sum())
    if norm == 0:
        raise BadInputError("rank correlation with a constant: all scores are equal")
    return float((x * y).sum() / norm)

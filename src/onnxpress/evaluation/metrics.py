"""Two models' outputs compared, in numbers: pure numpy, no runtime.

Logits are [..., vocabulary] float32; divergences are in nats and computed in float64 over a few rows at a time, so
that a window of 512 tokens over 150,000 words needs no more memory than its logits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxpress.arrays import Array, Doubles
from onnxpress.errors import BadInputError, VerificationError

ROWS = 32
"""Rows whose log-probabilities are held at once."""


def log_softmax(logits: NDArray[Any]) -> NDArray[np.float64]:
    """Log-probabilities over the last axis."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return shifted


def require_finite_output(values: NDArray[Any], what: str) -> None:
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

    @staticmethod
    def summary(modes: Mapping[str, Divergence]) -> dict[str, float]:
        """The worst of all modes, the KL of each, and the perplexities of the prompt."""
        return {
            "max_difference": max(mode.max_difference for mode in modes.values()),
            "kl": max(mode.kl for mode in modes.values()),
            "top1_agreement": min(mode.top1_agreement for mode in modes.values()),
            **{f"{name}_kl": mode.kl for name, mode in modes.items()},
            **{key: value for key, value in modes["prefill"].figures().items() if key.endswith("perplexity")},
        }


@dataclass
class Deviation:
    """How far a candidate's arrays are from the reference's, number by number and by angle."""

    max_difference: float = 0.0
    """Largest difference of two numbers, in standard deviations of the array."""
    cosines: list[Doubles] = field(default_factory=list)
    """Along the last axis, of each pair of arrays."""

    def add(self, expected: Array, found: Array) -> None:
        """Add two arrays of one shape. Raises VerificationError where the shapes differ."""
        if expected.shape != found.shape:
            shapes = f"{list(found.shape)}; the reference has {list(expected.shape)}"
            raise VerificationError(f"an output has shape {shapes}")
        expected, found = np.atleast_1d(expected).astype(np.float64), np.atleast_1d(found).astype(np.float64)
        scale = float(expected.std()) or 1.0
        self.max_difference = max(self.max_difference, float(np.abs(expected - found).max(initial=0)) / scale)
        self.cosines.append(cosine(expected, found).ravel())

    def figures(self) -> dict[str, float]:
        return self.summary({"prefill": self})

    @staticmethod
    def summary(modes: Mapping[str, Deviation]) -> dict[str, float]:
        """Over all modes, which have the same rows."""
        rows = zip(*(mode.cosines for mode in modes.values()), strict=True)
        values = np.concatenate([cosines for row in rows for cosines in row])
        return {
            "max_difference": max(mode.max_difference for mode in modes.values()),
            "cosine_mean": float(values.mean()),
            "cosine_min": float(values.min()),
        }


@dataclass
class Similarity:
    """The angle between a candidate's vectors and the reference's."""

    cosines: list[Doubles] = field(default_factory=list)

    def add(self, expected: Array, found: Array, name: str = "output") -> None:
        """Add vectors [..., width]. Raises BadInputError, naming the output, where the shapes differ."""
        if expected.shape != found.shape:
            raise BadInputError(f"{name}: shapes {expected.shape} and {found.shape}")
        self.cosines.append(cosine(np.atleast_1d(expected), np.atleast_1d(found)).ravel())

    def figures(self) -> dict[str, float]:
        values = np.concatenate(self.cosines)
        return {"cosine_mean": float(values.mean()), "cosine_min": float(values.min())}

    @staticmethod
    def headline(modes: Mapping[str, Similarity]) -> dict[str, float]:
        """The figures of the worst mode."""
        figures = [mode.figures() for mode in modes.values()]
        return {key: min(row[key] for row in figures) for key in ("cosine_mean", "cosine_min")}


@dataclass
class RelativeDifference:
    """Largest difference of two numbers, as a share of the array's largest number (of 1 where all are smaller)."""

    max_difference: float = 0.0

    def add(self, expected: Array, found: Array) -> None:
        scale = max(1.0, float(np.abs(expected).max(initial=0)))
        self.max_difference = max(self.max_difference, float(np.abs(found - expected).max(initial=0)) / scale)

    def figures(self) -> dict[str, float]:
        return {"max_difference": self.max_difference}


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

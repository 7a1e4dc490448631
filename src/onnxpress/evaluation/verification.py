"""The quick check after every pass: does the graph still compute what the reference does?

A `Reference` holds inputs and the outputs expected for them, computed once per build and bounded in size; `verify_step`
runs a graph on them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np

from onnxpress.arrays import Array, Ids
from onnxpress.errors import DestroyedError, VerificationError
from onnxpress.evaluation.decoder import MAXIMUM_BYTES
from onnxpress.evaluation.kind import Answered, Case, Figures, Opened, compare
from onnxpress.evaluation.language_model import TokenDivergence
from onnxpress.evaluation.opening import open_model

__all__ = ["EXACT_TOLERANCE", "MAXIMUM_BYTES", "Reference", "cost_of", "largest_difference", "verify_step"]

EXACT_TOLERANCE = 1e-3
"""Largest difference of log-probabilities that an exact pass may cause.

For other outputs it is relative to the standard deviation of the output."""
LARGEST_KL = 4.0
"""Nats per token above which a lossy pass has destroyed the model: post-training 4 bits cost well below 1."""
SMALLEST_COSINE = 0.5


@dataclass(frozen=True)
class Reference:
    """Inputs, and what the reference computes for them."""

    kind: str
    name: str
    answers: Sequence[Answered]

    @property
    def nbytes(self) -> int:
        """Bytes of what the reference computed."""
        arrays = {id(array): array for _, outputs in self.answers for array in _arrays(outputs)}
        return sum(array.nbytes for array in arrays.values())

    @classmethod
    def of(
        cls,
        reference: str | Path | Opened,
        *,
        windows: Sequence[Ids] | None = None,
        seed: int = 0,
        like: Opened | None = None,
        length: int | None = None,
    ) -> Reference:
        """Run `reference` on the inputs of its kind, see `Opened.verification_cases`.

        windows: of token ids, in place of what the reference would write.
        like: a graph of the same model, to write a decoder's windows (torch would take many times as long), and whose
        inputs tell the shapes of pixels or samples that torch does not.
        length: tokens in each of a decoder's two windows, fewer where their logits would not fit into `MAXIMUM_BYTES`.
        """
        opened = open_model(reference)
        cases = opened.verification_cases(like or opened, windows, seed, length)
        return cls(opened.kind, opened.name, list(opened.answers(cases)))


def verify_step(
    reference: Reference,
    after: str | Path | Opened,
    exact: bool,
    *,
    tolerance: float = EXACT_TOLERANCE,
    largest_kl: float = LARGEST_KL,
    what: str = "the graph",
) -> Figures:
    """Run `after` (a path or an Opened) on the reference's inputs and return what differs.

    Decoders and encoder-decoders: `max_difference` of log-probabilities (over every position, word and mode), `kl`,
    `top1_agreement`, the KL by mode, and on the prompt `perplexity` and `reference_perplexity`. Other graphs:
    `max_difference` in standard deviations of the output, `cosine_mean`, `cosine_min`.

    Raises VerificationError, naming `what`, the figure and the limit, when an exact step differs by more than
    `tolerance`, when a lossy one leaves nothing of the model, and for either when an output is NaN or infinite.
    """
    opened = open_model(after)
    if opened.kind != reference.kind:
        raise VerificationError(f"{what} has kind {opened.kind}, its reference {reference.name} kind {reference.kind}")
    try:
        metrics = opened.summary(compare(opened, reference.answers, opened.verified_by))
    except VerificationError as error:
        raise VerificationError(f"{what}: {error}", hint=error.hint) from error
    worst = metrics["max_difference"]
    if exact and worst > tolerance:
        raise VerificationError(
            f"{what} should be exact but differs from the reference by {worst:.3g}; the tolerance is {tolerance:.3g}"
        )
    if metrics.get("kl", 0) > largest_kl:
        raise DestroyedError(
            f"{what} destroyed the model: KL {metrics['kl']:.3g} nats per token; the limit is {largest_kl:.3g}"
        )
    if metrics.get("cosine_min", 1) < SMALLEST_COSINE:
        raise DestroyedError(
            f"{what} destroyed the model: cosine {metrics['cosine_min']:.3f}; the limit is {SMALLEST_COSINE}"
        )
    return metrics


def cost_of(metrics: Mapping[str, float]) -> float:
    """Read off a verification what was lost: KL in nats per token, or 1 - mean cosine."""
    return metrics["kl"] if "kl" in metrics else 1 - metrics["cosine_mean"]


def largest_difference(before: Callable[[], Opened], after: Callable[[], Opened], names: tuple[str, str]) -> float:
    """Largest difference of log-probabilities of two graphs of one model that writes text, on the very same batch.

    before, after: open the graphs, which take turns in memory.
    names: what errors call the two. Raises VerificationError where an output is NaN or infinite.
    """
    case, expected = _run_chunk(before, None, names[0])
    _, found = _run_chunk(after, case, names[1])
    divergence = TokenDivergence()
    for one, other in zip(expected, found, strict=True):
        divergence.compare(one, other)
    return divergence.max_difference


def _run_chunk(open_graph: Callable[[], Opened], case: Case | None, name: str) -> tuple[Case, list[Any]]:
    """Run a case, by default a new one."""
    opened = open_graph()
    case = case or opened.chunk_case()
    try:
        return case, opened.run(case.reference_mode, case.inputs)
    except VerificationError as error:
        raise VerificationError(f"{name}: {error}", hint=error.hint) from error


def _arrays(value: Any) -> Iterator[Array]:
    """All arrays of outputs, whatever they are of."""
    if isinstance(value, np.ndarray):
        yield value
    elif is_dataclass(value):
        for field in fields(value):
            yield from _arrays(getattr(value, field.name))
    elif isinstance(value, Mapping):
        yield from _arrays(list(value.values()))
    elif isinstance(value, list):
        for part in value:
            yield from _arrays(part)

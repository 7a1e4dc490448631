"""The three ways in which a model is driven when it is measured: a prompt, cached decoding, a padded batch.

They work on anything with `prefill`, `decode` and `last_only` (decoders) or `encode` (encoders): an onnxruntime session
or torch. Logits come back as [tokens, vocabulary], checked to be finite.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from onnxpress.arrays import Floats, Ids
from onnxpress.errors import BadInputError
from onnxpress.evaluation.metrics import Divergence, require_finite
from onnxpress.evaluation.texts import pad

PADDING_KL = 0.1
"""Nats per token that padding may cost a graph, quantized ones included; where it is not supported it costs several."""


class LanguageModel(Protocol):
    """A decoder: see `onnxpress.runtime.decoder.DecoderSession` for shapes."""

    @property
    def last_only(self) -> bool: ...
    def prefill(self, ids: Ids, mask: Ids | None = None) -> Floats: ...
    def decode(self, ids: Ids) -> Floats: ...


class TextEncoder(Protocol):
    def encode(self, ids: Ids, mask: Ids | None = None) -> Mapping[str, NDArray[Any]]: ...


class SequenceToSequence(LanguageModel, Protocol):
    def encode(self, feeds: Mapping[str, NDArray[Any]]) -> Floats: ...


def positions_of(length: int, last_only: bool, sample: int = 8) -> Ids:
    """Positions of a prompt of `length` at which logits are compared: all that have a successor, or an even sample.

    A graph that returns the last logits only has to run one prompt per position, hence the sample.
    """
    every = np.arange(length - 1)
    return every if not last_only else np.unique(np.linspace(0, length - 2, sample).round().astype(np.int64))


def prompt(model: LanguageModel, ids: Ids, positions: Ids) -> Floats:
    """Logits after the tokens at `positions` of `ids` [1, length], from prompts without a cache."""
    if not model.last_only:
        logits: Floats = model.prefill(ids[:, : int(positions[-1]) + 1])[0]
        logits = logits if len(positions) == len(logits) else logits[positions]
    else:
        logits = np.concatenate([model.prefill(ids[:, : p + 1])[0] for p in positions.tolist()])
    require_finite(logits, "prefill")
    return logits


def cached(model: LanguageModel, ids: Ids, start: int, steps: int) -> Floats:
    """Logits [steps, vocabulary] after the tokens at `start`, `start + 1`, ..., each fed alone to the cache."""
    model.prefill(ids[:, :start])
    logits = np.concatenate([model.decode(ids[:, i : i + 1])[0] for i in range(start, start + steps)])
    require_finite(logits, "cached decode")
    return logits


def padded(model: LanguageModel, rows: Sequence[Ids], steps: int) -> list[Floats]:
    """Logits of rows [length_i] run as one left-padded batch: the prompts first, then the last `steps` tokens singly.

    Per row [length_i, vocabulary]; [1 + steps, vocabulary] where the model returns the last logits only.
    """
    if min(len(row) for row in rows) <= steps:
        raise BadInputError(f"a row of the padded batch has no more than {steps} tokens")
    ids, mask = pad([row[: len(row) - steps].tolist() for row in rows], left=True)
    parts = [model.prefill(ids, mask)]
    for step in range(steps):
        parts.append(model.decode(np.array([[row[len(row) - steps + step]] for row in rows], np.int64)))
    logits = np.concatenate(parts, axis=1)
    result = [logits[i, -(1 + steps if model.last_only else len(row)) :] for i, row in enumerate(rows)]
    for row in result:  # the padding's own outputs mean nothing and may be anything
        require_finite(row, "padded batch")
    return result


def alone(model: LanguageModel, rows: Sequence[Ids], steps: int) -> list[Floats]:
    """What `padded` should return: each row by itself, without padding."""
    return [padded(model, [row], steps)[0] for row in rows]


def takes_padding(model: LanguageModel, rows: Sequence[Ids], steps: int, expected: Sequence[Floats]) -> bool:
    """Whether a left-padded batch gives about what each row gives by itself, `expected`.

    It does not in graphs of onnxruntime-genai's model builder, which are made for batches padded on the right.
    """
    divergence = Divergence()
    for one, other in match_ends(expected, padded(model, rows, steps)):
        divergence.add(one, other)
    return divergence.kl <= PADDING_KL


def match_ends(reference: Sequence[Floats], candidate: Sequence[Floats]) -> list[tuple[Floats, Floats]]:
    """Cut each pair of rows to the positions that both have, which are the last ones."""
    pairs = []
    for expected, found in zip(reference, candidate, strict=True):
        length = min(len(expected), len(found))
        pairs.append((expected[-length:], found[-length:]))
    return pairs


def continuation(model: LanguageModel, starts: Ids, length: int) -> Ids:
    """What `model` finds most likely: `starts` [rows, 1] followed by `length` tokens, greedily."""
    ids, logits = starts, model.prefill(starts)
    for step in range(length):
        best = logits[:, -1].argmax(-1)[:, None].astype(np.int64)
        ids = np.concatenate([ids, best], axis=1)
        if step + 1 < length:
            logits = model.decode(best)
    return ids


def common_output(first: Mapping[str, Any], second: Mapping[str, Any]) -> str:
    """The output to compare two encoders by: a sentence embedding, hidden states, logits, or any that both have."""
    for name in ("sentence_embedding", "last_hidden_state", "logits", *first):
        if name in first and name in second:
            return name
    raise BadInputError(
        f"the two models have no output in common: {', '.join(first)} and {', '.join(second)}",
        hint="export both for the same task",
    )


def hidden_rows(outputs: NDArray[Any], mask: Ids) -> list[Floats]:
    """Real positions of each row: [batch, length, width] -> rows of [length_i, width]; [batch, width] -> [1, width]."""
    if outputs.ndim == 2:
        return [row[None].astype(np.float32) for row in outputs]
    return [row[keep.astype(bool)].astype(np.float32) for row, keep in zip(outputs, mask, strict=True)]

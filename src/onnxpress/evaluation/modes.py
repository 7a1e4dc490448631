"""The ways in which a decoder is driven when it is measured: a prompt, cached steps, a chunk after a past, a batch with
padding on either side.

They work on anything with `prefill`, `decode` and `last_only`: a session of onnxruntime, or torch. Logits come back as
[tokens, vocabulary], checked to be finite.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from onnxpress.arrays import Floats, Ids
from onnxpress.errors import BadInputError
from onnxpress.evaluation.metrics import require_finite_output
from onnxpress.evaluation.texts import pad_rows


class DecoderLike(Protocol):
    """A decoder: see `onnxpress.runtime.decoder.DecoderSession` for shapes."""

    @property
    def last_only(self) -> bool: ...
    def prefill(self, ids: Ids, mask: Ids | None = None) -> Floats: ...
    def decode(self, ids: Ids) -> Floats: ...


@dataclass(frozen=True)
class Predictions:
    """Logits of a model for the next token, after some tokens of a text."""

    logits: Floats
    """[positions, vocabulary]"""
    positions: Ids
    """Places of the tokens that the logits come after, ascending."""
    followed: Ids | None = None
    """The tokens that really came next."""


@dataclass(frozen=True)
class Rows:
    """Texts to be run as one padded batch: the prompts first, then the last tokens of each singly."""

    rows: Sequence[Ids]
    """Token ids, [length_i] each."""
    steps: int
    """Tokens at the end of each row that are fed to the cache, one by one."""
    left: bool | Sequence[bool] = True
    """Where all rows, or each, are padded: on the left, as transformers does, or on the right, as onnxruntime-genai."""


@dataclass(frozen=True)
class Chunk:
    """A batch, and several tokens at once after it."""

    ids: Ids
    """[rows, length]"""
    mask: Ids | None
    """[rows, length], 0 where padded."""
    next: Ids
    """[rows, tokens]"""
    last_only: bool = False
    """Whether only the last logits of both are compared."""


def positions_of(length: int, last_only: bool, sample: int = 8) -> Ids:
    """Choose positions of a prompt of `length` at which logits are compared: all that have a successor, or an even
    sample.

    A graph that returns the last logits only has to run one prompt per position, hence the sample.
    """
    every = np.arange(length - 1)
    return every if not last_only else np.unique(np.linspace(0, length - 2, sample).round().astype(np.int64))


def prompt(model: DecoderLike, ids: Ids, positions: Ids) -> Predictions:
    """Logits after the tokens at `positions` of `ids` [1, length], from prompts without a cache."""
    if not model.last_only:
        logits: Floats = model.prefill(ids[:, : int(positions[-1]) + 1])[0]
        logits = logits if len(positions) == len(logits) else logits[positions]
    else:
        logits = np.concatenate([model.prefill(ids[:, : p + 1])[0] for p in positions.tolist()])
    require_finite_output(logits, "prefill")
    return Predictions(logits, positions, ids[0, positions + 1])


def cached(model: DecoderLike, ids: Ids, start: int, steps: int) -> Predictions:
    """Logits after the tokens at `start`, `start + 1`, ..., each fed alone to the cache."""
    model.prefill(ids[:, :start])
    logits = np.concatenate([model.decode(ids[:, i : i + 1])[0] for i in range(start, start + steps)])
    require_finite_output(logits, "cached decode")
    positions = np.arange(start, start + steps)
    return Predictions(logits, positions, ids[0, positions + 1])


def padded(model: DecoderLike, batch: Rows) -> list[Predictions]:
    """Logits of rows that are run as one batch: of all positions, or the last `1 + steps` where the model returns the
    last logits only (and then of the steps alone where a row is padded on the right)."""
    rows, steps = batch.rows, batch.steps
    if min(len(row) for row in rows) <= steps:
        raise BadInputError(f"a row of the padded batch has no more than {steps} tokens")
    ids, mask = pad_rows([row[: len(row) - steps].tolist() for row in rows], left=batch.left)
    parts = [model.prefill(ids, mask)]
    for step in range(steps):
        parts.append(model.decode(np.array([[row[len(row) - steps + step]] for row in rows], np.int64)))
    logits = np.concatenate(parts, axis=1)
    kept = mask[:, -parts[0].shape[1] :]  # of the prompts' logits, those that are there
    kept = np.concatenate([kept, np.ones((len(rows), steps), np.int64)], axis=1).astype(bool)
    found = []
    for row, values, real in zip(rows, logits, kept, strict=True):
        values = values[real]
        require_finite_output(values, "padded batch")  # the padding's own outputs mean nothing and may be anything
        found.append(Predictions(values, np.arange(len(row) - len(values), len(row))))
    return found


def alone(model: DecoderLike, batch: Rows) -> list[Predictions]:
    """Run each row by itself, without padding: what `padded` should return."""
    return [padded(model, Rows([row], batch.steps))[0] for row in batch.rows]


def chunk(model: DecoderLike, batch: Chunk) -> list[Predictions]:
    """Logits of each row of a batch, and of what comes after it at once."""
    parts = [model.prefill(batch.ids, batch.mask), model.decode(batch.next)]
    logits = np.concatenate([part[:, -1:] for part in parts] if batch.last_only else parts, axis=1)
    require_finite_output(logits, "chunk after a past")
    return [Predictions(row, np.arange(len(row))) for row in logits]


def continuation(model: DecoderLike, starts: Ids, length: int) -> Ids:
    """Continue `starts` [rows, 1] by the `length` tokens that `model` finds most likely, greedily."""
    ids, logits = starts, model.prefill(starts)
    for step in range(length):
        best = logits[:, -1].argmax(-1)[:, None].astype(np.int64)
        ids = np.concatenate([ids, best], axis=1)
        if step + 1 < length:
            logits = model.decode(best)
    return ids

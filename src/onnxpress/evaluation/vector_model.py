"""Models that make arrays of numbers, compared by angle and by distance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from onnxpress.arrays import Array, Feeds
from onnxpress.errors import BadInputError, VerificationError
from onnxpress.evaluation.kind import PADDED, PREFILL, Case, Figures, Opened
from onnxpress.evaluation.metrics import Deviation, RelativeDifference, Similarity, cosine, require_finite_output

Outputs = Mapping[str, Array]
"""Outputs of one run, by name."""


class OutputDifference(RelativeDifference):
    """`RelativeDifference` of every output of a candidate, but of the sentence embedding, which is ours."""

    def compare(self, expected: Outputs, found: Outputs) -> None:
        for name in found:
            if name == "sentence_embedding":
                continue
            if name not in expected:
                raise VerificationError(f"output {name} is none of the original's: {', '.join(expected)}")
            require_finite_output(found[name], name)
            self.add(expected[name], found[name])


class VectorModel(Opened):
    """The common part of encoders and other graphs."""

    parity_by = OutputDifference

    def parity_cases(self, like: Opened, seed: int) -> list[Case]:
        """One row, and a batch with padding on the right of one."""
        generator = np.random.default_rng(seed)
        sizes = ((1, 11, 0, PREFILL), (3, 20, 6, PADDED))
        return [Case(self._random_feeds(like, generator, *size), (mode,)) for *size, mode in sizes]

    def _random_feeds(
        self, like: Opened, generator: np.random.Generator, batch: int, length: int, padding: int
    ) -> Feeds:
        feeds: dict[str, Array] = {}
        for name, node in like.model.inputs.items():
            if name == "input_ids":
                feeds[name] = generator.integers(3, self.model.vocabulary - 1, (batch, length))
                feeds[name][:, -1] = self.model.vocabulary - 1  # CLIP's end of text
            elif name == "attention_mask":
                feeds[name] = np.ones((batch, length), np.int64)
            elif name == "token_type_ids":
                feeds[name] = np.repeat([[0, 1]], batch, 0).repeat((length + 1) // 2, 1)[:, :length]
            elif name == "pixel_values":
                feeds[name] = generator.normal(size=(batch, *node.shape[1:])).astype(np.float32)
            else:
                feeds[name] = generator.normal(size=(batch, 3000 + 100 * length)).astype(np.float32)
        mask = feeds.get("attention_mask")
        if padding and mask is not None and "pixel_values" not in feeds:
            mask[0, -padding:] = 0
            feeds["input_ids"][0, -padding:] = self.config.get("pad_token_id") or 0
        return feeds

    def outputs_of(self, feeds: Feeds) -> Outputs:
        """Run a graph: all outputs, and of those with a position for each token only the real ones."""
        outputs, mask = self.model.run(feeds), feeds.get("attention_mask")
        if mask is None or mask.all():
            return outputs  # type: ignore[no-any-return]
        real = mask.astype(bool)
        return {name: array[real] if array.shape[:2] == mask.shape else array for name, array in outputs.items()}

    def summary(self, modes: Mapping[str, Deviation]) -> Figures:
        return Deviation.summary(modes)

    def headline(self, modes: Mapping[str, Similarity], cases: Sequence[Case]) -> dict[str, Any]:
        return {"modes": {name: mode.figures() for name, mode in modes.items()}, **Similarity.headline(modes)}

    def recorded_difference(self, expected: Mapping[str, Any], found: Mapping[str, Any]) -> Figures:
        pairs = [(np.asarray(value).ravel(), np.asarray(found[name]).ravel()) for name, value in expected.items()]
        return {"cosine_min": min(float(cosine(one, other)) for one, other in pairs)}


def common_output(first: Mapping[str, Any], second: Mapping[str, Any]) -> str:
    """Choose the output to compare two encoders by: a sentence embedding, hidden states, logits, or any that both
    have."""
    for name in ("sentence_embedding", "last_hidden_state", "logits", *first):
        if name in first and name in second:
            return name
    raise BadInputError(
        f"the two models have no output in common: {', '.join(first)} and {', '.join(second)}",
        hint="export both for the same task",
    )


def common_names(expected: Outputs, found: Outputs) -> list[str]:
    """Names of the outputs that both models have, of which there must be one."""
    return [name for name in expected if name in found] or [common_output(expected, found)]

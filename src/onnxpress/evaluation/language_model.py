"""Models that write text, compared by what they say of the next token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from onnxpress.arrays import Array, Ids
from onnxpress.evaluation.kind import DECODE, PADDED, PREFILL, Case, Figures, Opened
from onnxpress.evaluation.metrics import Divergence, log_softmax, require_finite_output
from onnxpress.evaluation.modes import Predictions

RECORDED_STEPS, RECORDED_WORDS = 8, 5
"""Tokens of a recorded run that are fed to the cache; likeliest words after each whose probabilities are kept."""


class TokenDivergence(Divergence):
    """`Divergence` of predictions, at the positions that both models have."""

    def compare(self, expected: Predictions, found: Predictions) -> None:
        if np.array_equal(expected.positions, found.positions):
            self.add(expected.logits, found.logits, found.followed)
            return
        _, ours, theirs = np.intersect1d(expected.positions, found.positions, return_indices=True)
        followed = None if found.followed is None else found.followed[theirs]
        self.add(expected.logits[ours], found.logits[theirs], followed)


class LanguageModel(Opened):
    """The common part of decoders and encoder-decoders."""

    writes_text = True
    verified_by = judged_by = parity_by = TokenDivergence

    def begin(self, prompt: Ids) -> Ids:
        return prompt

    def summary(self, modes: Mapping[str, TokenDivergence]) -> Figures:
        return Divergence.summary({name: mode for name, mode in modes.items() if mode.tokens or name == PREFILL})

    def headline(self, modes: Mapping[str, TokenDivergence], cases: Sequence[Case]) -> dict[str, Any]:
        told = {name: modes[name] for name in (PREFILL, DECODE, PADDED) if name in modes and modes[name].tokens}
        prompt = modes[PREFILL]
        return {
            "tokens": prompt.tokens,
            "perplexity": prompt.perplexity,
            "reference_perplexity": prompt.reference_perplexity,
            "kl": self.headline_kl(modes),
            "top1_agreement": min(mode.top1_agreement for mode in told.values()),
            "modes": {name: mode.figures() for name, mode in told.items()},
        }

    def headline_kl(self, modes: Mapping[str, TokenDivergence]) -> float:
        """KL of the worst mode."""
        return max(mode.kl for mode in modes.values() if mode.tokens)

    def recorded_outputs(
        self, inputs: Mapping[str, Any], arrays: Mapping[str, Array], expected: Mapping[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Array]]:
        """Log-probabilities after the prompt, then after one cached step per recorded token: of the likeliest words, or
        of the words that `expected` names."""
        model, ids = self.model, np.array(inputs["input_ids"], np.int64)
        first = ids.shape[1] - min(RECORDED_STEPS, ids.shape[1] - 1)
        last = model.prefill(ids[:, :first])[0, -1:]
        logits = np.concatenate([last, *(model.decode(ids[:, i : i + 1])[0] for i in range(first, ids.shape[1]))])
        require_finite_output(logits, "logits")
        scores = log_softmax(logits)
        if expected is None:
            chosen = np.argsort(-scores, axis=1)[:, :RECORDED_WORDS]
        else:
            chosen = np.array(expected["words"], np.int64)
        picked = np.take_along_axis(scores, chosen, axis=1)
        return {"words": chosen.tolist(), "log_probabilities": np.round(picked, 5).tolist()}, {}

    def recorded_difference(self, expected: Mapping[str, Any], found: Mapping[str, Any]) -> Figures:
        ours, theirs = (np.array(side["log_probabilities"]) for side in (found, expected))
        return {"max_difference": float(np.abs(theirs - ours).max())}

    def random_tokens(self, generator: np.random.Generator, *shape: int) -> Ids:
        """Token ids that mean nothing special."""
        return generator.integers(3, self.model.vocabulary - 1, shape)

    @property
    def decoder_start(self) -> int:
        """The token that an encoder-decoder's answers begin with."""
        return int(self.config.get("decoder_start_token_id") or 0)

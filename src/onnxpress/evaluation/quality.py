"""What an evaluation finds: figures of a candidate beside its reference."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Evaluation:
    """A candidate measured against a reference; a figure is None where it does not apply.

    The headline agreement and cosine are those of the worst mode, the perplexities those of the prompt. `kl`, in nats
    per token, is that of the prompt plus what the worst mode adds to the same tokens without a cache or padding.

    Where the candidate has a part of the reference's tokens, KL and agreement are to the reference restricted to these;
    perplexities and cosines are of the same text, which each model reads with its own tokenizer.
    """

    kind: str
    text: str
    """What was measured on: a file, `written by the reference`, `built-in sentences`, `random inputs`."""
    tokens: int
    perplexity: float | None = None
    reference_perplexity: float | None = None
    kl: float | None = None
    top1_agreement: float | None = None
    cosine_mean: float | None = None
    cosine_min: float | None = None
    spearman: float | None = None
    reference_spearman: float | None = None
    more_tokens: float | None = None
    """Of a candidate with fewer tokens: how many more it takes for the same text, as a share."""
    modes: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """The same by mode: `prefill`, `decode`, `padded`."""

    @property
    def loss(self) -> float:
        """What was lost, as a share: growth of perplexity in the worst mode, or 1 - mean cosine.

        Growth is taken on the prompt; what a mode adds to the KL counts as exp(KL), its average effect on perplexity
        (growth over 128 decoded tokens would have an error of 1.2% at a KL of 0.01).
        """
        if self.cosine_mean is not None:
            return 1 - self.cosine_mean
        if self.perplexity is None or self.reference_perplexity is None or self.kl is None:
            return 0.0
        added = max(0.0, self.kl - self.modes["prefill"]["kl"])
        return float(self.perplexity / self.reference_perplexity * np.exp(added) - 1)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, figures that do not apply left out."""
        return {key: value for key, value in asdict(self).items() if value is not None} | {"loss": self.loss}

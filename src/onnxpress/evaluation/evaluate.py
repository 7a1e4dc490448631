"""How good a model is compared with its reference: on a prompt, on cached decoding, and in a padded batch.

Checking one of the three is not enough: integer activations that look fine one token at a time can lose half of a long
prompt, and a graph that is right on one row can be wrong on a padded one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from onnxpress.arrays import Ids
from onnxpress.errors import BadInputError
from onnxpress.evaluation.graph import Graph
from onnxpress.evaluation.kind import Opened, Options, compare
from onnxpress.evaluation.opening import open_model
from onnxpress.evaluation.restriction import restricted
from onnxpress.progress import Update


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
    """How many more tokens a candidate with a smaller vocabulary takes for the same text, as a share."""
    modes: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """The same by mode: `prefill`, `decode`, `padded`."""

    @property
    def loss(self) -> float:
        """The share that was lost: growth of perplexity in the worst mode, or 1 - mean cosine.

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


def evaluate(
    candidate: str | Path | Opened,
    reference: str | Path | Opened,
    *,
    text: str | Path | Sequence[Ids] | None = None,
    pairs: str | Path | None = None,
    windows: int = 8,
    window: int = 512,
    decode_steps: int = 64,
    seed: int = 0,
    threads: int | None = None,
    progress: Update | None = None,
) -> Evaluation:
    """Measure `candidate` against `reference`; either is a path (ONNX file, artifact) or opened already.

    `text` is a file, or windows of token ids [1, length]; by default the reference writes it. `pairs` (encoders) is a
    file of sentence, sentence, score. Decoders are measured on `windows` pieces of `window` tokens, the second half of
    the first few also by cached decoding of `decode_steps` tokens.

    Raises VerificationError where an output is NaN or infinite, BadInputError where the two cannot be compared.
    """
    options = Options(text, Path(pairs) if pairs else None, windows, window, decode_steps, seed, progress)
    measured, against = _of_one_kind(
        *(open_model(what, threads=threads, all_logits=True) for what in (candidate, reference))
    )
    seen = against.seen_by(measured, restricted(against, measured.folder), options)
    cases, source = seen.evaluation_cases(measured, options)
    done = count(1)

    def tell() -> None:
        if progress is not None:
            progress(next(done), len(cases))

    modes = compare(measured, seen.answers(cases), measured.judged_by, tell)
    found = measured.headline(modes, cases) | against.more_figures(measured, seen, cases, modes, options)
    return Evaluation(kind=measured.kind, text=source, **found)


def _of_one_kind(candidate: Opened, reference: Opened) -> tuple[Opened, Opened]:
    """Both as graphs of any kind, where one is. BadInputError where they are of different kinds."""
    if candidate.kind == reference.kind:
        return candidate, reference
    both = (candidate, reference)
    if any(isinstance(one, Graph) for one in both):
        first, second = (Graph(one.name, one.model, one.config, one.folder) for one in both)
        return first, second
    raise BadInputError(f"{candidate.name} is a {candidate.kind}, {reference.name} a {reference.kind}")

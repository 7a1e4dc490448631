"""How good models that write text are: decoders and encoder-decoders, by what they say of the next token."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from onnxpress.arrays import Ids
from onnxpress.evaluation import probes
from onnxpress.evaluation.metrics import Divergence, require_finite
from onnxpress.evaluation.opening import Opened
from onnxpress.evaluation.quality import Evaluation
from onnxpress.evaluation.samples import encoder_feeds, padded_rows
from onnxpress.evaluation.texts import Progress


def evaluate_decoders(
    candidate: Opened,
    reference: Opened,
    pieces: Sequence[Ids],
    source: str,
    decode_steps: int,
    progress: Progress | None,
) -> Evaluation:
    """Decoders: pieces of text as prompts, their second halves by cached decoding, and some of them padded."""
    last_only = candidate.model.last_only or reference.model.last_only
    prefill, decode, padded = Divergence(), Divergence(), Divergence()
    uncached, unpadded = Divergence(), Divergence()
    decoded = min(len(pieces), 2)
    total = len(pieces) + decoded + 1

    def tell(done: int) -> None:
        if progress:
            progress("evaluating", done, total)

    for i, ids in enumerate(pieces):
        positions = probes.positions_of(ids.shape[1], last_only)
        expected = probes.prompt(reference.model, ids, positions)
        prefill.add(expected, probes.prompt(candidate.model, ids, positions), ids[0, positions + 1])
        tell(i + 1)
    for i, ids in enumerate(pieces[:decoded]):
        start = max(1, ids.shape[1] // 2)
        steps = min(decode_steps, ids.shape[1] - 1 - start)
        expected = probes.cached(reference.model, ids, start, steps)
        found = probes.cached(candidate.model, ids, start, steps)
        decode.add(expected, found, ids[0, start + 1 : start + 1 + steps])
        if not last_only:
            uncached.add(expected, probes.prompt(candidate.model, ids, np.arange(start, start + steps)))
        tell(len(pieces) + i + 1)
    rows = padded_rows(pieces)
    steps = 3 if min(map(len, rows)) > 3 else 0
    expected_rows = probes.alone(reference.model, rows, steps)
    if probes.takes_padding(reference.model, rows, steps, expected_rows):
        for one, other in probes.match_ends(expected_rows, probes.padded(candidate.model, rows, steps)):
            padded.add(one, other)
        for one, other in probes.match_ends(expected_rows, probes.alone(candidate.model, rows, steps)):
            unpadded.add(one, other)
    tell(total)

    modes = {"prefill": prefill, "decode": decode, "padded": padded}
    plain = {"decode": uncached if uncached.tokens else prefill, "padded": unpadded}
    excess = max((modes[name].kl - plain[name].kl for name in plain if modes[name].tokens), default=0.0)
    return Evaluation(
        kind="decoder",
        text=source,
        tokens=prefill.tokens,
        perplexity=prefill.perplexity,
        reference_perplexity=prefill.reference_perplexity,
        kl=prefill.kl + max(0.0, excess),
        top1_agreement=min(mode.top1_agreement for mode in modes.values() if mode.tokens),
        modes={name: mode.figures() for name, mode in modes.items() if mode.tokens},
    )


def evaluate_translators(
    candidate: Opened,
    reference: Opened,
    text: str | Path | Sequence[Ids] | None,
    windows: int,
    window: int,
    progress: Progress | None,
) -> Evaluation:
    """Encoder-decoders: the reference continues greedily, the candidate must find the same words as likely."""
    start = int(reference.config.get("decoder_start_token_id") or 0)
    prefill, decode, padded = Divergence(), Divergence(), Divergence()
    single, batch, source = encoder_feeds(candidate, reference, text, windows, window)
    answers = []
    for i, feeds in enumerate(single):
        reference.model.encode(feeds)
        ids = probes.continuation(reference.model, np.array([[start]]), 24)
        positions = probes.positions_of(ids.shape[1], False)
        reference.model.encode(feeds)
        candidate.model.encode(feeds)
        expected = probes.prompt(reference.model, ids, positions)
        prefill.add(expected, probes.prompt(candidate.model, ids, positions), ids[0, positions + 1])
        half = ids.shape[1] // 2
        found = probes.cached(candidate.model, ids, half, ids.shape[1] - 1 - half)
        decode.add(expected[half:], found, ids[0, half + 1 :])
        answers.append((ids, expected))
        if progress:
            progress("evaluating", i + 1, len(single))
    if batch is not None:
        candidate.model.encode(batch)
        together = candidate.model.prefill(np.concatenate([ids for ids, _ in answers]))[:, :-1]
        require_finite(together, "padded batch")
        for (_, expected), found in zip(answers, together, strict=True):
            padded.add(expected, found)
    modes = {name: m for name, m in (("prefill", prefill), ("decode", decode), ("padded", padded)) if m.tokens}
    return Evaluation(
        kind="encoder-decoder",
        text=source,
        tokens=prefill.tokens,
        perplexity=prefill.perplexity,
        reference_perplexity=prefill.reference_perplexity,
        kl=max(mode.kl for mode in modes.values()),
        top1_agreement=min(mode.top1_agreement for mode in modes.values()),
        modes={name: mode.figures() for name, mode in modes.items()},
    )

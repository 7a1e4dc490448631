"""How good a model is compared with its reference: on a prompt, on cached decoding, and in a padded batch.

Checking one of the three is not enough: integer activations that look fine one token at a time can lose half of a long
prompt, and a graph that is right on one row can be wrong on a padded one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from . import probes
from .errors import BadInputError
from .metrics import Divergence, cosine, require_finite, spearman
from .opening import Opened, open_model, random_feeds
from .runtime import EncoderSession, pool
from .samples import decoder_windows, encoder_feeds, encoder_rows, padded_rows
from .texts import Ids, Progress, load_tokenizer, pad, read_pairs
from .vocabulary.reading import compare_reading
from .vocabulary.restriction import restricted


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


def evaluate(
    candidate: Any,
    reference: Any,
    *,
    text: str | Path | Sequence[Ids] | None = None,
    pairs: str | Path | None = None,
    windows: int = 8,
    window: int = 512,
    decode_steps: int = 64,
    seed: int = 0,
    task: str | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Measure `candidate` against `reference`; either is a path (ONNX file, artifact, checkpoint) or a Checkpoint.

    `text` is a file, or windows of token ids [1, length]; by default the reference writes it. `pairs` (encoders) is a
    file of sentence, sentence, score. Decoders are measured on `windows` pieces of `window` tokens, the second half of
    the first few also by cached decoding of `decode_steps` tokens.

    Raises VerificationError where an output is NaN or infinite, BadInputError where the two cannot be compared.
    """
    measured, against = (
        open_model(what, task=task, threads=threads, all_logits=True) for what in (candidate, reference)
    )
    words = restricted(against, measured.folder)  # the reference, with the candidate's vocabulary
    if "graph" in (measured.kind, against.kind):
        return _evaluate_graphs(measured, against, seed)
    if measured.kind != against.kind:
        raise BadInputError(f"{measured.name} is a {measured.kind}, {against.name} a {against.kind}")
    if measured.kind == "decoder":
        if pairs is not None:
            raise BadInputError("pairs are for encoders", hint="give --text for a decoder")
        _same_vocabulary(measured, words)
        pieces, source = decoder_windows(measured, words, text, windows, window, seed, progress)
        found = _evaluate_decoders(measured, words, pieces, source, decode_steps, progress)
        if words is not against:
            figures: dict[str, Any] = dict(compare_reading(measured, against, pieces))
            found = replace(found, **figures)
        return found
    if measured.kind == "encoder":
        is_text = text is None or isinstance(text, str | Path)
        reads = is_text and load_tokenizer(against.folder) is not None  # each side with its own tokenizer
        return _evaluate_encoders(measured, against if reads else words, text, pairs, window, seed, progress)
    return _evaluate_translators(measured, words, text, min(windows, 4), min(window, 64), progress)


def _same_vocabulary(a: Opened, b: Opened) -> None:
    sizes = [int(getattr(opened.model, "vocabulary", 0)) for opened in (a, b)]
    if all(sizes) and sizes[0] != sizes[1]:
        raise BadInputError(f"different vocabularies: {a.name} has {sizes[0]} tokens, {b.name} has {sizes[1]}")


def _evaluate_decoders(
    candidate: Opened,
    reference: Opened,
    pieces: Sequence[Ids],
    source: str,
    decode_steps: int,
    progress: Progress | None,
) -> Evaluation:
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


def _evaluate_encoders(
    candidate: Opened,
    reference: Opened,
    text: str | Path | Sequence[Ids] | None,
    pairs: str | Path | None,
    window: int,
    seed: int,
    progress: Progress | None,
) -> Evaluation:
    if text is None or isinstance(text, str | Path):
        rows, source = encoder_rows((reference, candidate), text, window, seed)
    else:
        rows, source = [ids[0].tolist() for ids in text], "token ids"
    own = rows
    if restricted(reference, candidate.folder) is not reference:
        assert text is None or isinstance(text, str | Path)
        own, _ = encoder_rows((candidate,), text, window, seed)
    expected, single, batched = [], [], []
    name = ""
    for i in range(0, len(rows), 4):
        ids, mask = pad(own[i : i + 4])
        together = candidate.model.encode(ids, mask)
        for j, (row, ours_row) in enumerate(zip(rows[i : i + 4], own[i : i + 4], strict=True)):
            theirs = reference.model.encode(np.array([row], np.int64))
            ours = candidate.model.encode(np.array([ours_row], np.int64))
            name = name or probes.common_output(theirs, ours)
            require_finite(ours[name], f"{name} of one row")
            expected.append(pool({name: theirs[name]})[0])
            single.append(pool({name: ours[name]})[0])
            real = mask[j : j + 1]
            batched.append(pool({name: together[name][j : j + 1]}, real)[0])
            require_finite(batched[-1], f"{name} in a padded batch")
        if progress:
            progress("evaluating", min(i + 4, len(rows)), len(rows))
    modes = {}
    for mode, found in (("prefill", single), ("padded", batched)):
        cosines = cosine(np.stack(expected), np.stack(found))
        modes[mode] = {"cosine_mean": float(cosines.mean()), "cosine_min": float(cosines.min())}
    theirs_rank = ours_rank = None
    if pairs is not None:
        ours_rank, theirs_rank = _rank_pairs(candidate, reference, Path(pairs), name, window, progress)
    return Evaluation(
        kind="encoder",
        text=source,
        tokens=sum(map(len, rows)),
        cosine_mean=min(mode["cosine_mean"] for mode in modes.values()),
        cosine_min=min(mode["cosine_min"] for mode in modes.values()),
        more_tokens=sum(map(len, own)) / sum(map(len, rows)) - 1 if own is not rows else None,
        spearman=ours_rank,
        reference_spearman=theirs_rank,
        modes=modes,
    )


def _rank_pairs(
    candidate: Opened, reference: Opened, path: Path, name: str, window: int, progress: Progress | None
) -> tuple[float, float]:
    """Rank correlation of the cosine of each pair with its score: (candidate's, reference's)."""
    tokenizer = load_tokenizer(reference.folder) or load_tokenizer(candidate.folder)
    if tokenizer is None:
        raise BadInputError("neither model has a tokenizer.json to read pairs with")
    trimmed = restricted(reference, candidate.folder) is not reference
    readers = (load_tokenizer(candidate.folder) if trimmed else tokenizer, tokenizer)
    rows = read_pairs(path)
    found = []
    for number, (opened, reader) in enumerate(zip((candidate, reference), readers, strict=True)):
        tokens = [[reader.encode(sentence).ids[:window] for sentence in (row.first, row.second)] for row in rows]
        # Rows of like length together: less padding to compute, the same cosines.
        order = sorted(range(len(rows)), key=lambda i: max(map(len, tokens[i])))
        scores = np.zeros(len(rows))
        for i in range(0, len(rows), 16):
            group = order[i : i + 16]
            ids, mask = pad([sentence for row in group for sentence in tokens[row]])
            vectors = pool({name: opened.model.encode(ids, mask)[name]}, mask)
            scores[group] = cosine(vectors[0::2], vectors[1::2])
            if progress:
                progress("ranking pairs", number * len(rows) + min(i + 16, len(rows)), 2 * len(rows))
        require_finite(scores, "cosines of pairs")
        found.append(spearman(scores, np.array([row.score for row in rows])))
    return found[0], found[1]


def _evaluate_translators(
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


def _evaluate_graphs(candidate: Opened, reference: Opened, seed: int) -> Evaluation:
    """Any two graphs: the same random inputs, cosine of each output's last axis."""
    session = next((o.model for o in (candidate, reference) if isinstance(o.model, EncoderSession)), None)
    if session is None:
        raise BadInputError(f"{candidate.name} cannot be measured: its inputs are unknown")
    cosines = []
    for i in range(4):
        feeds = random_feeds(session, candidate.config or reference.config, seed + i)
        ours, theirs = candidate.model.run(feeds), reference.model.run(feeds)
        names = [name for name in ours if name in theirs] or [probes.common_output(theirs, ours)]
        for name in names:
            require_finite(ours[name], name)
            if ours[name].shape != theirs[name].shape:
                raise BadInputError(f"{name}: shapes {theirs[name].shape} and {ours[name].shape}")
            cosines.append(np.atleast_1d(cosine(theirs[name], ours[name])).ravel())
    values = np.concatenate(cosines)
    figures = {"cosine_mean": float(values.mean()), "cosine_min": float(values.min())}
    return Evaluation(kind="graph", text="random inputs", tokens=0, modes={"prefill": figures}, **figures)

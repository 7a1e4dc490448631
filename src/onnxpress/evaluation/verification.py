"""The quick check after every pass: does the graph still compute what the reference does?

A `Reference` holds inputs and the outputs expected for them, computed once per build and bounded in size; `verify_step`
runs a graph on them. Decoders are driven in three ways: a prompt, cached steps, a left-padded batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxpress.arrays import Floats, Ids
from onnxpress.errors import BadInputError, DestroyedError, VerificationError
from onnxpress.evaluation import probes
from onnxpress.evaluation.metrics import Divergence, cosine, require_finite
from onnxpress.evaluation.opening import Opened, open_model, random_feeds
from onnxpress.evaluation.samples import encoder_feeds, encoder_rows, padded_rows
from onnxpress.evaluation.texts import pad, written_windows
from onnxpress.runtime.sessions import EncoderSession

EXACT_TOLERANCE = 1e-3
"""Largest difference of log-probabilities that an exact pass may cause.

For other outputs it is relative to the standard deviation of the output."""
LARGEST_KL = 4.0
"""Nats per token above which a lossy pass has destroyed the model: post-training 4 bits cost well below 1."""
SMALLEST_COSINE = 0.5
LENGTH, STEPS = 40, 8
MAXIMUM_BYTES = 256 * 2**20


@dataclass
class Reference:
    """Inputs, and what the reference computes for them."""

    kind: str
    name: str
    windows: list[Ids] = field(default_factory=list)
    """Decoders: token ids [1, length]."""
    prompts: list[Floats] = field(default_factory=list)
    """Logits [positions, vocabulary] after all tokens of each window but the last (or a sample of them)."""
    rows: list[Ids] = field(default_factory=list)
    """Rows [length_i] of the padded batch, none where the reference takes no left padding; for encoders, all rows."""
    alone: list[Floats] = field(default_factory=list)
    """What each row gives by itself: logits of a decoder, outputs [length_i, width] of an encoder."""
    feeds: list[dict[str, NDArray[Any]]] = field(default_factory=list)
    """Inputs of other graphs, or of the encoder of an encoder-decoder; with `expected`, one for one."""
    expected: list[dict[str, NDArray[Any]]] = field(default_factory=list)
    output: str = ""
    """Name of the output that encoders are compared by, once known."""

    @property
    def nbytes(self) -> int:
        arrays = [*self.prompts, *self.alone, *(a for outputs in self.expected for a in outputs.values())]
        return sum(array.nbytes for array in arrays)

    @classmethod
    def of(
        cls,
        reference: Any,
        *,
        windows: Sequence[Ids] | None = None,
        task: str | None = None,
        seed: int = 0,
        like: Opened | None = None,
        length: int = LENGTH,
    ) -> Reference:
        """Run `reference` (a path, a Checkpoint or an Opened); `windows` of token ids replace what it would write.

        like: a graph of the same model, to write a decoder's windows (torch would take many times as long), and whose
        inputs tell the shapes of pixels or samples that torch does not.
        length: tokens in each of a decoder's two windows, fewer where their logits would not fit into `MAXIMUM_BYTES`.
        """
        opened = open_model(reference, task=task)
        if opened.kind == "decoder":
            return cls._of_decoder(opened, windows, like or opened, seed, length)
        if opened.kind == "encoder":
            return cls._of_encoder(opened, windows, seed)
        if opened.kind == "encoder-decoder":
            return cls._of_translator(opened, like or opened)
        session = next((one.model for one in (opened, like) if one and isinstance(one.model, EncoderSession)), None)
        if session is None:
            raise BadInputError(f"the inputs of {opened.name} are unknown", hint="verify against its fp32 graph")
        feeds = [random_feeds(session, opened.config, seed + i) for i in range(2)]
        return cls("graph", opened.name, feeds=feeds, expected=[opened.model.run(feed) for feed in feeds])

    @classmethod
    def of_feeds(cls, reference: Any, feeds: Sequence[dict[str, NDArray[Any]]]) -> Reference:
        """For graphs whose inputs the caller knows: pixels, samples, anything with `run(feeds)`."""
        opened = open_model(reference)
        return cls("graph", opened.name, feeds=list(feeds), expected=[opened.model.run(feed) for feed in feeds])

    @classmethod
    def _of_decoder(
        cls, opened: Opened, windows: Sequence[Ids] | None, writer: Opened, seed: int, length: int
    ) -> Reference:
        length = _window_length(opened, length)
        windows = [ids[:, :length] for ids in (windows_by(writer, seed, length) if windows is None else windows)[:2]]
        result = cls("decoder", opened.name, windows=list(windows), rows=padded_rows(windows, min(length, LENGTH) // 2))
        for ids in windows:
            positions = probes.positions_of(ids.shape[1], opened.model.last_only)
            result.prompts.append(probes.prompt(opened.model, ids, positions))
        result.alone = probes.alone(opened.model, result.rows, 2)
        if not probes.takes_padding(opened.model, result.rows, 2, result.alone):
            result.rows, result.alone = [], []
        return result

    @classmethod
    def _of_encoder(cls, opened: Opened, windows: Sequence[Ids] | None, seed: int) -> Reference:
        if windows is not None:
            rows = [ids[0] for ids in windows]
        else:
            rows = [np.array(row, np.int64) for row in encoder_rows([opened], None, 128, seed)[0][:8]]
        result = cls("encoder", opened.name, rows=rows)
        for row in rows:
            result.expected.append(dict(opened.model.encode(row[None])))
        return result

    @classmethod
    def _of_translator(cls, opened: Opened, like: Opened) -> Reference:
        single, batch, _ = encoder_feeds(like, opened, None, 3, 32)
        result = cls("encoder-decoder", opened.name, feeds=[*single, *([batch] if batch else [])])
        start = np.array([[int(opened.config.get("decoder_start_token_id") or 0)]])
        for feeds in single:
            opened.model.encode(feeds)
            ids = probes.continuation(opened.model, start, 12)
            opened.model.encode(feeds)
            result.windows.append(ids)
            result.prompts.append(probes.prompt(opened.model, ids, probes.positions_of(ids.shape[1], False)))
        return result


def windows_by(writer: Opened, seed: int = 0, length: int = LENGTH) -> list[Ids]:
    """The two windows that a `Reference` takes of a decoder, written by `writer`."""
    return written_windows(writer.model, 2, _window_length(writer, length), writer.starts, seed)


def _window_length(opened: Opened, length: int) -> int:
    """Every token of the windows costs one row of logits, and half as many rows are run alone."""
    limit = opened.config.get("max_position_embeddings") or opened.config.get("n_positions") or length
    return int(min(length, limit, MAXIMUM_BYTES // (4 * 4 * max(1, opened.model.vocabulary))))


def verify_step(
    reference: Reference,
    after: Any,
    exact: bool,
    *,
    tolerance: float = EXACT_TOLERANCE,
    largest_kl: float = LARGEST_KL,
    what: str = "the graph",
) -> dict[str, float]:
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
        run = {"decoder": _decoder, "encoder": _encoder, "encoder-decoder": _translator}.get(reference.kind, _graph)
        metrics = run(reference, opened)
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


def _decoder(reference: Reference, opened: Opened) -> dict[str, float]:
    prefill, decode, padded = Divergence(), Divergence(), Divergence()
    model = opened.model
    for ids, expected in zip(reference.windows, reference.prompts, strict=True):
        positions = probes.positions_of(ids.shape[1], model.last_only or len(expected) < ids.shape[1] - 1)
        all_positions = probes.positions_of(ids.shape[1], len(expected) < ids.shape[1] - 1)
        same = expected[np.isin(all_positions, positions)]
        prefill.add(same, probes.prompt(model, ids, positions), ids[0, positions + 1])
        steps = min(STEPS, ids.shape[1] - 2)
        start = ids.shape[1] - 1 - steps
        found = probes.cached(model, ids, start, steps)
        known = all_positions >= start
        decode.add(expected[known], found[all_positions[known] - start])
    if reference.rows:
        for expected, found in probes.match_ends(reference.alone, probes.padded(model, reference.rows, 2)):
            padded.add(expected, found)
    return _summary({"prefill": prefill, "decode": decode, "padded": padded})


def _translator(reference: Reference, opened: Opened) -> dict[str, float]:
    prefill, decode, padded = Divergence(), Divergence(), Divergence()
    model = opened.model
    for feeds, ids, expected in zip(reference.feeds, reference.windows, reference.prompts, strict=False):
        model.encode(feeds)
        prefill.add(expected, probes.prompt(model, ids, probes.positions_of(ids.shape[1], False)), ids[0, 1:])
        half = ids.shape[1] // 2
        decode.add(expected[half:], probes.cached(model, ids, half, ids.shape[1] - 1 - half))
    if len(reference.feeds) > len(reference.windows):
        model.encode(reference.feeds[-1])
        together = model.prefill(np.concatenate(reference.windows))[:, :-1]
        require_finite(together, "padded batch")
        for expected, found in zip(reference.prompts, together, strict=True):
            padded.add(expected, found)
    return _summary({"prefill": prefill, "decode": decode, "padded": padded})


def _summary(modes: dict[str, Divergence]) -> dict[str, float]:
    ran = {name: mode for name, mode in modes.items() if mode.tokens}
    return {
        "max_difference": max(mode.max_difference for mode in ran.values()),
        "kl": max(mode.kl for mode in ran.values()),
        "top1_agreement": min(mode.top1_agreement for mode in ran.values()),
        **{f"{name}_kl": mode.kl for name, mode in ran.items()},
        **{key: value for key, value in modes["prefill"].figures().items() if key.endswith("perplexity")},
    }


def _encoder(reference: Reference, opened: Opened) -> dict[str, float]:
    pairs: list[tuple[NDArray[Any], NDArray[Any]]] = []
    for i in range(0, len(reference.rows), 4):
        rows, expected = reference.rows[i : i + 4], reference.expected[i : i + 4]
        ids, mask = pad([row.tolist() for row in rows])
        together = opened.model.encode(ids, mask)
        name = probes.common_output(expected[0], together)
        for row, theirs, ours in zip(rows, expected, probes.hidden_rows(together[name], mask), strict=True):
            single = opened.model.encode(row[None])
            require_finite(single[name], f"{name} of one row")
            require_finite(ours, f"{name} in a padded batch")
            pairs += [(theirs[name][0], single[name][0]), (np.atleast_2d(theirs[name][0]), ours)]
    return _differences(pairs)


def _graph(reference: Reference, opened: Opened) -> dict[str, float]:
    pairs = []
    for feeds, expected in zip(reference.feeds, reference.expected, strict=True):
        found = opened.model.run(feeds)
        names = [name for name in expected if name in found] or [probes.common_output(expected, found)]
        for name in names:
            require_finite(found[name], name)
            pairs.append((expected[name], found[name]))
    return _differences(pairs)


def _differences(pairs: Sequence[tuple[NDArray[Any], NDArray[Any]]]) -> dict[str, float]:
    worst, cosines = 0.0, []
    for expected, found in pairs:
        if expected.shape != found.shape:
            shapes = f"{list(found.shape)}; the reference has {list(expected.shape)}"
            raise VerificationError(f"an output has shape {shapes}")
        expected, found = np.atleast_1d(expected).astype(np.float64), np.atleast_1d(found).astype(np.float64)
        scale = float(expected.std()) or 1.0
        worst = max(worst, float(np.abs(expected - found).max(initial=0)) / scale)
        cosines.append(cosine(expected, found).ravel())
    values = np.concatenate(cosines)
    return {"max_difference": worst, "cosine_mean": float(values.mean()), "cosine_min": float(values.min())}

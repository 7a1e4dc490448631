"""Encoders: token ids in, vectors out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from onnxpress.arrays import Array, Feeds, Floats, Ids
from onnxpress.errors import BadInputError
from onnxpress.evaluation.inputs import encoder_rows
from onnxpress.evaluation.kind import PADDED, PREFILL, Case, GraphFile, Opened, Options
from onnxpress.evaluation.metrics import Deviation, Similarity, cosine, require_finite_output, spearman
from onnxpress.evaluation.restriction import restricted
from onnxpress.evaluation.texts import load_tokenizer, pad_rows, read_pairs
from onnxpress.evaluation.vector_model import VectorModel, common_output
from onnxpress.runtime.sessions import EncoderSession, pool
from onnxpress.runtime.timing import median_ms, seconds

BATCH = 4
"""Rows that are padded to the longest of them."""
PAIRS = 16
"""Pairs of sentences in one run."""
RECORDED_TOKENS = 12
BENCHMARK_TOKENS = 128


@dataclass(frozen=True)
class EncodedRow:
    """The outputs of an encoder for one row of tokens."""

    outputs: Mapping[str, Array]
    """By name, [1, ...] each."""
    mask: Ids | None = None
    """[1, length], where the row was in a padded batch."""

    def states(self, name: str) -> Array:
        """An output at the row's real positions, [length, width], or [width] for the whole row."""
        value: Array = self.outputs[name][0]
        return value if self.mask is None or value.ndim == 1 else np.asarray(value[self.mask[0].astype(bool)])

    def vector(self, name: str) -> Floats:
        """An output pooled, [width]."""
        return np.asarray(pool({name: self.outputs[name]}, self.mask)[0])

    @property
    def where(self) -> str:
        return "of one row" if self.mask is None else "in a padded batch"


class StateDeviation(Deviation):
    """`Deviation` of all states of a row."""

    def compare(self, expected: EncodedRow, found: EncodedRow) -> None:
        name = common_output(expected.outputs, found.outputs)
        states = found.states(name)
        require_finite_output(states, f"{name} {found.where}")
        self.add(expected.states(name), states)


class VectorSimilarity(Similarity):
    """`Similarity` of the pooled vectors of rows."""

    name = ""
    """The name of the output that is compared."""

    def compare(self, expected: EncodedRow, found: EncodedRow) -> None:
        self.name = self.name or common_output(expected.outputs, found.outputs)
        vector = found.vector(self.name)
        checked = found.outputs[self.name] if found.mask is None else vector
        require_finite_output(checked, f"{self.name} {found.where}")
        self.add(expected.vector(self.name), vector, self.name)


class Encoder(VectorModel):
    """An encoder of text, run by an `EncoderSession` or anything with its `encode`.

    Modes: `prefill` (each row by itself), `padded` (rows of different lengths as a batch, padded on the right).
    """

    kind = "encoder"
    embeds_text = True
    verified_by, judged_by = StateDeviation, VectorSimilarity

    @classmethod
    def open(cls, file: GraphFile) -> Self | None:
        inputs = [node.name for node in file.session().get_inputs()]
        if "input_ids" not in inputs or "pixel_values" in inputs:
            return None
        return cls(file.path.name, EncoderSession(file.session()), file.config, file.folder)

    def verification_cases(
        self, like: Opened, windows: Sequence[Ids] | None, seed: int, length: int | None
    ) -> list[Case]:
        """Eight of the built-in sentences, one by one and in padded batches."""
        if windows is not None:
            rows = [ids[0].tolist() for ids in windows]
        else:
            rows = encoder_rows([self], None, 128, seed)[0][:8]
        return [Case(rows[i : i + BATCH], (PREFILL, PADDED)) for i in range(0, len(rows), BATCH)]

    def evaluation_cases(self, candidate: Encoder, options: Options) -> tuple[list[Case], str]:
        """Lines of a text or the built-in sentences, one by one and in padded batches."""
        text = options.text
        if text is None or isinstance(text, str | Path):
            rows, source = encoder_rows((self, candidate), text, options.window, options.seed)
        else:
            rows, source = [ids[0].tolist() for ids in text], "token ids"
        own: list[Any] = [None] * len(rows)
        if _reads_differently(self, candidate):
            assert text is None or isinstance(text, str | Path)
            own, _ = encoder_rows((candidate,), text, options.window, options.seed)
        cases = []
        for i in range(0, len(rows), BATCH):
            theirs = own[i : i + BATCH]
            cases.append(Case(rows[i : i + BATCH], (PREFILL, PADDED), own=theirs if theirs[0] is not None else None))
        return cases, source

    def run(self, mode: str, inputs: Sequence[Sequence[int]] | Feeds) -> list[Any]:
        if isinstance(inputs, Mapping):
            return [self.outputs_of(inputs)]
        if mode == PREFILL:
            return [EncodedRow(self.model.encode(np.array([row], np.int64))) for row in inputs]
        ids, mask = pad_rows(inputs)
        together = self.model.encode(ids, mask)
        places = [slice(i, i + 1) for i in range(len(inputs))]
        return [EncodedRow({name: array[place] for name, array in together.items()}, mask[place]) for place in places]

    def seen_by(self, candidate: Opened, restricted: Self, options: Options) -> Self:
        """Where both can read the text, each reads it with its own tokenizer, and all tokens count."""
        reads = options.reads_text and load_tokenizer(self.folder) is not None
        return self if reads else restricted

    def headline(self, modes: Mapping[str, Any], cases: Sequence[Case]) -> dict[str, Any]:
        return {"tokens": _tokens(one.inputs for one in cases), **super().headline(modes, cases)}

    def more_figures(
        self, candidate: Opened, reference: Opened, cases: Sequence[Case], modes: Any, options: Options
    ) -> dict[str, Any]:
        """Rank correlation with scores that people gave to pairs; how many more tokens the candidate reads."""
        figures: dict[str, Any] = {}
        if cases[0].own is not None:
            own, theirs = (_tokens(rows) for rows in ((one.own for one in cases), (one.inputs for one in cases)))
            figures["more_tokens"] = own / theirs - 1
        if options.pairs is not None:
            ranks = _rank_pairs(candidate, reference, modes[PREFILL].name, options)
            figures |= dict(zip(("spearman", "reference_spearman"), ranks, strict=True))
        return figures

    def recorded_inputs(self, seed: int) -> tuple[dict[str, Any], dict[str, Array]]:
        """Random tokens."""
        size = int(getattr(self.model, "vocabulary", 0) or self.config.get("vocab_size") or 16)
        return {"input_ids": np.random.default_rng(seed).integers(0, size, (1, RECORDED_TOKENS)).tolist()}, {}

    def recorded_outputs(
        self, inputs: Mapping[str, Any], arrays: Mapping[str, Array], expected: Mapping[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Array]]:
        """The pooled vector."""
        vector = pool(self.model.encode(np.array(inputs["input_ids"], np.int64)))[0]
        require_finite_output(vector, "embedding")
        return {"embedding": [round(float(x), 6) for x in vector]}, {}

    def speed(self, prompt: int, context: Sequence[int], repeats: int) -> tuple[Callable[[], object], dict[str, Any]]:
        """Latency of one run of 128 tokens."""
        size = int(self.config.get("vocab_size", 16))
        ids = np.random.default_rng(0).integers(0, size, (1, BENCHMARK_TOKENS))

        def run() -> object:
            return self.model.encode(ids)

        run()
        return run, {"latency_ms": median_ms([seconds(run) for _ in range(repeats * 10)])}


def _tokens(batches: Iterable[Sequence[Sequence[int]]]) -> int:
    return sum(len(row) for rows in batches for row in rows)


def _reads_differently(reference: Opened, candidate: Opened) -> bool:
    """Whether the candidate has a part of the reference's tokens."""
    return restricted(reference, candidate.folder) is not reference


def _rank_pairs(candidate: Opened, reference: Opened, name: str, options: Options) -> tuple[float, float]:
    """Rank correlation of the cosine of each pair with its score: (candidate's, reference's)."""
    tokenizer = load_tokenizer(reference.folder) or load_tokenizer(candidate.folder)
    if tokenizer is None:
        raise BadInputError("neither model has a tokenizer.json to read pairs with")
    own = load_tokenizer(candidate.folder) if _reads_differently(reference, candidate) else tokenizer
    assert options.pairs is not None
    rows = read_pairs(options.pairs)
    found = []
    for number, (opened, reader) in enumerate(((candidate, own), (reference, tokenizer))):
        assert reader is not None
        tokens = [[reader.encode(one).ids[: options.window] for one in (row.first, row.second)] for row in rows]
        # Rows of like length together: less padding to compute, the same cosines.
        order = sorted(range(len(rows)), key=lambda i: max(map(len, tokens[i])))
        scores = np.zeros(len(rows))
        for i in range(0, len(rows), PAIRS):
            group = order[i : i + PAIRS]
            ids, mask = pad_rows([sentence for row in group for sentence in tokens[row]])
            vectors = pool({name: opened.model.encode(ids, mask)[name]}, mask)
            scores[group] = cosine(vectors[0::2], vectors[1::2])
            if options.progress is not None:
                options.progress(number * len(rows) + min(i + PAIRS, len(rows)), 2 * len(rows))
        require_finite_output(scores, "cosines of pairs")
        found.append(spearman(scores, np.array([row.score for row in rows])))
    return found[0], found[1]

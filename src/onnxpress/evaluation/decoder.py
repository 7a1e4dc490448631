"""Decoders: text in, the next token out, with a cache between."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np

from onnxpress.arrays import Array, Ids
from onnxpress.errors import BadInputError
from onnxpress.evaluation import modes
from onnxpress.evaluation.cached_decoder import CachedDecoder
from onnxpress.evaluation.inputs import decoder_windows, padded_rows
from onnxpress.evaluation.kind import DECODE, PADDED, PREFILL, Answered, Case, GraphFile, Opened, Options
from onnxpress.evaluation.language_model import RECORDED_STEPS, LanguageModel, TokenDivergence
from onnxpress.evaluation.modes import Chunk, Predictions, Rows
from onnxpress.evaluation.reading import compare_reading
from onnxpress.evaluation.texts import written_windows
from onnxpress.runtime.decoder import DecoderSession
from onnxpress.runtime.timing import median_ms, seconds

ALONE, UNCACHED, UNPADDED, CHUNK = "alone", "uncached", "unpadded", "chunk"
PADDING_KL = 0.1
"""Nats per token that padding may cost a graph, quantized ones included; where it is not supported it costs several."""
LENGTH, STEPS = 40, 8
"""Tokens in each window of a verification, and how many of the last ones are fed to the cache."""
MAXIMUM_BYTES = 256 * 2**20
"""The most that the logits of a verification may take."""
RECORDED_PROMPT = 12
PARITY_PROMPT, PARITY_STEPS, PARITY_PADDING = 12, 3, 5
BENCHMARK_STEPS = 32


@dataclass(frozen=True)
class Text:
    """A window of text, read as a prompt or with a part of it by cached steps."""

    ids: Ids
    """[1, length]"""
    positions: Ids
    """After which the logits of a prompt are compared."""
    start: int = 0
    """The first token that is fed to the cache alone."""
    steps: int = 0
    """How many are."""


class Decoder(LanguageModel):
    """A decoder, run by a `DecoderSession` or anything with its `prefill`, `decode`, `last_only` and `vocabulary`.

    Modes: `prefill` (a prompt; `uncached` is the same beside cached steps), `decode` (cached steps), `padded` (a batch;
    `alone` and `unpadded` are its rows one by one), `chunk` (several tokens after a past).
    """

    kind = "decoder"

    @classmethod
    def open(cls, file: GraphFile) -> Self | None:
        session = file.session()
        inputs, outputs = ([node.name for node in nodes] for nodes in (session.get_inputs(), session.get_outputs()))
        named = str(file.config.get("architectures")).endswith(("CausalLM']", "LMHeadModel']"))
        decodes = any(name.startswith("past_key_values.") for name in inputs) or (outputs[:1] == ["logits"] and named)
        if "input_ids" not in inputs or "logits" not in outputs or not decodes:
            return None
        size = (file.genai.get("decoder") or {}).get("head_size")
        model = DecoderSession(session, head_dim=size if isinstance(size, int) else None)
        return cls(file.path.name, model, file.config or file.genai, file.folder)

    def verification_cases(
        self, like: Opened, windows: Sequence[Ids] | None, seed: int, length: int | None
    ) -> list[Case]:
        """Two windows, as prompts and with cached steps at their ends, and four rows as a padded batch."""
        size = window_length(self, length or LENGTH)
        windows = windows_by(like, seed, size) if windows is None else windows
        windows = [ids[:, :size] for ids in windows[:2]]
        cases = []
        for ids in windows:
            steps = min(STEPS, ids.shape[1] - 2)
            positions = modes.positions_of(ids.shape[1], self.model.last_only)
            cases.append(Case(Text(ids, positions, ids.shape[1] - 1 - steps, steps), (PREFILL, DECODE)))
        rows = padded_rows(windows, min(size, LENGTH) // 2)
        return [*cases, Case(Rows(rows, 2), (PADDED,), ALONE)]

    def parity_cases(self, like: Opened, seed: int) -> list[Case]:
        """A text with cached steps at its end; a batch of rows padded on the left, on the right, and not at all."""
        generator = np.random.default_rng(seed)
        ids = self.random_tokens(generator, 1, PARITY_PROMPT + PARITY_STEPS + 1)
        positions = modes.positions_of(ids.shape[1], self.model.last_only)
        text = Text(ids, positions, PARITY_PROMPT, PARITY_STEPS)
        first, second, third = self.random_tokens(generator, 3, PARITY_PROMPT + PARITY_STEPS)
        rows = Rows([first[PARITY_PADDING:], second[PARITY_PADDING:], third], PARITY_STEPS, left=(True, False, True))
        return [Case(text, (PREFILL, DECODE)), Case(rows, (PADDED,), ALONE)]

    def evaluation_cases(self, candidate: Decoder, options: Options) -> tuple[list[Case], str]:
        """Windows of text as prompts, the second halves of two of them by cached steps, and four rows as a batch."""
        if options.pairs is not None:
            raise BadInputError("pairs are for encoders", hint="give --text for a decoder")
        _check_vocabularies(candidate, self)
        pieces, source = _windows(candidate, self, options)
        last_only = candidate.model.last_only or self.model.last_only
        cases = [Case(Text(ids, modes.positions_of(ids.shape[1], last_only)), (PREFILL,)) for ids in pieces]
        for ids in pieces[:2]:
            start = max(1, ids.shape[1] // 2)
            steps = min(options.decode_steps, ids.shape[1] - 1 - start)
            text = Text(ids, np.arange(start, start + steps), start, steps)
            cases.append(Case(text, (DECODE,) if last_only else (DECODE, UNCACHED), DECODE))
        rows = padded_rows(pieces)
        steps = 3 if min(map(len, rows)) > 3 else 0
        return [*cases, Case(Rows(rows, steps), (PADDED, UNPADDED), ALONE)], source

    def verified_windows(self) -> list[Ids]:
        return windows_by(self)

    def judged_windows(self, options: Options) -> tuple[list[Ids], str] | None:
        return _windows(self, self, options)

    def run(self, mode: str, inputs: Text | Rows | Chunk) -> list[Predictions]:
        if isinstance(inputs, Chunk):
            return modes.chunk(self.model, inputs)
        if isinstance(inputs, Rows):
            return (modes.padded if mode == PADDED else modes.alone)(self.model, inputs)
        if mode == DECODE:
            return [modes.cached(self.model, inputs.ids, inputs.start, inputs.steps)]
        positions = inputs.positions
        if self.model.last_only:
            positions = np.intersect1d(positions, modes.positions_of(inputs.ids.shape[1], True))
        return [modes.prompt(self.model, inputs.ids, positions)]

    def answers(self, cases: Iterable[Case]) -> Iterator[Answered]:
        """See `Opened.answers`. A padded batch is left out where it does not give about what each row gives by itself:
        graphs of onnxruntime-genai's model builder are made for batches padded on the right."""
        for case, expected in super().answers(cases):
            if PADDED in case.modes:
                divergence = TokenDivergence()
                for one, other in zip(expected, self.run(PADDED, case.inputs), strict=True):
                    divergence.compare(one, other)
                if not divergence.kl <= PADDING_KL:
                    continue
            yield case, expected

    def chunk_case(self) -> Case:
        """Two random prompts, the second with padding on its left, and a token after each, at their last positions.

        Prompts of other lengths would not do where activations share one range per prompt: each length has its own.
        """
        ids = np.random.default_rng(0).integers(0, self.model.vocabulary, (2, 24))
        mask = np.ones_like(ids)
        mask[1, :7] = 0
        return Case(Chunk(ids, mask, ids[:, :1], last_only=True), (CHUNK,), CHUNK)

    def headline_kl(self, modes: Mapping[str, TokenDivergence]) -> float:
        """KL of the prompt plus what the worst mode adds to the same tokens without a cache or padding."""
        prompt = modes[PREFILL]
        plain = {DECODE: modes.get(UNCACHED, prompt), PADDED: modes.get(UNPADDED, prompt)}
        ran = [name for name in plain if name in modes and modes[name].tokens]
        excess = max((modes[name].kl - plain[name].kl for name in ran), default=0.0)
        return prompt.kl + max(0.0, excess)

    def more_figures(
        self, candidate: Opened, reference: Opened, cases: Sequence[Case], modes: Any, options: Options
    ) -> dict[str, Any]:
        """Perplexities of a text that each of the two reads with its own tokenizer, where these differ."""
        if reference is self:
            return {}
        return dict(compare_reading(candidate, self, [case.inputs.ids for case in cases if case.modes == (PREFILL,)]))

    def remembered(self, reopen: Callable[[], Any], folder: Path) -> Decoder:
        model = CachedDecoder(reopen, folder, self.model.vocabulary, self.model.last_only, self.model)
        return replace(self, model=model)

    def recorded_inputs(self, seed: int) -> tuple[dict[str, Any], dict[str, Array]]:
        """Four tokens, the first as the model's texts begin, and what the model itself finds likeliest after them."""
        size = int(getattr(self.model, "vocabulary", 0) or self.config.get("vocab_size") or 16)
        ids = np.random.default_rng(seed).integers(0, size, (1, RECORDED_PROMPT))
        ids[0, 0] = self.starts[0]
        length = RECORDED_PROMPT + RECORDED_STEPS - 4
        return {"input_ids": modes.continuation(self.model, ids[:, :4], length).tolist()}, {}

    def speed(self, prompt: int, context: Sequence[int], repeats: int) -> tuple[Callable[[], object], dict[str, Any]]:
        """Tokens per second of a prompt, and of cached steps by the number of tokens in the cache."""
        # No further than the model's positions go: one with few is measured on a shorter prompt.
        limit = int(self.config.get("max_position_embeddings") or self.config.get("n_positions") or 1 << 30)
        room = max(1, limit - BENCHMARK_STEPS)
        prompt, context = min(prompt, room), sorted({min(tokens, room) for tokens in context})
        model, generator = self.model, np.random.default_rng(0)
        ids = generator.integers(0, model.vocabulary, (1, max(prompt, *context, 1)))
        model.prefill(ids[:, :prompt])
        prefill = [seconds(lambda: model.prefill(ids[:, :prompt])) for _ in range(repeats)]
        decode: dict[str, float] = {}
        for tokens in context:
            model.prefill(ids[:, :tokens])
            times = []
            for step in range(BENCHMARK_STEPS):
                token = generator.integers(0, model.vocabulary, (1, 1))
                elapsed = seconds(lambda token=token: model.decode(token))  # type: ignore[misc]
                times += [elapsed] * (step >= 2)  # the first steps still warm the caches up
            decode[str(tokens)] = median_ms(times)

        def run() -> None:
            model.prefill(ids[:, :prompt])
            for _ in range(BENCHMARK_STEPS):
                model.decode(ids[:, :1])

        return run, {"prefill_tokens_per_s": prompt / min(prefill), "prompt": prompt, "decode_ms_per_token": decode}


def windows_by(writer: Opened, seed: int = 0, length: int = LENGTH) -> list[Ids]:
    """Let `writer` write the two windows that a decoder is verified on."""
    return written_windows(writer.model, 2, window_length(writer, length), writer.starts, seed)


def window_length(opened: Opened, length: int) -> int:
    """Shorten a window until the logits of a verification fit into `MAXIMUM_BYTES`: every token of the windows costs
    one row of them, and half as many rows are run alone."""
    limit = opened.config.get("max_position_embeddings") or opened.config.get("n_positions") or length
    return int(min(length, limit, MAXIMUM_BYTES // (4 * 4 * max(1, opened.model.vocabulary))))


def _windows(candidate: Opened, reference: Opened, options: Options) -> tuple[list[Ids], str]:
    given = (options.text, options.windows, options.window, options.seed, options.progress)
    return decoder_windows(candidate, reference, *given)


def _check_vocabularies(a: Opened, b: Opened) -> None:
    sizes = [int(getattr(opened.model, "vocabulary", 0)) for opened in (a, b)]
    if all(sizes) and sizes[0] != sizes[1]:
        raise BadInputError(f"different vocabularies: {a.name} has {sizes[0]} tokens, {b.name} has {sizes[1]}")

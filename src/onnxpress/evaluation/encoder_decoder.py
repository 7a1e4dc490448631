"""Encoder-decoders: text, sound or pixels in, text out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from onnxpress.arrays import Array, Feeds, Ids
from onnxpress.evaluation import modes
from onnxpress.evaluation.inputs import encoder_feeds, random_feeds
from onnxpress.evaluation.kind import DECODE, PADDED, PREFILL, Answered, Case, GraphFile, Opened, Options
from onnxpress.evaluation.language_model import RECORDED_STEPS, LanguageModel
from onnxpress.evaluation.metrics import require_finite_output
from onnxpress.evaluation.modes import Chunk, Predictions
from onnxpress.graph.conventions import DECODER, ENCODER
from onnxpress.runtime.sessions import EncoderDecoderSession
from onnxpress.runtime.timing import median_ms, seconds

CHUNK = "chunk"
ANSWER, VERIFIED_ANSWER = 24, 12
"""Tokens of an answer that a model is judged and verified on."""
BENCHMARK_STEPS = 32


@dataclass(frozen=True)
class Answer:
    """Inputs of an encoder, and tokens [rows, length] that a decoder makes of them."""

    feeds: Feeds
    ids: Ids


@dataclass(frozen=True)
class AnswerChunk:
    """Inputs of an encoder, and a prompt with several tokens at once after it, for the decoder."""

    feeds: Feeds
    chunk: Chunk


class EncoderDecoder(LanguageModel):
    """An encoder-decoder, run by an `EncoderDecoderSession` or anything with its `encode`, `prefill` and `decode`.

    Modes: `prefill` (an answer at once), `decode` (its second half by cached steps), `padded` (all of them as a batch),
    `chunk` (several tokens after a past).
    """

    kind = "encoder-decoder"

    @classmethod
    def open(cls, file: GraphFile) -> Self | None:
        path = file.path
        if not path.stem.startswith(ENCODER) or not list(path.parent.glob(f"{DECODER}*.onnx")):
            return None
        model = EncoderDecoderSession(
            path.parent,
            file.session_options,
            file.threads,
            suffix=path.stem[len(ENCODER) :],
            profile_prefix=file.profile_prefix,
        )
        return cls(path.parent.name, model, file.config, file.folder)

    def verification_cases(
        self, like: Opened, windows: Sequence[Ids] | None, seed: int, length: int | None
    ) -> list[Case]:
        """Three inputs with short answers, one by one and as a padded batch."""
        single, batch, _ = encoder_feeds(like, self, None, 3, 32)
        return self._cases(single, batch, VERIFIED_ANSWER)

    def parity_cases(self, like: Opened, seed: int) -> list[Case]:
        """Two inputs, one of them padded, and the beginnings of answers with cached steps after them."""
        generator = np.random.default_rng(seed)
        feeds: dict[str, Array] = {}
        for name, node in like.model.encoder.inputs.items():
            if name == "input_ids":
                feeds[name] = self.random_tokens(generator, 2, 9)
            elif name == "attention_mask":
                feeds[name] = np.ones((2, 9), np.int64)
                feeds[name][0, -3:] = 0
            else:
                feeds[name] = generator.normal(size=(2, *node.shape[1:])).astype(np.float32)
        ids = self.random_tokens(generator, 2, 6)
        return [Case(AnswerChunk(feeds, Chunk(ids[:, :3], None, ids[:, 3:])), (CHUNK,), CHUNK)]

    def evaluation_cases(self, candidate: EncoderDecoder, options: Options) -> tuple[list[Case], str]:
        """Up to four inputs: the reference continues greedily, the candidate must find the same words as likely."""
        windows, window = min(options.windows, 4), min(options.window, 64)
        single, batch, source = encoder_feeds(candidate, self, options.text, windows, window)
        return self._cases(single, batch, ANSWER), source

    def _cases(self, single: Sequence[Feeds], batch: Feeds | None, length: int) -> list[Case]:
        answers = []
        for feeds in single:
            self.model.encode(feeds)
            answers.append(modes.continuation(self.model, np.array([[self.decoder_start]]), length))
        cases = [Case(Answer(feeds, ids), (PREFILL, DECODE)) for feeds, ids in zip(single, answers, strict=True)]
        together = [Case(Answer(batch, np.concatenate(answers)), (PADDED,))] if batch is not None else []
        return [*cases, *together]

    def chunk_case(self) -> Case:
        """Two random inputs, the second with padding, and answers of which the second half is fed at once."""
        halves = [random_feeds(self.model.encoder, self.config, seed) for seed in (0, 1)]
        feeds = {name: np.concatenate([half[name] for half in halves]) for name in halves[0]}
        if "attention_mask" in feeds:
            feeds["attention_mask"][1, -5:] = 0
        self.model.encode(feeds)
        ids = modes.continuation(self.model, np.full((2, 1), self.decoder_start), 12)
        return Case(AnswerChunk(feeds, Chunk(ids[:, :6], None, ids[:, 6:])), (CHUNK,), CHUNK)

    def run(self, mode: str, inputs: Answer | AnswerChunk) -> list[Predictions]:
        ((_, outputs),) = self.runs([mode], inputs)
        return outputs

    def runs(self, modes_: Sequence[str], inputs: Answer | AnswerChunk) -> Iterator[tuple[str, list[Predictions]]]:
        """Run the encoder once, and the decoder in each mode."""
        self.model.encode(inputs.feeds)
        for mode in modes_:
            if isinstance(inputs, AnswerChunk):
                yield mode, modes.chunk(self.model, inputs.chunk)
            elif mode == PADDED:
                yield mode, self._together(inputs.ids)
            elif mode == DECODE:
                half = inputs.ids.shape[1] // 2
                yield mode, [modes.cached(self.model, inputs.ids, half, inputs.ids.shape[1] - 1 - half)]
            else:
                positions = modes.positions_of(inputs.ids.shape[1], False)
                yield mode, [modes.prompt(self.model, inputs.ids, positions)]

    def _together(self, ids: Ids) -> list[Predictions]:
        logits = self.model.prefill(ids)[:, :-1]
        require_finite_output(logits, "padded batch")
        return [Predictions(row, np.arange(len(row))) for row in logits]

    def answers(self, cases: Iterable[Case]) -> Iterator[Answered]:
        """See `Opened.answers`: a batch is to give what its rows gave one by one."""
        single: list[Predictions] = []
        for case in cases:
            if PADDED in case.modes:
                yield case, single
            else:
                expected = self.run(case.reference_mode, case.inputs)
                single += expected
                yield case, expected

    def begin(self, prompt: Ids) -> Ids:
        self.model.encode({"input_ids": prompt, "attention_mask": np.ones_like(prompt)})
        return np.array([[self.decoder_start]])

    def recorded_inputs(self, seed: int) -> tuple[dict[str, Any], dict[str, Array]]:
        """Random inputs of the encoder, plain where they are tokens, and the likeliest answer."""
        plain: dict[str, Any] = {}
        arrays = random_feeds(self.model.encoder, self.config, seed)
        if set(arrays) <= {"input_ids", "attention_mask"}:
            plain, arrays = {name: value.tolist() for name, value in arrays.items()}, {}
        self._encode_recorded(plain, arrays)
        ids = modes.continuation(self.model, np.array([[self.decoder_start]]), RECORDED_STEPS)
        return {"encoder": plain, "input_ids": ids.tolist()}, arrays

    def recorded_outputs(
        self, inputs: Mapping[str, Any], arrays: Mapping[str, Array], expected: Mapping[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Array]]:
        self._encode_recorded(inputs["encoder"], arrays)
        return super().recorded_outputs(inputs, arrays, expected)

    def _encode_recorded(self, plain: Mapping[str, Any], arrays: Mapping[str, Array]) -> None:
        self.model.encode({**arrays, **{name: np.array(value) for name, value in plain.items()}})

    def speed(self, prompt: int, context: Sequence[int], repeats: int) -> tuple[Callable[[], object], dict[str, Any]]:
        """Latency of the encoder with the first token, and of cached steps."""
        model, start = self.model, np.array([[self.decoder_start]])
        feeds = random_feeds(model.encoder, self.config)

        def run() -> None:
            model.encode(feeds)
            model.prefill(start)

        latency = [seconds(run) for _ in range(repeats + 1)][1:]
        steps = [seconds(lambda: model.decode(start)) for _ in range(BENCHMARK_STEPS)]
        return run, {"latency_ms": median_ms(latency), "decode_ms_per_token": {"1": median_ms(steps)}}

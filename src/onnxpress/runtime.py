"""Sessions of onnxruntime as the rest of onnxpress uses them: one way to open a file, one to run each kind of graph."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from .errors import BadInputError, CorruptFileError, SourceNotFoundError, UnsupportedModelError, UsageError
from .session_options import make_session_options

Ids = NDArray[np.int64]
Floats = NDArray[np.float32]
Feeds = Mapping[str, NDArray[Any]]

NUMPY_TYPES: dict[str, type[np.generic]] = {
    "tensor(float)": np.float32,
    "tensor(double)": np.float64,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(int16)": np.int16,
    "tensor(int8)": np.int8,
    "tensor(uint8)": np.uint8,
    "tensor(bool)": np.bool_,
}


def open_session(
    path: str | Path,
    session_options: Mapping[str, str] | None = None,
    threads: int | None = None,
    provider: str = "CPUExecutionProvider",
    profile_prefix: str | None = None,
) -> onnxruntime.InferenceSession:
    """Open a graph, by path so that external data is memory-mapped rather than read.

    Raises SourceNotFoundError, CorruptFileError (cannot be parsed), UnsupportedModelError (an operator or opset that
    the runtime lacks), UsageError (an unknown session option, a provider that is not there).
    """
    path = Path(path)
    if not path.is_file():
        raise SourceNotFoundError(f"no such file: {path}")
    if provider not in onnxruntime.get_available_providers():
        raise UsageError(
            f"this onnxruntime has no {provider}", hint=f"it has {', '.join(onnxruntime.get_available_providers())}"
        )
    options = make_session_options(session_options, threads, profile_prefix)
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=[provider])
    except Exception as error:  # onnxruntime's exceptions have no common base below Exception
        reason = " ".join(str(error).split())[:300]
        if re.search(r"NOT_IMPLEMENTED|not a registered|No Op registered|is till opset|INVALID_GRAPH", reason):
            raise UnsupportedModelError(f"onnxruntime cannot run {path.name}: {reason}") from error
        raise CorruptFileError(f"onnxruntime cannot load {path.name}: {reason}") from error
    # Where a provider is missing its libraries the session falls back to the CPU with nothing but a log line.
    if provider not in session.get_providers():
        raise UsageError(f"{provider} could not be started; onnxruntime would run on the CPU instead")
    return session


def position_ids(mask: Ids, length: int) -> Ids:
    """Positions of the last `length` tokens, [batch, length], counted over real tokens only (padding gets 0)."""
    positions: Ids = np.maximum(np.cumsum(mask, axis=1) - 1, 0)[:, -length:]
    return np.ascontiguousarray(positions)


def _present_name(past: str, outputs: Sequence[str]) -> str:
    for name in (past.replace("past_key_values", "present"), past.replace("past_key_values", "present_key_values")):
        if name in outputs:
            return name
    raise UnsupportedModelError(f"input {past} has no matching present output")


class DecoderSession:
    """A decoder graph with its key/value cache, or without one (then each step runs the whole sequence again).

    Inputs it knows: `input_ids`, `attention_mask`, `position_ids`, `past_key_values.{i}.key|value`
    [batch, kv_heads, past_length, head_dim], `use_cache_branch`; outputs `logits`, `present.{i}.key|value`.

    The cache is one of two kinds, found out by running both on three tokens and comparing:

    * shared: the graph's GroupQueryAttention writes into the very buffer it reads (past and present bound to one memory
      of `capacity` tokens, doubled when full), so a step copies nothing;
    * dense: every step returns a cache that is longer by one, handed back without a copy in Python.

    Measured on SmolLM2-135M (4-bit weights, fp32 head, one thread), CPU ms per token at context 16, 256, 512: shared
    21.7, 32.2, 32.2; dense 22.1, 35.4, 36.7; dense through `run` with numpy arrays 21.6, 34.8, 36.0. The shared buffer
    is what helps, by the copies of the cache that it saves; binding alone does not, numpy outputs being views.
    """

    kind = "decoder"

    def __init__(
        self,
        path: str | Path | onnxruntime.InferenceSession,
        session_options: Mapping[str, str] | None = None,
        threads: int | None = None,
        provider: str = "CPUExecutionProvider",
        *,
        shared: bool | None = None,
        capacity: int = 512,
    ) -> None:
        if isinstance(path, str | Path):
            path = open_session(path, session_options, threads, provider)
        self.session: onnxruntime.InferenceSession = path
        self._types = {node.name: NUMPY_TYPES[node.type] for node in self.session.get_inputs()}
        outputs = {node.name: node for node in self.session.get_outputs()}
        if "input_ids" not in self._types or "logits" not in outputs:
            raise UnsupportedModelError("the graph has no input_ids or no logits: not a decoder")
        self._logits_type = NUMPY_TYPES[outputs["logits"].type]
        self._past = {
            node.name: (_present_name(node.name, list(outputs)), int(node.shape[1]), int(node.shape[3]))
            for node in self.session.get_inputs()
            if node.name.startswith("past_key_values.")
        }
        self._capacity = capacity
        self._memory: dict[str, NDArray[Any]] = {}
        self._shared = False
        self.last_only, self.vocabulary, self._shared = self._probe(shared)
        self.reset()

    @property
    def shared(self) -> bool:
        """Whether past and present are one memory."""
        return self._shared

    @property
    def length(self) -> int:
        """Tokens in the cache, padding included."""
        return int(self._mask.shape[1])

    def reset(self) -> None:
        """Forget the sequence; keep the memory."""
        self._mask: Ids = np.zeros((0, 0), np.int64)
        self._ids: Ids = np.zeros((0, 0), np.int64)
        self._dense: dict[str, onnxruntime.OrtValue] = {}
        self._binding: onnxruntime.IOBinding | None = None

    def prefill(self, ids: Ids, mask: Ids | None = None) -> Floats:
        """Start a sequence with `ids` [batch, length]; `mask` is 0 where the left is padded.

        Returns logits [batch, length, vocabulary], or [batch, 1, vocabulary] of the last token where the graph computes
        no more (`last_only`).
        """
        self.reset()
        ids = np.ascontiguousarray(ids, np.int64)
        return self._step(ids, np.ones_like(ids) if mask is None else np.ascontiguousarray(mask, np.int64))

    def decode(self, ids: Ids) -> Floats:
        """Continue every row with `ids` [batch, length], usually one token each; logits as in `prefill`.

        onnxruntime's GroupQueryAttention takes several new tokens after a past for one row only, so a larger batch goes
        token by token.
        """
        ids = np.ascontiguousarray(ids, np.int64)
        if self.length == 0:
            raise BadInputError("decode before prefill")
        if ids.shape[0] > 1 and ids.shape[1] > 1 and self._past:
            steps = [self._step(ids[:, i : i + 1], np.ones_like(ids[:, :1])) for i in range(ids.shape[1])]
            return steps[-1] if self.last_only else np.concatenate(steps, axis=1)
        return self._step(ids, np.ones_like(ids))

    def _step(self, ids: Ids, new_mask: Ids) -> Floats:
        first = self.length == 0
        self._mask = new_mask if first else np.concatenate([self._mask, new_mask], axis=1)
        fed, new = np.ascontiguousarray(ids), ids.shape[1]
        if not self._past:
            fed = self._ids = ids if first else np.concatenate([self._ids, ids], axis=1)
        values: dict[str, NDArray[Any]] = {
            "input_ids": fed,
            "attention_mask": self._mask,
            "position_ids": position_ids(self._mask, fed.shape[1]),
            "use_cache_branch": np.array([not first]),
        }
        feeds = {key: value.astype(self._types[key], copy=False) for key, value in values.items() if key in self._types}
        logits = self._run_shared(feeds) if self._shared else self._run_dense(feeds, first)
        return logits.astype(np.float32, copy=False)[:, -new:]

    def _run_dense(self, feeds: Feeds, first: bool) -> NDArray[Any]:
        batch = feeds["input_ids"].shape[0]
        if first:
            self._dense = {
                name: _wrap(np.zeros((batch, heads, 0, width), self._types[name]))
                for name, (_, heads, width) in self._past.items()
            }
        inputs = {name: _wrap(value) for name, value in feeds.items()} | self._dense
        names = ["logits", *(present for present, _, _ in self._past.values())]
        logits, *presents = self.session.run_with_ort_values(names, inputs)
        self._dense = dict(zip(self._past, presents, strict=True))
        return np.array(logits.numpy())

    def _run_shared(self, feeds: Feeds) -> NDArray[Any]:
        batch, length = feeds["input_ids"].shape
        moved = self._reserve(batch, self.length, self.length - length)
        if self._binding is None or moved:
            self._binding = self.session.io_binding()
            for name, (present, _, _) in self._past.items():
                buffer = _wrap(self._memory[name])
                self._binding.bind_ortvalue_input(name, buffer)
                self._binding.bind_ortvalue_output(present, buffer)
        for name, value in feeds.items():
            self._binding.bind_ortvalue_input(name, _wrap(value))
        # The result is ours from the start: onnxruntime would otherwise reuse or copy its own.
        logits = np.empty((batch, 1 if self.last_only else length, self.vocabulary), self._logits_type)
        self._binding.bind_ortvalue_output("logits", _wrap(logits))
        self.session.run_with_iobinding(self._binding, _quiet())
        return logits

    def _reserve(self, batch: int, length: int, used: int) -> bool:
        """Make room for `length` tokens, keeping the first `used`; True when the memory moved."""
        first = next(iter(self._memory.values()), None)
        if first is not None and first.shape[0] == batch and first.shape[2] >= length:
            return False
        while self._capacity < length:
            self._capacity *= 2
        for name, (_, heads, width) in self._past.items():
            # Pages that no token reaches are never touched, so a generous capacity costs address space only.
            buffer = np.empty((batch, heads, self._capacity, width), self._types[name])
            if used:
                buffer[:, :, :used] = self._memory[name][:, :, :used]
            self._memory[name] = buffer
        return True

    def _probe(self, shared: bool | None) -> tuple[bool, int, bool]:
        """(logits of the last token only, vocabulary size, may past and present be one memory)."""
        self.reset()
        ids = np.array([[0, 1, 2]])
        prompt, expected = self.prefill(ids[:, :2]), self.decode(ids[:, 2:])
        self.last_only, self.vocabulary = prompt.shape[1] == 1, int(prompt.shape[2])
        if shared is False or not self._past:
            return self.last_only, self.vocabulary, False
        reason = "its outputs differ"
        self._shared = True
        try:
            self._reserve(1, 3, 0)
            for buffer in self._memory.values():
                buffer[:, :, :8] = np.nan  # whatever the graph reads beyond the present must not matter
            self.prefill(ids[:, :2])
            if np.allclose(self.decode(ids[:, 2:]), expected, rtol=1e-2, atol=1e-2):
                return self.last_only, self.vocabulary, True
        except Exception as error:  # the graph concatenates past and present, so the shapes do not fit
            reason = " ".join(str(error).split())[:200]
        self._memory.clear()
        if shared:
            raise UnsupportedModelError(f"past and present cannot share memory: {reason}")
        return self.last_only, self.vocabulary, False


def _wrap(array: NDArray[Any]) -> onnxruntime.OrtValue:
    """An OrtValue over the memory of `array`, which it keeps alive."""
    return onnxruntime.OrtValue.ortvalue_from_numpy(array)


def _quiet() -> onnxruntime.RunOptions:
    options = onnxruntime.RunOptions()
    options.log_severity_level = 4
    return options


class EncoderSession:
    """A graph without a cache: text, vision or speech encoders, classifiers, or anything else with named inputs."""

    kind = "encoder"

    def __init__(
        self,
        path: str | Path | onnxruntime.InferenceSession,
        session_options: Mapping[str, str] | None = None,
        threads: int | None = None,
        provider: str = "CPUExecutionProvider",
    ) -> None:
        if isinstance(path, str | Path):
            path = open_session(path, session_options, threads, provider)
        self.session: onnxruntime.InferenceSession = path
        self.inputs = {node.name: node for node in self.session.get_inputs()}
        self.outputs = [node.name for node in self.session.get_outputs()]

    def run(self, feeds: Feeds) -> dict[str, NDArray[Any]]:
        """All outputs by name; feeds that the graph lacks are left out, dtypes are matched to it."""
        types = {name: NUMPY_TYPES[node.type] for name, node in self.inputs.items()}
        known = {name: value.astype(types[name], copy=False) for name, value in feeds.items() if name in types}
        missing = self.inputs.keys() - known.keys()
        if missing:
            raise BadInputError(f"no value for the graph's input {sorted(missing)[0]!r}")
        return dict(zip(self.outputs, self.session.run(None, known), strict=True))

    def encode(self, ids: Ids, mask: Ids | None = None) -> dict[str, NDArray[Any]]:
        """`run` on token ids [batch, length] with mask [batch, length]; token types are 0."""
        mask = np.ones_like(ids) if mask is None else mask
        return self.run(
            {
                "input_ids": ids,
                "attention_mask": mask,
                "token_type_ids": np.zeros_like(ids),
                "position_ids": position_ids(mask, ids.shape[1]),
            }
        )

    def embed(self, ids: Ids, mask: Ids | None = None) -> Floats:
        """One vector per row, [batch, width]: see `pool`."""
        return pool(self.encode(ids, mask), mask)


def pool(outputs: Mapping[str, NDArray[Any]], mask: Ids | None = None) -> Floats:
    """`sentence_embedding` if the graph has it, else the masked mean of `last_hidden_state` (or of the first output).

    An output without a length axis ([batch, width], e.g. class logits) is returned as it is.
    """
    if "sentence_embedding" in outputs:
        return np.asarray(outputs["sentence_embedding"], np.float32)
    hidden: Floats = np.asarray(outputs.get("last_hidden_state", next(iter(outputs.values()))), np.float32)
    if hidden.ndim <= 2:
        return hidden
    hidden = hidden.reshape(hidden.shape[0], -1, hidden.shape[-1])
    if mask is None or mask.shape[1] != hidden.shape[1]:
        return np.asarray(hidden.mean(axis=1))
    weights = mask[:, :, None].astype(np.float32)
    mean: Floats = (hidden * weights).sum(axis=1) / np.maximum(weights.sum(axis=1), 1)
    return mean


class EncoderDecoderSession:
    """The Hugging Face triple: `encoder_model.onnx`, `decoder_model.onnx`, `decoder_with_past_model.onnx`.

    Names are optimum's: the first decoder returns `present.{i}.decoder|encoder.key|value`; the second takes
    `past_key_values.{i}.decoder|encoder.key|value` and returns at least the decoder's part.
    """

    kind = "encoder-decoder"
    last_only = False

    def __init__(
        self,
        folder: str | Path,
        session_options: Mapping[str, str] | None = None,
        threads: int | None = None,
        provider: str = "CPUExecutionProvider",
        *,
        suffix: str = "",
    ) -> None:
        def session(stem: str) -> EncoderSession:
            return EncoderSession(Path(folder) / f"{stem}{suffix}.onnx", session_options, threads, provider)

        self.encoder = session("encoder_model")
        self.first, self.later = session("decoder_model"), session("decoder_with_past_model")
        self._context: dict[str, NDArray[Any]] = {}
        self.reset()

    def reset(self) -> None:
        self._cache: dict[str, NDArray[Any]] = {}
        self._length = 0

    def encode(self, feeds: Feeds) -> Floats:
        """Run the encoder and keep its states for the decoder; returns them, [batch, length, width]."""
        self.reset()
        states = next(iter(self.encoder.run(feeds).values()))
        self._context = {"encoder_hidden_states": states}
        mask = feeds.get("attention_mask")
        self._context["encoder_attention_mask"] = np.ones(states.shape[:2], np.int64) if mask is None else mask
        return states.astype(np.float32, copy=False)

    def prefill(self, ids: Ids, mask: Ids | None = None) -> Floats:
        """Start decoding with `ids` [batch, length]; logits [batch, length, vocabulary]."""
        if not self._context:
            raise BadInputError("decode before encode")
        self.reset()
        return self._step(self.first, ids, mask)

    def decode(self, ids: Ids) -> Floats:
        """Continue with `ids` [batch, length], token by token."""
        return np.concatenate([self._step(self.later, ids[:, i : i + 1]) for i in range(ids.shape[1])], axis=1)

    def _step(self, decoder: EncoderSession, ids: Ids, mask: Ids | None = None) -> Floats:
        self._length += ids.shape[1]
        mask = np.ones((ids.shape[0], self._length), np.int64) if mask is None else mask
        feeds = {"input_ids": ids, "decoder_input_ids": ids, "decoder_attention_mask": mask, "attention_mask": mask}
        outputs = decoder.run({**feeds, **self._context, **self._cache})
        logits = outputs.pop("logits")
        for name, value in outputs.items():
            self._cache[name.replace("present_key_values", "present").replace("present", "past_key_values")] = value
        return logits.astype(np.float32, copy=False)

"""Sessions of onnxruntime as the rest of onnxpress uses them: one way to open a file, one to run each kind of graph."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from onnxpress.arrays import Feeds, Floats, Ids
from onnxpress.errors import BadInputError, CorruptFileError, SourceNotFoundError, UnsupportedModelError, UsageError
from onnxpress.graph.conventions import DECODER, DECODER_MERGED, DECODER_WITH_PAST, ENCODER
from onnxpress.runtime.session_options import make_session_options

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
    content: bytes | None = None,
) -> onnxruntime.InferenceSession:
    """Open a graph, by path so that external data is memory-mapped rather than read.

    content: an edited graph to run in the place of the file's, with the weights that lie beside the file.

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
    if content is not None:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent))
    try:
        session = onnxruntime.InferenceSession(content or str(path), options, providers=[provider])
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


class EncoderSession:
    """A graph without a cache: text, vision or speech encoders, classifiers, or anything else with named inputs."""

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
    """An encoder with `decoder_model_merged`, or else with `decoder_model` and `decoder_with_past_model`.

    Names are optimum's: the first decoder returns `present.{i}.decoder|encoder.key|value`; the second takes
    `past_key_values.{i}.decoder|encoder.key|value` and returns at least the decoder's part. The merged one is either,
    by `use_cache_branch`, and takes the inputs of both: before there is a cache, one of length 0.
    """

    last_only = False

    def __init__(
        self,
        folder: str | Path,
        session_options: Mapping[str, str] | None = None,
        threads: int | None = None,
        provider: str = "CPUExecutionProvider",
        *,
        suffix: str = "",
        profile_prefix: str | None = None,
    ) -> None:
        def session(stem: str) -> EncoderSession:
            prefix = f"{profile_prefix}-{stem}" if profile_prefix else None
            path = Path(folder) / f"{stem}{suffix}.onnx"
            return EncoderSession(open_session(path, session_options, threads, provider, prefix))

        self.encoder = session(ENCODER)
        if (Path(folder) / f"{DECODER_MERGED}{suffix}.onnx").is_file():
            self.first = self.later = session(DECODER_MERGED)
        else:
            self.first, self.later = session(DECODER), session(DECODER_WITH_PAST)
        self._context: dict[str, NDArray[Any]] = {}
        self.reset()

    @property
    def sessions(self) -> list[onnxruntime.InferenceSession]:
        """The sessions of the encoder and of the decoder or decoders."""
        return list(dict.fromkeys(part.session for part in (self.encoder, self.first, self.later)))

    @property
    def cache(self) -> Feeds:
        """The arrays that the later decoder is fed next to the new token, by the names of its inputs."""
        return self._cache

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
        feeds["use_cache_branch"] = np.array([bool(self._cache)])
        outputs = decoder.run({**feeds, **self._context, **(self._cache or _no_past(decoder, len(ids)))})
        logits = outputs.pop("logits")
        for name, value in outputs.items():
            past = name.replace("present_key_values", "present").replace("present", "past_key_values")
            if ".encoder." not in past or past not in self._cache:  # the encoder's part stays what it was
                self._cache[past] = value
        return logits.astype(np.float32, copy=False)


def _no_past(decoder: EncoderSession, batch: int) -> dict[str, NDArray[Any]]:
    """A cache of length 0 for a decoder that has to be fed one."""
    return {
        name: np.zeros((batch, node.shape[1], 0, node.shape[3]), NUMPY_TYPES[node.type])
        for name, node in decoder.inputs.items()
        if name.startswith("past_key_values.")
    }

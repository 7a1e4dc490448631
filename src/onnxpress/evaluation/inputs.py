"""Inputs to measure models on: text of the user's or of the reference's own, as token ids; rows of a padded batch;
values for the inputs of any graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from onnxpress.arrays import Array, Ids
from onnxpress.errors import BadInputError
from onnxpress.evaluation.kind import Opened
from onnxpress.evaluation.texts import (
    Tokenizer,
    file_windows,
    load_tokenizer,
    pad_rows,
    read_text,
    sentences,
    written_windows,
)
from onnxpress.progress import Update
from onnxpress.runtime.sessions import NUMPY_TYPES, EncoderSession

FEWEST_TOKENS = 16
"""The fewest that a text has: the shortest row of a padded batch is a quarter of it, and needs a prompt and a step."""


def decoder_windows(
    candidate: Opened,
    reference: Opened,
    text: str | Path | Sequence[Ids] | None,
    windows: int,
    window: int,
    seed: int,
    progress: Update | None,
) -> tuple[list[Ids], str]:
    """Token windows [1, length] to measure decoders on, and a word on where they come from."""
    window = longest(reference, window)
    if text is None:
        pieces = written_windows(reference.model, windows, window, reference.starts, seed, progress)
        return pieces, "written by the reference"
    if not isinstance(text, str | Path):
        return list(text), "token ids"
    tokenizer = load_tokenizer(reference.folder) or load_tokenizer(candidate.folder)
    if tokenizer is None:
        raise BadInputError("neither model has a tokenizer.json to read text with", hint="leave out --text")
    pieces = file_windows(Path(text), tokenizer, windows, window, first_token(reference, tokenizer))
    if (found := pieces[0].shape[1]) < min(window, FEWEST_TOKENS):
        raise BadInputError(
            f"{text} has {found} tokens, too few to measure on", hint="give a text of at least a few sentences"
        )
    return pieces, str(text)


def longest(opened: Opened, length: int) -> int:
    """`length`, or all positions that the model has if they are fewer."""
    limit = opened.config.get("max_position_embeddings") or opened.config.get("n_positions") or length
    return min(length, int(limit))


def first_token(opened: Opened, tokenizer: Tokenizer) -> int | None:
    """The token that the model's texts begin with, if its tokenizer puts one there.

    Models that were trained with a first token behave badly without it; those that were not have none in the config.
    """
    start = opened.config.get("bos_token_id")
    return start if tokenizer.encode("a").ids[:1] == [start] else None


def padded_rows(pieces: Sequence[Ids], longest: int = 64) -> list[Ids]:
    """Four rows of different lengths, [length_i] each, from the beginnings of `pieces`."""
    size = min(longest, *(piece.shape[1] for piece in pieces))
    return [pieces[i % len(pieces)][0, : max(1, size * (4 - i) // 4)] for i in range(4)]


def encoder_rows(
    opened: Sequence[Opened], text: str | Path | None, window: int, seed: int
) -> tuple[list[list[int]], str]:
    """Token ids of the rows that encoders are measured on, and where they come from."""
    tokenizer = next(filter(None, (load_tokenizer(model.folder) for model in opened)), None)
    config = next((model.config for model in opened if model.config), {})
    window = min(window, int(config.get("max_position_embeddings") or window) - 2)
    if tokenizer is not None:
        lines = sentences() if text is None else [line for line in read_text(Path(text)).splitlines() if line.strip()]
        rows = [tokenizer.encode(line).ids[:window] for line in lines[:256]]
        return rows, "built-in sentences" if text is None else str(text)
    if text is not None:
        raise BadInputError("neither model has a tokenizer.json to read text with", hint="leave out --text")
    generator = np.random.default_rng(seed)
    size = min((int(m.config["vocab_size"]) for m in opened if "vocab_size" in m.config), default=64)
    lengths = [int(n) for n in generator.integers(2, min(window, 64), 32)]
    return [generator.integers(0, size, n).tolist() for n in lengths], "random inputs"


def encoder_feeds(
    candidate: Opened, reference: Opened, text: str | Path | Sequence[Ids] | None, windows: int, window: int
) -> tuple[list[dict[str, Any]], dict[str, Any] | None, str]:
    """Inputs of the encoder of an encoder-decoder: one by one, as a padded batch (token ids only), their origin."""
    encoder = getattr(candidate.model, "encoder", None) or getattr(reference.model, "encoder", None)
    if encoder is not None and "input_ids" not in encoder.inputs:
        return [random_feeds(encoder, reference.config, seed) for seed in range(windows)], None, "random inputs"
    if text is None or isinstance(text, str | Path):
        rows, source = encoder_rows((reference, candidate), text, window, seed=0)
    else:
        rows, source = [ids[0].tolist() for ids in text], "token ids"
    rows = rows[:windows]
    ids, mask = pad_rows(rows)
    single = [{"input_ids": np.array([row]), "attention_mask": np.ones((1, len(row)), np.int64)} for row in rows]
    return single, {"input_ids": ids, "attention_mask": mask}, source


def random_feeds(session: EncoderSession, config: Mapping[str, Any], seed: int = 0) -> dict[str, Array]:
    """Make up values for every input of a graph, from its shapes and dtypes; named dimensions get usual sizes."""
    generator = np.random.default_rng(seed)
    feeds: dict[str, Array] = {}
    for name, node in session.inputs.items():
        shape = [s if isinstance(s, int) else _size(name, axis, str(s), config) for axis, s in enumerate(node.shape)]
        dtype = NUMPY_TYPES.get(node.type)
        if dtype is None:
            raise BadInputError(f"input {name} has type {node.type}, which onnxpress cannot make up")
        if np.issubdtype(dtype, np.floating):
            feeds[name] = generator.standard_normal(shape).astype(dtype)
        elif "mask" in name or dtype is np.bool_:
            feeds[name] = np.ones(shape, dtype)
        elif "type" in name:
            feeds[name] = np.zeros(shape, dtype)
        else:
            feeds[name] = generator.integers(0, int(config.get("vocab_size", 16)), shape).astype(dtype)
    return feeds


def _size(name: str, axis: int, dimension: str, config: Mapping[str, Any]) -> int:
    if axis == 0 or "batch" in dimension:
        return 1
    image = config.get("vision_config", config).get("image_size", 224)
    sizes = {
        "pixel_values": [1, config.get("num_channels", 3), *(image if isinstance(image, list) else [image, image])],
        "input_values": [1, 16000],
        "input_features": [1, config.get("num_mel_bins", 80), 2 * config.get("max_source_positions", 1500)],
    }.get(name, [])
    return int(sizes[axis]) if axis < len(sizes) else 16

"""Texts that models are measured on: from a file, sentence pairs, or, by default, what the reference writes."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from onnxpress.arrays import Ids
from onnxpress.errors import BadInputError, SourceNotFoundError
from onnxpress.evaluation.metrics import log_softmax
from onnxpress.progress import Update


class Writer(Protocol):
    """A decoder that can be sampled from."""

    def prefill(self, ids: Ids, mask: Ids | None = None) -> NDArray[np.float32]: ...
    def decode(self, ids: Ids) -> NDArray[np.float32]: ...


class Encoding(Protocol):
    ids: list[int]


class Tokenizer(Protocol):
    """The part of `tokenizers.Tokenizer` that is used."""

    def encode(self, sequence: str, *, add_special_tokens: bool = True) -> Encoding: ...


class ScoredPair(NamedTuple):
    first: str
    second: str
    score: float


def load_tokenizer(folder: Path | None) -> Any | None:
    """`tokenizers.Tokenizer` of a folder, or None without a `tokenizer.json`."""
    if folder is None or not (folder / "tokenizer.json").is_file():
        return None
    import tokenizers

    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as error:  # tokenizers raises bare Exception
        raise BadInputError(f"cannot read {folder / 'tokenizer.json'}: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def read_text(path: Path) -> str:
    if not path.is_file():
        raise SourceNotFoundError(f"no such file: {path}")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        what = f"{path} is not UTF-8 text: {error.reason} at byte {error.start}"
        raise BadInputError(what, hint="save it as UTF-8") from error
    if not text.strip():
        raise BadInputError(f"{path} is empty", hint="give a text of at least a few sentences")
    return text


def file_windows(path: Path, tokenizer: Tokenizer, windows: int, window: int, start: int | None = None) -> list[Ids]:
    """Up to `windows` consecutive pieces of `window` tokens, each [1, window], beginning with `start` if given.

    A text shorter than one window is one shorter piece; a rest shorter than a window is left out otherwise.
    """
    ids = tokenizer.encode(read_text(path), add_special_tokens=False).ids
    return [piece[None] for piece in cut(ids, windows, window, start, path)]


def cut(ids: Sequence[int], windows: int, window: int, start: int | None, source: str | Path) -> Ids:
    """[windows, window] of consecutive token ids, see `file_windows`. BadInputError, naming `source`, for too few."""
    if len(ids) < 2:
        raise BadInputError(f"{source} has {len(ids)} tokens", hint="give a text of at least a few sentences")
    size = min(window - (start is not None), len(ids))
    count = min(windows, len(ids) // size)
    pieces: Ids = np.array(ids[: count * size], np.int64).reshape(count, size)
    return pieces if start is None else np.concatenate([np.full((count, 1), start, np.int64), pieces], axis=1)


def written_windows(
    model: Writer, windows: int, window: int, starts: Sequence[int], seed: int = 0, progress: Update | None = None
) -> list[Ids]:
    """Text that `model` writes: `windows` rows [1, window], sampled at temperature 1 with a fixed seed.

    Rows begin with one token each from `starts` (in turn) and never stop early: a token that ends a text is simply
    followed by the next text, as in training data.
    """
    generator = np.random.default_rng(seed)
    ids = np.array([[starts[row % len(starts)]] for row in range(windows)], np.int64)
    logits = model.prefill(ids)
    for step in range(1, window):
        # Adding Gumbel noise and taking the best is sampling from the softmax.
        noisy = log_softmax(logits[:, -1]) + generator.gumbel(size=(windows, logits.shape[-1]))
        chosen = noisy.argmax(-1)[:, None].astype(np.int64)
        ids = np.concatenate([ids, chosen], axis=1)
        if step + 1 < window:
            logits = model.decode(chosen)
        if progress:
            progress(step + 1, window)
    return [row[None] for row in ids]


def read_pairs(path: Path) -> list[ScoredPair]:
    """Sentence pairs with a score from a `.csv` or tab-separated file; a first line without a number is a header."""
    text = read_text(path)
    delimiter = "\t" if path.suffix.lower() in (".tsv", ".tab") or "\t" in text.split("\n", 1)[0] else ","
    pairs: list[ScoredPair] = []
    for number, row in enumerate(csv.reader(text.splitlines(), delimiter=delimiter), start=1):
        if not row:
            continue
        try:
            first, second, score = row[:3]
            pairs.append(ScoredPair(first, second, float(score)))
        except ValueError:
            if number > 1:
                raise BadInputError(f"{path}, line {number}: expected sentence, sentence, score") from None
    if len(pairs) < 2:
        raise BadInputError(f"{path} has {len(pairs)} pairs", hint="lines of sentence, sentence, score")
    return pairs


def sentences() -> list[str]:
    """The built-in sentences: neutral, in several languages, one to forty words."""
    text = files(__package__).joinpath("sentences.txt").read_text(encoding="utf-8")
    return [line for line in text.splitlines() if line and not line.startswith("#")]


def pad_rows(rows: Sequence[Sequence[int]], *, left: bool | Sequence[bool] = False, value: int = 0) -> tuple[Ids, Ids]:
    """Write rows of different lengths into one array: (ids, mask), both [rows, longest].

    left: whether padding stands on the left of all rows, or of each.
    """
    width = max(len(row) for row in rows)
    ids, mask = np.full((len(rows), width), value, np.int64), np.zeros((len(rows), width), np.int64)
    for i, row in enumerate(rows):
        on_left = left if isinstance(left, bool) else left[i]
        place = slice(width - len(row), width) if on_left else slice(0, len(row))
        ids[i, place], mask[i, place] = row, 1
    return ids, mask

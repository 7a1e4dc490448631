"""The original model seen through the tokens that were kept: what a model with fewer tokens is compared with.

Ids go in as the smaller model numbers them, and logits come out for its tokens only. Softmax over these is the original
distribution, renormalized over the tokens that are left.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from onnxpress.arrays import Ids
from onnxpress.errors import BadInputError, CorruptFileError
from onnxpress.evaluation.kind import Opened
from onnxpress.files.json_files import read_optional_json

FILE = "vocabulary.json"
"""Lists the ids that the kept tokens had in the original model."""
SCHEMA_VERSION = 1

AnyKind = TypeVar("AnyKind", bound=Opened)


def write_kept(path: Path, kept: Ids, size: int) -> None:
    """kept: int64 [kept], ascending; size: tokens of the original."""
    record = {"schema_version": SCHEMA_VERSION, "original_size": size, "kept": kept.tolist()}
    path.write_text(json.dumps(record) + "\n", encoding="utf-8")


def read_kept(folder: Path | None) -> Ids | None:
    """The original ids of a model's tokens, None where none were taken away. CorruptFileError for anything else."""
    record = read_optional_json(folder / FILE) if folder is not None else {}
    if not record:
        return None
    try:
        kept = np.array(record["kept"], np.int64)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise CorruptFileError(f"{folder}/{FILE} does not list the kept ids: {error!r}") from error
    if kept.ndim != 1 or not len(kept) or kept[0] < 0 or (np.diff(kept) <= 0).any():
        raise CorruptFileError(f"{folder}/{FILE} does not list ascending ids")
    return kept


def restricted(reference: AnyKind, folder: Path | None) -> AnyKind:
    """`reference` with the vocabulary of the model whose tokenizer is in `folder`; itself where it is the same.

    BadInputError where that model has tokens that the reference lacks.
    """
    kept, ours = read_kept(folder), read_kept(reference.folder)
    if folder is None or kept is None or (ours is not None and np.array_equal(kept, ours)):
        return reference
    places = kept if ours is None else np.searchsorted(ours, kept)
    size = int(getattr(reference.model, "vocabulary", 0) or reference.config.get("vocab_size") or kept[-1] + 1)
    if places[-1] >= size or (ours is not None and not np.array_equal(ours[places], kept)):
        raise BadInputError(
            f"{reference.name} lacks tokens that {folder} has", hint="compare with the model that it was made of"
        )
    config = read_optional_json(folder / "config.json")
    return replace(reference, model=Restricted(reference.model, places, size), config=config, folder=folder)


class Restricted:
    """A decoder, an encoder or an encoder-decoder whose token n is token `kept[n]` of the model behind it."""

    def __init__(self, model: Any, kept: Ids, size: int) -> None:
        """size: tokens of the model behind it, by which its logits are told from other outputs."""
        self.model, self.kept, self.size = model, kept, size
        self.vocabulary = len(kept)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def prefill(self, ids: Ids, mask: Ids | None = None) -> NDArray[np.float32]:
        return self._logits(self.model.prefill(self.kept[ids], mask))

    def decode(self, ids: Ids) -> NDArray[np.float32]:
        return self._logits(self.model.decode(self.kept[ids]))

    def encode(self, ids: Any, mask: Ids | None = None) -> Any:
        """Encode token ids, or inputs by name."""
        if isinstance(ids, Mapping):
            return self._outputs(self.model.encode(self._feeds(ids)))
        return self._outputs(self.model.encode(self.kept[ids], mask))

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> Any:
        return self._outputs(self.model.run(self._feeds(feeds)))

    def _feeds(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        return {
            name: self.kept[value] if name in ("input_ids", "decoder_input_ids") else value
            for name, value in feeds.items()
        }

    def _logits(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        return np.ascontiguousarray(logits[..., self.kept])

    def _outputs(self, outputs: Any) -> Any:
        if not isinstance(outputs, Mapping):
            return outputs
        return {
            name: self._logits(value) if name == "logits" and value.shape[-1] == self.size else value
            for name, value in outputs.items()
        }

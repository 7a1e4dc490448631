"""Parameters under the names, and in the pieces, in which transformers saves them.

While it loads, transformers renames, splits and stacks what checkpoints hold (see `binding.py`); other tools read what
it saves: experts one by one, projections packed. Its own reversed rules are run on meta tensors to learn the names, and
on values when a tensor is written, one parameter or, where several make one, one layer at a time.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from transformers.core_model_loading import revert_weight_conversion

from onnxpress.arrays import Floats

_LAYER = re.compile(r"^.*?\.\d+(?=\.)")


@dataclass(frozen=True)
class Entry:
    """A tensor of a checkpoint."""

    name: str
    shape: tuple[int, ...]
    read: Callable[[], Floats]

    @property
    def nbytes(self) -> int:
        return 4 * math.prod(self.shape)


def as_saved(model: Any, entries: Iterable[Entry]) -> list[Entry]:
    """The entries of a model's parameters as entries of its checkpoint; nothing is read yet."""
    entries = list(entries)
    final = _revert(model, entries)
    if {entry.name: entry.shape for entry in entries} == final:
        return entries
    saved: list[Entry] = []
    together: dict[str, list[Entry]] = {}
    for entry in entries:
        made = _revert(model, [entry])
        if made.items() <= final.items():
            saved += _pieces(model, [entry], made)
        else:
            layer = _LAYER.match(entry.name)
            together.setdefault(layer[0] if layer else "", []).append(entry)
    for group in together.values():
        saved += _pieces(model, group, _revert(model, group))
    return saved


def _revert(model: Any, entries: Iterable[Entry]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of what is saved."""
    metas = {entry.name: torch.empty(entry.shape, device="meta") for entry in entries}
    return {name: tuple(value.shape) for name, value in revert_weight_conversion(model, metas).items()}


def _pieces(model: Any, entries: list[Entry], made: dict[str, tuple[int, ...]]) -> list[Entry]:
    if len(entries) == 1 and list(made.values()) == [entries[0].shape]:
        return [Entry(next(iter(made)), entries[0].shape, entries[0].read)]
    read = lru_cache(maxsize=1)(lambda: _read(model, entries))
    left = set(made)

    def piece(name: str) -> Floats:
        values = read()[name]
        left.discard(name)
        if not left:
            read.cache_clear()
        return values

    return [Entry(name, shape, lambda name=name: piece(name)) for name, shape in made.items()]  # type: ignore[misc]


def _read(model: Any, entries: list[Entry]) -> dict[str, Floats]:
    values = {entry.name: torch.from_numpy(np.array(entry.read())) for entry in entries}
    return {
        name: np.asarray(value.numpy(), np.float32) for name, value in revert_weight_conversion(model, values).items()
    }

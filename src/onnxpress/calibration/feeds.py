"""Sample inputs: what a graph wants, checked before anything runs, and which of their positions are padding."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from onnxpress.arrays import Array, Feeds
from onnxpress.errors import BadInputError, UnsupportedModelError

"""Inputs of one run by name. Names that a graph lacks are allowed: a mask of a decoder that masks by itself."""

PAST = "past_key_values."
TEXT = ("input_ids", "decoder_input_ids", "inputs_embeds", "decoder_inputs_embeds")
MASKS = {
    **dict.fromkeys(TEXT, ("decoder_attention_mask", "attention_mask")),
    "encoder_hidden_states": ("encoder_attention_mask",),
    "input_features": ("attention_mask",),
    "input_values": ("attention_mask",),
}
"""By input, what tells its padding: the first of these that a sample has."""


def feeds_graph(sample: Feeds, model: ir.Model) -> bool:
    """Whether a sample has all inputs of a graph that cannot be left out."""
    names = (str(value.name) for value in model.graph.inputs if not value.is_initializer())
    return all(name in sample or _is_optional(name) for name in names)


def _is_optional(name: str) -> bool:
    """An empty cache will do, unless it holds what an encoder made."""
    return name.startswith(PAST) and ".encoder." not in name


def check_samples(model: ir.Model, samples: Sequence[Feeds]) -> None:
    """Raise BadInputError, naming the sample and the input, where samples do not fit the inputs of a graph."""
    if not samples:
        raise BadInputError("there are no samples to calibrate with", hint="give some with --calibration")
    for number, sample in enumerate(samples):
        sizes: dict[str, tuple[int, str]] = {}
        for value in model.graph.inputs:
            name = str(value.name)
            if value.is_initializer() or (_is_optional(name) and name not in sample):
                continue
            if name not in sample:
                raise BadInputError(
                    f"sample {number} has no {name}, which the graph needs", hint=f"it has {', '.join(sample)}"
                )
            _check_input(number, value, sample[name], sizes)


def _check_input(number: int, value: ir.Value, array: Array, sizes: dict[str, tuple[int, str]]) -> None:
    where = f"sample {number}: {value.name}"
    if array.size == 0:
        raise BadInputError(f"{where} is empty: its shape is {list(array.shape)}")
    if np.issubdtype(array.dtype, np.floating) and not np.isfinite(array).all():
        raise BadInputError(f"{where} holds NaN or infinity")
    if value.dtype is not None and np.issubdtype(array.dtype, np.floating) and value.dtype.is_integer():
        raise BadInputError(f"{where} holds {array.dtype} numbers; the graph wants {value.dtype.name}")
    if value.shape is None:
        return
    wanted = list(value.shape)
    problem = len(wanted) != array.ndim
    for dimension, size in zip(wanted, array.shape, strict=False):
        if isinstance(dimension, int):
            problem |= dimension != size
        elif dimension.value is not None:
            known, owner = sizes.setdefault(dimension.value, (size, str(value.name)))
            if known != size:
                raise BadInputError(f"{where} has {dimension.value} {size}; {owner} has {known}")
    if problem:
        raise BadInputError(f"{where} has the shape {list(array.shape)}; the graph wants {value.shape}")


def feed_of(value: ir.Value, sample: Feeds) -> Array:
    """The array for a graph input: the sample's in its type, or an empty cache [batch, heads, 0, head_dim]."""
    dtype = value.dtype.numpy() if value.dtype is not None else np.float32
    array = sample.get(str(value.name))
    if array is not None:
        return np.ascontiguousarray(array, dtype=dtype)
    assert value.shape is not None
    batch = next(iter(sample.values())).shape[0]
    shape = [size if isinstance(size, int) else 0 for size in value.shape]
    return np.zeros([batch, *shape[1:]], dtype)


def token_count(samples: Sequence[Feeds]) -> int:
    """Positions that are no padding, in all samples; 0 where no input is text."""
    total = 0
    for sample in samples:
        name = next((name for name in TEXT if name in sample), None)
        if name is not None:
            mask = next((sample[key] for key in MASKS[name] if key in sample), None)
            total += int(mask.sum()) if mask is not None else int(np.prod(sample[name].shape[:2]))
    return total


class Padding:
    """Which rows of an activation are real: every value is traced back to the inputs that it depends on."""

    def __init__(self, graph: ir.Graph) -> None:
        self._inputs: dict[str, frozenset[str]] = {}
        known = {str(value.name): frozenset([str(value.name)]) for value in graph.inputs if not value.is_initializer()}
        for node in graph:
            sources = frozenset[str]().union(
                *(known.get(str(v.name), frozenset()) for v in node.inputs if v is not None)
            )
            known |= {str(output.name): sources for output in node.outputs}
        self._inputs = known

    def __contains__(self, name: str) -> bool:
        return name in self._inputs

    def real_rows(self, name: str, activation: Array, sample: Feeds) -> Array:
        """The rows of an activation [batch, length, …, features] that are no padding, as [rows, features].

        Raises UnsupportedModelError where there is padding and the activation does not show which rows it fills.
        """
        rows = activation.reshape(-1, activation.shape[-1])
        mask = self._mask(name, sample)
        if mask is None or mask.ndim != 2 or mask.all():
            return rows
        batch, length = mask.shape
        if activation.ndim == 3 and activation.shape[0] == batch and activation.shape[1] <= length:
            # A shorter activation is of the last tokens: those before them are in the cache.
            return rows[mask[:, length - activation.shape[1] :].reshape(-1)]
        if activation.ndim == 2 and len(rows) == batch * length:
            return rows[mask.reshape(-1)]
        if activation.ndim == 2 and len(rows) == batch:
            return rows  # pooled
        if activation.ndim == 4 and activation.shape[0] == batch and activation.shape[2] == length:
            return activation.transpose(0, 2, 1, 3)[mask].reshape(-1, activation.shape[-1])
        raise UnsupportedModelError(
            f"cannot tell which rows of {name} {list(activation.shape)} are padding: its mask is {list(mask.shape)}",
            hint="give samples without padding, such as one row each",
        )

    def _mask(self, name: str, sample: Feeds) -> NDArray[np.bool_] | None:
        inputs = self._inputs[name]
        order = [one for one in TEXT if one in inputs] or [one for one in MASKS if one in inputs]
        for one in order[:1]:
            for key in MASKS[one]:
                if key in sample:
                    return np.asarray(sample[key] != 0)
        return None

"""A place where channels can be rescaled for nothing: what is divided there, what is multiplied."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx_ir as ir

from onnxpress.arrays import Floats, Integers
from onnxpress.graph.edits import add_weight
from onnxpress.graph.linear import Linear, read_matrix
from onnxpress.graph.tensors import RowTensor, concrete_shape, rows_of

Kind = Literal["norm", "up", "value", "node"]
FREE: tuple[Kind, ...] = ("norm", "up", "value")
"""Those that add nothing to the graph."""
TITLES: Mapping[Kind, str] = {
    "norm": "norm and its products",
    "up": "product and those that it feeds",
    "value": "values and what attention feeds",
    "node": "product with factors of its own",
}


@dataclass(frozen=True)
class Slot:
    """A constant, some of whose channels are divided by factors."""

    node: ir.Node
    value: ir.Value
    axis: int
    """Along which channels lie."""
    start: int
    """The first channel that is meant."""
    offset: float = 0.0
    """What the graph adds to it: Gemma stores gains less one."""

    def divide(self, factors: Floats) -> None:
        """Divide the channels from `start` on; a constant that others read as well is left to them."""
        tensor = _tensor(self.value)
        shape = concrete_shape(tensor)
        scale = np.ones(shape[self.axis], np.float32)
        scale[self.start : self.start + len(factors)] = 1 / factors
        scaled = scale_axis(tensor, self.axis, scale, self.offset)
        if len(shape) == 2 or (len(self.value.uses()) == 1 and not self.value.is_graph_output()):
            scaled.name = self.value.name
            self.value.const_value = scaled
            return
        assert isinstance(self.node.graph, ir.Graph)
        scaled.name = f"{self.value.name}.{self.node.outputs[0].name}"
        own = ir.Value(name=scaled.name, const_value=scaled, shape=self.value.shape, type=self.value.type)
        self.node.graph.register_initializer(own)
        self.node.replace_input_with(self.node.inputs.index(self.value), own)


@dataclass(frozen=True)
class FoldingSite:
    """An activation x [..., features] that products read, and what takes the factors."""

    kind: Kind
    linears: tuple[Linear, ...]
    """All that reads x."""
    slots: tuple[Slot, ...]
    """What takes 1 / s."""
    groups: Integers
    """[features]: the channel of the source that each channel of x comes from. Those of one have one factor."""

    @property
    def activation(self) -> ir.Value:
        return self.linears[0].activation

    @property
    def title(self) -> str:
        """For reports."""
        return TITLES[self.kind]

    @property
    def features(self) -> int:
        return len(self.groups)

    @property
    def weights(self) -> frozenset[ir.Value]:
        """All that folding changes."""
        return frozenset([slot.value for slot in self.slots] + [linear.weight for linear in self.linears])

    def tied(self, peaks: Floats) -> Floats:
        """The largest value of each channel's group, [features]; factors computed of such can be folded."""
        most = np.full(int(self.groups.max()) + 1, -np.inf, peaks.dtype)
        np.maximum.at(most, self.groups, peaks)
        return np.asarray(most[self.groups])

    def weight_peaks(self) -> Floats:
        """max|W| of each channel over all products, tied, [features]."""
        peaks = [np.abs(read_weight(linear)).max(axis=1) for linear in self.linears]
        return self.tied(np.max(peaks, axis=0))

    def source_peaks(self) -> Floats:
        """max|W| of the columns that compute each channel, [features]; only where the source is a product."""
        matrices = [slot for slot in self.slots if len(concrete_shape(_tensor(slot.value))) == 2]
        if len(matrices) != 1:
            raise ValueError(f"{self.activation.name} is not computed by a product")
        (slot,) = matrices
        whole = np.abs(read_matrix(_tensor(slot.value), str(slot.value.name))).max(axis=1 - slot.axis)
        return np.asarray(whole[slot.start + self.groups])

    def fold(self, factors: Floats) -> None:
        """Divide x by factors s [features] > 0 and multiply the rows of its weights by them.

        Raises ValueError if channels of one group have different factors.
        """
        source = np.ones(int(self.groups.max()) + 1, np.float32)
        source[self.groups] = factors
        if not np.array_equal(source[self.groups], factors):
            raise ValueError(f"channels of {self.activation.name} that come from one have different factors")
        if self.kind == "node":
            self._insert(np.reciprocal(factors))
        for slot in self.slots:
            slot.divide(source)
        for linear in {linear.weight: linear for linear in self.linears}.values():
            scaled = scale_axis(_tensor(linear.weight), 1 if linear.transposed else 0, factors)
            scaled.name = linear.weight.name
            linear.weight.const_value = scaled

    def _insert(self, factors: Floats) -> None:
        """Multiply x by factors right before the first of its products."""
        x, graph, readers = self.activation, self.linears[0].node.graph, [linear.node for linear in self.linears]
        assert isinstance(graph, ir.Graph)
        constant = add_weight(graph, f"{x.name}.factors", ir.tensor(factors))
        node = ir.node("Mul", [x, constant], name=f"{constant.name}/Mul")
        scaled = node.outputs[0]
        scaled.name, scaled.type, scaled.shape = f"{constant.name}.output", x.type, x.shape
        graph.insert_before(next(one for one in graph if one in readers), node)
        for reader in readers:
            reader.replace_input_with(0, scaled)


def read_weight(linear: Linear) -> Floats:
    """[in, out]"""
    return read_matrix(_tensor(linear.weight), linear.name, transpose=linear.transposed)


def scale_axis(tensor: ir.TensorProtocol, axis: int, scale: Floats, offset: float = 0.0) -> RowTensor:
    """(w + offset) · scale − offset of a vector or matrix w, `scale` along one axis, computed when it is written."""
    read, shape = rows_of(tensor), concrete_shape(tensor)

    def rows(start: int, stop: int) -> Floats:
        part = scale[start:stop].reshape(-1, *[1] * (len(shape) - 1)) if axis == 0 else scale
        values = read(start, stop)
        return np.asarray((values + offset) * part - offset if offset else values * part, dtype=np.float32)

    return RowTensor(rows, ir.DataType.FLOAT, shape, name=tensor.name)


def _tensor(value: ir.Value) -> ir.TensorProtocol:
    assert value.const_value is not None
    return value.const_value

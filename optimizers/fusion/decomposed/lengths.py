"""How long a cache is with what is new: of its past and the new tokens, instead of the cache itself.

A fused attention returns its cache, so the mask that it reads must not ask that cache for its length.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import onnx_ir as ir

from onnxpress.graph.anatomy.layers import NORMS
from onnxpress.graph.matching import is_op, scalar
from onnxpress.graph.sizes import Size, size_of
from onnxpress.optimizers.fusion.decomposed.split_heads import SplitHeads


@dataclass
class Lengths:
    """Makes each length once for all layers whose dimensions have the same names."""

    graph: ir.Graph
    replaced: int = 0
    made: dict[tuple[object, ...], ir.Value] = field(default_factory=dict)

    def replace(self, heads: SplitHeads) -> None:
        """Compute what asks for the length of these keys or values from their parts."""
        for view in heads.views if heads.past is not None else ():
            for shape in [use.node for use in view.uses() if is_op(use.node, "Shape")]:
                for gather in [use.node for use in shape.outputs[0].uses() if is_op(use.node, "Gather")]:
                    if len(shape.attributes) or scalar(gather.inputs[1]) not in (2, -2):
                        continue
                    total = self.total(heads)
                    if gather.outputs[0].shape is not None and len(gather.outputs[0].shape) == 0:
                        total = self._add(("scalar", total), ir.node("Squeeze", [total]), 0)
                    gather.outputs[0].replace_all_uses_with(total)
                    self.replaced += 1

    def total(self, heads: SplitHeads) -> ir.Value:
        """int64 [1]"""
        new = self.size(heads.source, 1)
        if heads.past is None:
            return new
        past = self.size(heads.past, 2)
        return self._add(("total", past, new), ir.node("Add", [past, new]))

    def of_all(self, key: SplitHeads, query: SplitHeads) -> tuple[ir.Value, ir.Value]:
        """The lengths that GroupQueryAttention asks for: the place of the last token, int32 [batch], and how many there
        are with the past, int32 [1]. Every row is as long as the others: what is padding is in the mask."""
        total, batch = self.total(key), self.size(query.source, 0)
        count = self._add(("int32", total), ir.node("Cast", [total], {"to": ir.DataType.INT32}), 1, 32)
        one = self._add(("one",), ir.node("Constant", [], {"value": ir.tensor([1], dtype=ir.DataType.INT32)}), 1, 32)
        last = self._add(("last", count), ir.node("Sub", [count, one]), 1, 32)
        rows = self._add(("rows", last, batch), ir.node("Expand", [last, batch]), 1, 32)
        rows.shape = ir.Shape([None])
        return rows, count

    def size(self, value: ir.Value, axis: int) -> ir.Value:
        """int64 [1]: the size of `value` along an axis, not its last. Asked of an input of the graph where one has a
        dimension of this name, else of what the layer reads: what layers share depends on none."""
        assert value.shape is not None
        name = size_of(value, axis - len(value.shape))
        while name is None and (before := _before(value)) is not None:
            value = before
        asked, axis = next(self._named(name), (value, axis))
        return self._add(("size", asked, axis), ir.node("Shape", [asked], {"start": axis, "end": axis + 1}))

    def _named(self, name: Size | None) -> Iterator[tuple[ir.Value, int]]:
        for value in self.graph.inputs if isinstance(name, str) else ():
            for axis, size in enumerate(value.shape or ()):
                if isinstance(size, ir.SymbolicDim) and size.value == name:
                    yield value, axis

    def _add(self, key: tuple[object, ...], node: ir.Node, rank: int = 1, integer: int = 64) -> ir.Value:
        """The output of a node like this one, at the start of the graph: nodes are sorted afterwards."""
        if key not in self.made:
            self.graph.insert_before(self.graph[0], node)
            self.made[key] = node.outputs[0]
            node.outputs[0].type = ir.TensorType(ir.DataType.INT64 if integer == 64 else ir.DataType.INT32)
            node.outputs[0].shape = ir.Shape([1] * rank)
        return self.made[key]


def _before(value: ir.Value) -> ir.Value | None:
    """Find what a product, a bias, a norm or a split of features made `value` of: as many rows of as many tokens."""
    node = value.producer()
    if node is None or node.domain != "" or node.op_type not in {"Add", "MatMul", "Mul", "Split", *NORMS}:
        return None
    first = [one for one in node.inputs if one is not None and not one.is_initializer()]
    if len(first) != 1 or first[0].shape is None or len(first[0].shape) != len(value.shape or ()):
        return None
    if node.op_type in ("MatMul", "Split") and node.inputs[0] is not first[0]:
        return None
    last = node.attributes.get_int("axis", 0) in (-1, len(first[0].shape) - 1)
    return first[0] if node.op_type != "Split" or last else None

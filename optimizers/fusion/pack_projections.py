"""One product instead of several that share their input.

    MatMul(x, q) [+ bias], MatMul(x, k) [+ bias], MatMul(x, v) [+ bias]
    =>  MatMul(x, [q | k | v]) [+ bias] -> Split

Siblings are the products of one input whose weights belong to one module (`…self_attn.{q,k,v}_proj`,
`…mlp.{gate,up}_proj`), so that parallel attention and feed-forward blocks stay apart. GroupQueryAttention takes the
packed result as it is, with no Split, where queries, keys and values go nowhere else.

Measured, hidden size 576, onnxruntime 1.31 on x86 with AVX-512 VNNI, one thread, time over that of separate products:

    tokens                                   1        128      512
    q/k/v into GroupQueryAttention, fp32     0.93     0.98     0.99
    ... 4-bit and 8-bit blocks               0.86     0.91     0.95
    ... dynamic int8                         0.87     0.91     0.96
    q/k/v with a Split, fp32                 1.03     1.06     1.08
    gate/up with a Split, fp32               1.06     1.09     1.11
    ... blocks and dynamic int8              0.99     1.02     1.02

so that the copy of the Split costs what the larger product saves, and only attention is packed by default.

Weights that are to keep the codes that they had in a .gguf cannot be packed with others on another grid: `one_grid`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from onnxpress.errors import UsageError
from onnxpress.graph.conventions import MICROSOFT
from onnxpress.graph.edits import add_weight, drop_unused_weights
from onnxpress.graph.matching import is_op, only_reader, other_input, weight
from onnxpress.graph.report import Report
from onnxpress.graph.tensors import concatenate_tensors, concrete_shape
from onnxpress.optimizers.base import Context, Pass
from onnxpress.optimizers.quantization.keep_blocks import likely_grid


@dataclass(frozen=True)
class Projection:
    """A product with a constant weight, and the constant bias that may be added to it."""

    product: ir.Node
    add: ir.Node | None
    weight: ir.Value
    bias: ir.Value | None

    @property
    def output(self) -> ir.Value:
        return (self.add or self.product).outputs[0]

    @property
    def nodes(self) -> list[ir.Node]:
        return [self.product] if self.add is None else [self.product, self.add]

    @property
    def width(self) -> int:
        assert self.weight.const_value is not None
        return concrete_shape(self.weight.const_value)[1]

    @property
    def module(self) -> str:
        """Name of the module that holds the projection: `model.layers.0.self_attn`."""
        return _split_name(self.weight)[0]


class PackProjections(Pass):
    """Pack sibling products into one; weights are concatenated when they are written."""

    name: ClassVar[str] = "pack-projections"

    def __init__(self, which: str = "attention", one_grid: bool = False) -> None:
        """
        Args:
            which: products to pack: `attention`, those whose packed result GroupQueryAttention takes; `split`, the
                others, behind which a Split is put; `all`.
            one_grid: leave products alone whose weights would be kept in different formats by keep-blocks.
        """
        super().__init__()
        if which not in ("all", "attention", "split"):
            message = f"pack-projections: which={which!r} is none of all, attention, split."
            raise UsageError(message, hint="see onnxpress list passes pack-projections")
        self.which, self.one_grid = which, one_grid

    def apply(self, model: ir.Model, context: Context, report: Report) -> None:
        for graph in model.graphs():
            groups: dict[tuple[int, str], list[Projection]] = {}  # each in the order of the graph
            for node in graph:
                projection = _projection(node)
                if projection is not None:
                    groups.setdefault((id(node.inputs[0]), projection.module), []).append(projection)
            for siblings in groups.values():
                if len(siblings) > 1:
                    self._pack(graph, siblings, report)

    def _pack(self, graph: ir.Graph, siblings: list[Projection], report: Report) -> None:
        reason = _obstacle(siblings)
        if reason is not None:
            report.skip(reason)
            return
        first = siblings[0].product
        attention = _attention(siblings)
        if attention is None and self.which == "attention":
            report.skip("not the inputs of GroupQueryAttention")
            return
        if attention is not None and self.which == "split":
            report.skip("inputs of GroupQueryAttention")
            return
        if attention is not None:
            siblings = [next(s for s in siblings if s.output is value) for value in attention.inputs[:3]]
        if self.one_grid and len({likely_grid(s.weight) for s in siblings}) > 1:
            report.skip("weights on different grids")
            return
        packed, nodes = _packed_product(graph, siblings)
        old = [node for sibling in siblings for node in sibling.nodes]
        # Everything the packed product reads is known where the first of its parts was.
        graph.insert_before(first, nodes)
        if attention is not None:
            attention.replace_input_with(0, packed)
            attention.replace_input_with(1, None)
            attention.replace_input_with(2, None)
            report.match("packed attention")
        else:
            widths = ir.tensor(np.array([s.width for s in siblings], np.int64))
            split = ir.node(
                "Split",
                [packed, add_weight(graph, f"{packed.name}.widths", widths)],
                {"axis": -1},
                num_outputs=len(siblings),
            )
            graph.insert_after(nodes[-1], split)
            for sibling, part in zip(siblings, split.outputs, strict=True):
                ir.convenience.replace_nodes_and_values(graph, split, [], [], [sibling.output], [part])
            report.match("packed products")
        graph.remove(reversed(old), safe=True)
        drop_unused_weights(graph, [value for s in siblings for value in (s.weight, s.bias)])


def _projection(node: ir.Node) -> Projection | None:
    """The projection that `node` is the product of, if its weight is a constant matrix."""
    if not is_op(node, "MatMul"):
        return None
    value = node.inputs[1]
    tensor = weight(value)
    if tensor is None or len(tensor.shape) != 2:
        return None
    assert value is not None
    add = only_reader(node.outputs[0])
    if is_op(add, "Add"):
        assert add is not None
        bias = other_input(add, node.outputs[0])
        vector = weight(bias)
        if vector is not None and concrete_shape(vector) == (concrete_shape(tensor)[1],):
            return Projection(node, add, value, bias)
    return Projection(node, None, value, None)


def _obstacle(siblings: Sequence[Projection]) -> str | None:
    if any(len(s.weight.uses()) > 1 for s in siblings):
        return "weight is shared with another node"
    if len({(s.weight.dtype, concrete_shape(s.weight.const_value)[0]) for s in siblings if s.weight.const_value}) > 1:
        return "weights differ in type"
    if len({s.bias is None for s in siblings}) > 1:
        return "some have a bias and some have none"
    return None


def _attention(siblings: Sequence[Projection]) -> ir.Node | None:
    """The GroupQueryAttention whose query, key and value these are, if they are nothing else."""
    node = only_reader(siblings[0].output)
    if len(siblings) != 3 or node is None or not is_op(node, "GroupQueryAttention", MICROSOFT):
        return None
    if any(only_reader(s.output) is not node for s in siblings):
        return None
    return node if {id(value) for value in node.inputs[:3]} == {id(s.output) for s in siblings} else None


def _packed_product(graph: ir.Graph, siblings: Sequence[Projection]) -> tuple[ir.Value, list[ir.Node]]:
    """The packed result and the nodes that compute it."""
    name = _packed_name([s.weight for s in siblings])
    packed = add_weight(graph, name, concatenate_tensors([_tensor(s.weight) for s in siblings], axis=1))
    first = siblings[0].product
    product = ir.node("MatMul", [first.inputs[0], packed], name=f"{name.removesuffix('.weight')}.MatMul")
    nodes = [product]
    if siblings[0].bias is not None:
        biases = [s.bias for s in siblings if s.bias is not None]
        bias = add_weight(
            graph, _packed_name(biases), concatenate_tensors([_tensor(value) for value in biases], axis=0)
        )
        nodes.append(ir.node("Add", [product.outputs[0], bias], name=f"{name.removesuffix('.weight')}.Add"))
    shape = first.outputs[0].shape
    for node in nodes:
        result = node.outputs[0]
        result.name = f"{node.name}.output"
        result.type = first.outputs[0].type
        if shape is not None:
            result.shape = ir.Shape([*shape.dims[:-1], sum(s.width for s in siblings)])
    return nodes[-1].outputs[0], nodes


def _tensor(value: ir.Value) -> ir.TensorProtocol:
    assert value.const_value is not None
    return value.const_value


def _split_name(value: ir.Value) -> tuple[str, str, str]:
    """`model.layers.0.mlp`, `up_proj`, `.weight`; the last is empty in graphs whose weights have bare names."""
    stem, dot, kind = (value.name or "").rpartition(".")
    if dot and kind in ("weight", "bias"):
        parent, _, leaf = stem.rpartition(".")
        return parent, leaf, f".{kind}"
    return "", value.name or "", ""


def _packed_name(values: Sequence[ir.Value]) -> str:
    """`….q_proj.weight` and its siblings make `….qkv_proj.weight`; `gate_proj` and `up_proj` make `gate_up_proj`."""
    parts = [_split_name(value) for value in values]
    leaves = [leaf for _, leaf, _ in parts]
    ends = {leaf[leaf.rfind("_") :] if "_" in leaf else "" for leaf in leaves}
    suffix = ends.pop() if len(ends) == 1 else ""
    stems = [leaf.removesuffix(suffix) for leaf in leaves]
    joined = ("" if stems == ["q", "k", "v"] else "_").join(stems)
    parent, _, kind = parts[0]
    return f"{parent}.{joined}{suffix}{kind}" if parent else f"{joined}{suffix}{kind}"

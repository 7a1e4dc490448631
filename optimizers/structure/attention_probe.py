"""Copies of an attention beside it, for as long as it is looked at: as it was before an edit, or fed with other values.

Nodes of a probe are removed again; what stays of the graph never reads them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import onnx_ir as ir

from onnxpress.optimizers.linear import add_initializers
from onnxpress.optimizers.structure.editing import PAST
from onnxpress.optimizers.structure.head_sites import HeadSite
from onnxpress.tensors import concrete_shape


class Probe:
    """Nodes and initializers that stand in a graph for a while, after a node of it."""

    def __init__(self, site: HeadSite, purpose: str) -> None:
        graph = site.attention.node.graph
        assert isinstance(graph, ir.Graph)
        self.graph, self.site = graph, site
        self.nodes: list[ir.Node] = []
        self.weights: list[ir.Value] = []
        self.prefix = f"{site.block.title}.{site.attention.node.name}.{purpose}"

    def add(self, node: ir.Node) -> list[ir.Value]:
        """Put a node behind those before it, and the first behind the attention's output."""
        behind = self.nodes[-1] if self.nodes else self._last()
        for index, output in enumerate(node.outputs):
            output.name = f"{self.prefix}.{len(self.nodes)}.{index}"
        node.name = f"{self.prefix}.{len(self.nodes)}"
        self.graph.insert_after(behind, node)
        self.nodes.append(node)
        return list(node.outputs)

    def weight(self, tensor: ir.TensorProtocol) -> ir.Value:
        name = f"{self.prefix}.weight{len(self.weights)}"
        self.weights += add_initializers(
            self.graph, [name], [ir.LazyTensor(lambda: tensor, tensor.dtype, ir.Shape(concrete_shape(tensor)))]
        )
        return self.weights[-1]

    def join(self, values: Sequence[ir.Value]) -> str:
        """The name of these values side by side."""
        return str(self.add(ir.node("Concat", list(values), {"axis": -1}))[0].name)

    def copy(self, node: ir.Node, given: dict[ir.Value, ir.Value]) -> dict[ir.Value, ir.Value]:
        """A node again, reading `given` instead of what it reads, and no cache; its outputs by those of the node."""
        inputs = [
            None if value is None or PAST.fullmatch(str(value.name)) else given.get(value, value)
            for value in node.inputs
        ]
        twin = ir.Node(node.domain, node.op_type, inputs, list(node.attributes.values()), num_outputs=len(node.outputs))
        return dict(zip(node.outputs, self.add(twin), strict=True))

    def _last(self) -> ir.Node:
        node = self.site.output.output.producer()
        assert node is not None
        return node

    def remove(self) -> None:
        for node in reversed(self.nodes):
            self.graph.remove(node, safe=True)
        for value in self.weights:
            del self.graph.initializers[str(value.name)]
        self.nodes, self.weights = [], []


@contextmanager
def probe(site: HeadSite, purpose: str) -> Iterator[Probe]:
    """A probe that is removed afterwards; of those that stand at the same time, each has a purpose of its own."""
    one = Probe(site, purpose)
    try:
        yield one
    finally:
        one.remove()


def copy_attention(one: Probe) -> ir.Value:
    """The whole attention with the weights that it has by now: its output, whatever becomes of the graph."""
    site = one.site
    products = (site.query, site.key, site.value, site.output)
    owned = {value for product in products for value in (product.weight, product.bias) if value is not None}
    given: dict[ir.Value, ir.Value] = {}
    for node in _branch(site):
        for value in node.inputs:
            if value in owned and value not in given:
                assert value is not None
                assert value.const_value is not None
                given[value] = one.weight(value.const_value)
        given |= one.copy(node, given)
    return given[site.output.output]


def attended_states(one: Probe) -> list[ir.Value]:
    """What each head attends to of the hidden states themselves, instead of values made of them.

    [batch, length, heads · head_dim] each, for as many columns of the hidden states at a time as a value has; columns
    of zeros fill up the last.
    """
    site = one.site
    _, kv_heads, head_dim = site.sizes
    features = site.value.features[0]
    found = []
    for start in range(0, features, head_dim):
        columns = np.arange(start, min(start + head_dim, features))
        selection = np.zeros((features, kv_heads, head_dim), np.float32)
        selection[columns, :, columns - start] = 1
        weight = one.weight(ir.tensor(selection.reshape(features, -1)))
        (slab,) = one.add(ir.node("MatMul", [site.hidden, weight]))
        node = site.attention.node
        values = node.inputs[2]
        assert values is not None
        found.append(one.copy(node, {values: slab})[node.outputs[0]])
    return found


def _branch(site: HeadSite) -> list[ir.Node]:
    """The nodes from the hidden states to the attention's output, in an order in which they can run."""
    inside, found = set(site.block.nodes), set[ir.Node]()
    queue = [site.output.output]
    while queue:
        value = queue.pop()
        node = value.producer() if value is not site.hidden else None
        if node is None or node in found:
            continue
        weight = node.op_type == "Transpose" and node.inputs[0] is not None and node.inputs[0].is_initializer()
        if node in inside or weight:
            found.add(node)
            queue.extend(one for one in node.inputs if one is not None)
    graph = site.attention.node.graph
    assert graph is not None
    return [node for node in graph if node in found]

"""Attention over the hidden states themselves, for each head, instead of over values made of them.

Copies of the attention stand beside it for as long as they are looked at; what stays of the graph never reads them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from onnxpress.arrays import Indices
from onnxpress.graph.anatomy.editing import PAST
from onnxpress.graph.edits import add_initializers
from onnxpress.optimizers.fitting.targets import Regression
from onnxpress.optimizers.heads.sites import HeadSite


@contextmanager
def attended_states(site: HeadSite) -> Iterator[list[ir.Value]]:
    """[batch, length, heads · head_dim] each, for as many columns of the hidden states at a time as a value has;
    columns of zeros fill up the last. The nodes that compute them are removed afterwards."""
    graph, attention = site.attention.node.graph, site.attention.node
    assert isinstance(graph, ir.Graph)
    _, kv_heads, head_dim = site.sizes
    features = site.value.features[0]
    nodes: list[ir.Node] = []
    weights: list[ir.Value] = []
    copies = []
    try:
        for start in range(0, features, head_dim):
            prefix = f"{site.block.title}.{attention.name}.attended{start}"
            columns = np.arange(start, min(start + head_dim, features))
            selection = np.zeros((features, kv_heads, head_dim), np.float32)
            selection[columns, :, columns - start] = 1
            weights += add_initializers(graph, [f"{prefix}.weight"], [ir.tensor(selection.reshape(features, -1))])
            product = ir.node("MatMul", [site.hidden, weights[-1]])
            copy = _copy(attention, product.outputs[0])
            for node in (product, copy):
                node.name = f"{prefix}.{node.op_type}"
                for index, output in enumerate(node.outputs):
                    output.name = f"{node.name}.{index}"
                graph.insert_after(nodes[-1] if nodes else attention, node)
                nodes.append(node)
            copies.append(copy.outputs[0])
        joined = ir.node("Concat", copies, {"axis": -1})
        joined.name = joined.outputs[0].name = f"{site.block.title}.{attention.name}.attended"
        graph.insert_after(nodes[-1], joined)
        nodes.append(joined)
        yield [*copies, joined.outputs[0]]
    finally:
        for node in reversed(nodes):
            graph.remove(node, safe=True)
        for value in weights:
            del graph.initializers[str(value.name)]


def _copy(attention: ir.Node, values: ir.Value) -> ir.Node:
    """The attention with other values, and without a cache."""
    inputs = [None if one is None or PAST.fullmatch(str(one.name)) else one for one in attention.inputs]
    inputs[2] = values
    attributes = list(attention.attributes.values())
    return ir.Node(attention.domain, attention.op_type, inputs, attributes, num_outputs=len(attention.outputs))


class KeptHeads:
    """Hands a regression the rows [kept heads · hidden] of what all heads attend to, slab beside slab."""

    def __init__(self, site: HeadSite, kept: Indices, regression: Regression) -> None:
        heads, _, head_dim = site.sizes
        self.features = site.value.features[0]
        self.kept, self.shape = kept, (-(-self.features // head_dim), heads, head_dim)
        self.regression = regression

    def update(self, x: NDArray[np.float32], sample: int) -> None:
        attended = x.reshape(len(x), *self.shape)[:, :, self.kept]
        by_head = attended.transpose(0, 2, 1, 3).reshape(len(x), len(self.kept), -1)[:, :, : self.features]
        self.regression.update(by_head.reshape(len(x), -1), sample)

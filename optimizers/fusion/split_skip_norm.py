"""Operators that add a residual and normalise, as the two that they are: the inverse of `fuse-skip-norm`.

    com.microsoft Skip(Simplified)LayerNormalization(x, skip, scale[, shift][, bias])
    =>  Simplified/LayerNormalization(x + skip [+ bias], scale[, shift])

onnxruntime-genai's model builder writes the fused operators. Apart, they leave one tensor of hidden states between two
layers, so that a layer can be taken out, and on a CPU they are faster (see `fuse_skip_norm`).
"""

from __future__ import annotations

import onnx_ir as ir

from onnxpress.graph.conventions import MICROSOFT
from onnxpress.graph.report import Report

_PARTS = {
    "SkipLayerNormalization": ("LayerNormalization", 4),
    "SkipSimplifiedLayerNormalization": ("SimplifiedLayerNormalization", 3),
}
"""The normalisation in each, and which input is the bias of the sum; inputs from 2 up to it belong to the norm."""
SUM = 3
"""Output that is the sum."""


def split_skip_norms(model: ir.Model, report: Report) -> None:
    """Replace them all but those whose mean or deviation somebody reads."""
    for graph in model.graphs():
        for node in list(graph):
            if node.domain != MICROSOFT or node.op_type not in _PARTS:
                continue
            if any(output.uses() or output.is_graph_output() for output in node.outputs[1:SUM]):
                report.skip("mean or deviation of a skip normalisation is used")
                continue
            _split(graph, node)
            report.match("sum and normalisation")


def _split(graph: ir.Graph, node: ir.Node) -> None:
    norm_type, bias_index = _PARTS[node.op_type]
    x, skip, *scales = node.inputs[:bias_index]
    bias = node.inputs[bias_index] if len(node.inputs) > bias_index else None
    while scales and scales[-1] is None:
        scales.pop()
    sums = [ir.node("Add", [x, skip])]
    if bias is not None:
        sums.append(ir.node("Add", [sums[0].outputs[0], bias]))
    for one in sums:  # no name: a builder names the operator after the norm, which belongs to the layer that follows
        one.outputs[0].type, one.outputs[0].shape = node.outputs[0].type, node.outputs[0].shape
    total = sums[-1].outputs[0]
    attributes = {"axis": -1, "epsilon": node.attributes.get_float("epsilon", 1e-12), "stash_type": 1}
    norm = ir.node(norm_type, [total, *scales], attributes, name=node.name)
    norm.metadata_props.update(node.metadata_props)
    old, new = [node.outputs[0]], [norm.outputs[0]]
    if len(node.outputs) > SUM:
        old.append(node.outputs[SUM])
        new.append(total)
    ir.convenience.replace_nodes_and_values(graph, node, [node], [*sums, norm], old, new)

"""Names for weights that lost theirs when a graph was exported.

torch's exporters fold the transpose of a Linear into its weight, which then is called `onnx::MatMul_529` or `val_48`.
The module is still known, from the node's name (`/encoder/layer.0/attention/self/query/MatMul`) or from what torch
records with it. With the checkpoint's name, `encoder.layer.0.attention.self.query.weight`, patterns, the layers of a
graph, and reports mean the same whoever exported it.
"""

from __future__ import annotations

from collections.abc import Collection
from copy import copy

import onnx_ir as ir

from onnxpress.graph.anatomy.layers import module_of
from onnxpress.graph.conventions import layer_of
from onnxpress.graph.linear import match_linear
from onnxpress.graph.report import Report


def name_weights(graph: ir.Graph, report: Report) -> None:
    """Call the one matrix without a path for a name that the products of a module read `<module>.weight`.

    Left alone are modules with several such matrices, and names that are taken: which is which is not known.
    """
    by_name: dict[str, dict[ir.Value, None]] = {}
    stacks = {layer[0] for name in graph.initializers if (layer := layer_of(name)) is not None}
    for node in graph:
        linear = match_linear(node)
        module = _in_full(module_of(node), stacks)
        if linear is None or not module or "." in linear.name or linear.weight.is_graph_input():
            continue
        by_name.setdefault(f"{module}.weight", {})[linear.weight] = None
    owners = [value for values in by_name.values() for value in values]
    for name, values in by_name.items():
        value = next(iter(values))
        if len(values) > 1 or owners.count(value) > 1 or name in graph.initializers:
            report.skip("name of a weight is not clear", len(values))
            continue
        if value.const_value is not None:  # a tensor takes its value's name; other graphs may hold the same one
            value.const_value = copy(value.const_value)
        value.name = name
        report.match("names of weights")


def _in_full(module: str | None, stacks: Collection[str]) -> str | None:
    """The path of a module as the weights that kept their names have it: where a model calls `self.model.decoder` and
    not `self.model`, torch's older exporter leaves `model` out."""
    layer = layer_of(f"{module}.")
    if module is None or layer is None or layer[0] in stacks:
        return module
    longer = [stack for stack in stacks if stack.endswith(f".{layer[0]}")]
    return module if len(longer) != 1 else longer[0].removesuffix(layer[0]) + module

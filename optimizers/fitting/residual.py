"""The place where a product's output joins the residual stream."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from onnxpress.graph.anatomy import Block, Product
from onnxpress.graph.matching import only_reader, other_input

BIASES = {"SkipLayerNormalization": 4, "SkipSimplifiedLayerNormalization": 3}
"""Norms that add two streams first, and a bias: its input."""


@dataclass(frozen=True)
class Addition:
    """The terms that are added to a product's output."""

    terms: tuple[ir.Value, ...] = ()
    """The stream before; where attention and feed-forward are parallel, the other's output, too. None where the output
    is normalised before it joins."""
    bias: NDArray[np.float32] | None = None
    """Added by a norm that also adds the streams."""
    stream: tuple[ir.Value, ...] = ()
    """The stream after: one value, or the terms where a norm adds them."""


def addition_of(block: Block, product: Product) -> Addition:
    """Find what is added to the output of a product of a block."""
    known = {*block.inputs, *(output for node in block.nodes for output in node.outputs)}
    terms: list[ir.Value] = []
    value = product.output
    while (node := only_reader(value)) is not None:
        if node.op_type == "Add":
            other = other_input(node, value)
        elif node.op_type in BIASES and value in node.inputs[:2]:
            other = node.inputs[1] if value is node.inputs[0] else node.inputs[0]
        else:
            break
        if other is None or other.is_initializer() or other not in known:
            break
        terms.append(other)
        if node.op_type in BIASES:
            place = BIASES[node.op_type]
            bias = node.inputs[place] if len(node.inputs) > place else None
            tensor = bias.const_value if bias is not None else None
            array = None if tensor is None else np.asarray(tensor.numpy(), np.float32)
            return Addition(tuple(terms), array, (product.output, *terms))
        value = node.outputs[0]
    return Addition(tuple(terms), None, (value if value in known else product.output,))

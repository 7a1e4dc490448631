"""Feed-forward networks as channels between products: found, checked, cut to fewer channels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from onnxpress.arrays import Floats, Indices
from onnxpress.errors import UnsupportedModelError
from onnxpress.graph.anatomy import Block, FeedForward, Product
from onnxpress.graph.anatomy.editing import keep_weight, read_weight, require_editable
from onnxpress.graph.anatomy.roles import ACTIVATIONS
from onnxpress.graph.edits import add_constant
from onnxpress.graph.tensors import concrete_shape

ELEMENTWISE = ACTIVATIONS | {
    *(
        "Abs",
        "Add",
        "Cast",
        "Div",
        "Dropout",
        "Elu",
        "Exp",
        "HardSigmoid",
        "Identity",
        "LeakyRelu",
        "Max",
        "Min",
        "Mish",
    ),
    *("Mul", "Neg", "Pow", "Reciprocal", "Selu", "Softplus", "Sqrt", "Sub"),
}
"""What may lie between the products: nothing that mixes channels."""


@dataclass(frozen=True)
class Channels:
    """The channels of one feed-forward network."""

    block: Block
    feed_forward: FeedForward
    nodes: tuple[ir.Node, ...]
    """Between the products."""
    constants: tuple[ir.Value, ...]
    """Constants with a number for each channel that these nodes read."""
    split: ir.Node | None
    """What cuts the output of a packed `gate` and `up` into halves."""

    @property
    def count(self) -> int:
        return self.feed_forward.down.features[0]

    @property
    def down(self) -> Product:
        return self.feed_forward.down

    @property
    def into(self) -> tuple[Product, ...]:
        """What makes the channels: gate and up, up alone, or both packed in one."""
        return tuple(one for one in self.feed_forward.products if one is not self.down)

    def weights_into(self) -> list[Floats]:
        """[hidden, channels] each, read now."""
        return self.halves([read_weight(one) for one in self.into])

    def halves(self, weights: Sequence[Floats]) -> list[Floats]:
        """Matrices that have the shapes of `into`, packed ones cut into gate and up."""
        if self.split is None:
            return list(weights)
        return [half for weight in weights for half in np.split(weight, 2, axis=1)]

    def keep(self, kept: Indices) -> None:
        """Keep these channels, in this order, everywhere but in the weight of `down`."""
        outputs = kept if self.split is None else np.concatenate([kept, self.count + kept])
        for product in self.into:
            keep_weight(product, None, outputs)
        for value in self.constants:
            tensor = value.const_value
            assert tensor is not None
            array = np.ascontiguousarray(tensor.numpy()[..., kept])
            value.const_value, value.shape = ir.tensor(array, name=value.name), ir.Shape(array.shape)
        if self.split is not None and "num_outputs" not in self.split.attributes:
            graph = self.split.graph
            assert isinstance(graph, ir.Graph)
            sizes = np.array([len(kept), len(kept)], np.int64)
            self.split.replace_input_with(1, add_constant(graph, f"split.{len(kept)}.{len(kept)}", sizes))
        # The shapes that were inferred are wrong by now.
        for product in self.into:
            product.node.outputs[0].shape = product.output.shape = None
        for node in self.nodes:
            for output in node.outputs:
                output.shape = None


def channels_of(block: Block) -> Channels:
    """The channels of a block's feed-forward network, which must be float and plain.

    Raises UnsupportedModelError, naming what is in the way.
    """
    network = block.feed_forward
    assert network is not None
    for product in network.products:
        require_editable(product)
    packed = network.gate is network.up
    nodes, reached = _between(network)
    split = next((node for node in nodes if node.op_type == "Split"), None)
    if packed and not _halves(split, network):
        raise UnsupportedModelError(
            f"{network.up.name} packs gate and up, and is cut by something else than one Split into halves",
            hint="prune before packing projections",
        )
    missing = [product.name for product in network.products[:-1] if product not in reached]
    if missing:
        raise UnsupportedModelError(f"{missing[0]} does not lead to {network.down.name} channel by channel")
    constants: dict[ir.Value, None] = {}
    for node in nodes:
        if node.op_type not in ELEMENTWISE and node is not split:
            raise UnsupportedModelError(f"{node.op_type} lies between the products of {block.title}'s feed-forward")
        for output in node.outputs:
            if output.is_graph_output() or any(
                user not in nodes and user is not network.down.node for user, _ in output.uses()
            ):
                raise UnsupportedModelError(f"{output.name}, between the products of {block.title}, is read elsewhere")
        for value in node.inputs if node is not split else ():
            if value is not None and value.is_initializer() and value.const_value is not None:
                shape = concrete_shape(value.const_value)
                if np.prod(shape) == 1:
                    continue
                if shape[-1] != network.down.features[0] or np.prod(shape) != shape[-1] or len(value.uses()) > 1:
                    raise UnsupportedModelError(f"{value.name} {list(shape)} joins the channels of {block.title}")
                constants.setdefault(value)
    return Channels(block, network, tuple(nodes), tuple(constants), split if packed else None)


def _between(network: FeedForward) -> tuple[list[ir.Node], set[Product]]:
    """Nodes from the outputs of gate and up to the input of down, and which of these outputs were reached."""
    ends = {product.output: product for product in network.products if product is not network.down}
    nodes: dict[ir.Node, None] = {}
    reached: set[Product] = set()
    queue: list[ir.Value | None] = [network.down.activation]
    while queue:
        value = queue.pop()
        if value in ends:
            reached.add(ends[value])
            continue
        node = value.producer() if value is not None else None
        if value is None or value.is_initializer() or node in nodes:
            continue
        if node is None or node is network.down.node:
            raise UnsupportedModelError(f"{value.name} joins the channels that {network.down.name} reads")
        nodes.setdefault(node)
        queue += node.inputs
        if len(nodes) > 100:
            raise UnsupportedModelError(f"{network.down.name} reads more than what gate and up make")
    return list(nodes), reached


def _halves(split: ir.Node | None, network: FeedForward) -> bool:
    """Whether a Split cuts the packed product into gate and up of `down`'s size, along the last axis."""
    if split is None or split.inputs[0] is not network.up.output or len(split.outputs) != 2:
        return False
    axis = split.attributes["axis"].value if "axis" in split.attributes else 0
    rank = 3 if network.up.output.shape is None else len(network.up.output.shape)
    if axis not in (-1, rank - 1) or network.up.features[1] != 2 * network.down.features[0]:
        return False
    if "num_outputs" in split.attributes:
        return True
    sizes = split.inputs[1].const_value if len(split.inputs) > 1 and split.inputs[1] is not None else None
    return sizes is not None and sizes.numpy().tolist() == [network.down.features[0]] * 2

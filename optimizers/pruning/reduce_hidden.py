"""reduce-hidden: a narrower residual stream, by one rotation for all of it (SliceGPT, Ashkboos et al. 2024).

Gains of norms are folded into the products that read them, LayerNorm becomes an RMS norm, the stream is rotated to its
principal directions, and the last of these are deleted: from embeddings, from what reads the stream and from what
writes to it. No node is added, but for one small product before a head that is tied to the embeddings (see `tie`).
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from onnxpress.arrays import Doubles
from onnxpress.calibration.calibration import NO_SAMPLES, Calibration
from onnxpress.errors import UnsupportedModelError, UsageError
from onnxpress.graph.anatomy import Product, anatomy_of
from onnxpress.graph.anatomy.editing import read_weight, require_editable, set_bias, set_weight
from onnxpress.graph.edits import add_constant
from onnxpress.graph.linear import match_linear
from onnxpress.graph.report import Report
from onnxpress.optimizers.base import Context, Pass
from onnxpress.optimizers.fitting.statistics import Gram
from onnxpress.optimizers.pruning.maths.hidden import (
    center,
    lost_share,
    principal_directions,
    stream_scale,
    tied_mixture,
)
from onnxpress.optimizers.pruning.stream import Stream, find_stream, moments_of, rotate_rows


class ReduceHidden(Pass):
    """Rotate the residual stream and keep its first components."""

    name = "reduce-hidden"
    exact = False
    needs_anatomy = True
    needs_samples = True

    def __init__(
        self,
        width: int | None = None,
        ratio: float | None = None,
        method: Literal["pca"] = "pca",
        multiple_of: int = 32,
        tie: bool = True,
    ) -> None:
        """
        Args:
            width: components of the residual stream to keep; all of them only rotates, which is exact.
            ratio: instead of `width`, the share of components to keep, rounded to a multiple of `multiple_of`.
            method: how directions are chosen: `pca`, those in which the inputs of the products are largest, over all
                layers.
            multiple_of: a width that is given as a ratio is rounded to a whole number times this.
            tie: let a head that shares the table of the embeddings go on sharing it, for a product of width × width
                before it; without, the head becomes a weight of its own, and the model has no additional node.
        """
        if (width is None) == (ratio is None):
            raise ValueError("give either width or ratio")
        if width is not None and width < 1:
            raise ValueError(f"width must be positive, not {width}")
        if ratio is not None and not 0 < ratio <= 1:
            raise ValueError(f"ratio must lie between 0 and 1, not {ratio}")
        if method != "pca":
            raise ValueError(f"method must be pca, not {method}")
        if multiple_of < 1:
            raise ValueError(f"multiple_of must be positive, not {multiple_of}")
        self.width, self.ratio, self.multiple_of, self.tie = width, ratio, multiple_of, tie

    def apply(self, model: ir.Model, context: Context, report: Report) -> None:
        stream = find_stream(model)
        kept = self._kept(stream.width)
        head = anatomy_of(model).head
        tied = head is not None and head.weight in stream.tables
        _require_editable(stream, head if tied else None)
        if not context.calibration.fits(model):
            report.skip(NO_SAMPLES)
            return
        centered = any(node.op_type in ("LayerNormalization", "SkipLayerNormalization") for node in stream.norms)
        gain = _fold_norms(model.graph, stream, head if tied else None, centered, self.tie and not centered)
        covariance = _covariance(model, stream, context.calibration)
        directions = principal_directions(covariance, kept)
        mixed = gain is not None
        if mixed:
            assert head is not None
            assert gain is not None
            mixture = tied_mixture(moments_of(head.weight), gain, directions)
            _mix(model.graph, head, mixture / stream_scale(stream.width, kept) ** 2)  # the table is shorter, too
        _slice(stream, directions, head if mixed else None)
        report.measure("residual stream", lost_share(covariance, directions))
        report.match(f"hidden size {stream.width} to {kept}", len(stream.norms))
        if tied:
            report.match("head mixes before its tied table" if mixed else "head is a weight of its own now")

    def _kept(self, width: int) -> int:
        if self.width is not None:
            kept = self.width
        else:
            assert self.ratio is not None
            kept = max(1, round(width * self.ratio / self.multiple_of)) * self.multiple_of
        if kept > width:
            raise UsageError(f"the hidden size is {width}: {kept} is more", hint=f"give at most {width}")
        return kept


def _covariance(model: ir.Model, stream: Stream, calibration: Calibration) -> Doubles:
    """Mean over layers of E[x xᵀ] of what norms without gain make [width, width]."""
    gram = Gram(stream.width, "residual stream")
    calibration.observe(model, {str(node.outputs[0].name): [gram] for node in stream.norms})
    return gram.matrix()


def _past_transpose(node: ir.Node) -> list[ir.Node]:
    """The readers of a table: a node, or those behind a Transpose."""
    return [user for user, _ in node.outputs[0].uses()] if node.op_type == "Transpose" else [node]


def _require_editable(stream: Stream, tied_head: Product | None) -> None:
    """Refuse before anything is edited."""
    products = [*stream.writers.values(), *(one for readers in stream.norms.values() for one in readers)]
    for product in products:
        if tied_head is None or product.node is not tied_head.node:
            require_editable(product)
    for table in stream.tables:
        others = {reader for node, _ in table.uses() if node.op_type != "Gather" for reader in _past_transpose(node)}
        linear = None if tied_head is None else match_linear(tied_head.node)
        if others - ({tied_head.node} if tied_head is not None else set()) or (linear and not linear.transposed):
            raise UnsupportedModelError(f"{table.name} is read by more than an embedding and the head")
    kinds = {"Simplified" in node.op_type or node.op_type.startswith("RMS") for node in stream.norms}
    if len(kinds) > 1:
        raise UnsupportedModelError("the residual stream has both LayerNorm and RMS norms")
    for node in stream.norms:
        skip = node.op_type.startswith("Skip")
        bias = node.inputs[-1] if skip and len(node.inputs) > (3 if True in kinds else 4) else None
        if bias is not None:
            raise UnsupportedModelError(f"{node.name} adds a bias to the residual stream", hint="run clean-up first")


def _fold_norms(
    graph: ir.Graph, stream: Stream, tied_head: Product | None, centered: bool, tie: bool
) -> NDArray[np.floating] | None:
    """Move gains and offsets of norms into their readers; the gain that a tied head still needs is returned."""
    left = None
    for node, readers in stream.norms.items():
        index = 2 if node.op_type.startswith("Skip") else 1
        gain = _constant(node.inputs[index])
        offset = _constant(node.inputs[index + 1]) if centered and len(node.inputs) > index + 1 else None
        for product in readers:
            if tied_head is not None and product.node is tied_head.node:
                if tie:
                    left = gain
                    continue
                product = _untie(graph, product)
                readers[readers.index(next(one for one in readers if one.node is product.node))] = product
            weight = read_weight(product)
            if offset is not None:
                old = 0.0 if product.bias is None else _constant(product.bias)
                set_bias(product, old + offset.astype(np.float64) @ weight)
            set_weight(product, (gain[:, None] * weight).astype(np.float32))
        _plain_norm(graph, node, len(gain))
    if centered:
        identity = np.eye(stream.width)
        _write_through(stream, np.asarray(center(identity)))
        for node in list(stream.norms):
            _rms_norm(node, stream)
    return left


def _untie(graph: ir.Graph, head: Product) -> Product:
    """Give a head a copy of the table as a weight of its own."""
    tensor = head.weight.const_value
    assert tensor is not None
    own = add_constant(graph, "lm_head.untied.weight", np.array(tensor.numpy(), np.float32))
    source = head.node.inputs[1]
    assert source is not None
    transpose = source.producer()
    if transpose is None:
        head.node.replace_input_with(1, own)
    else:
        copy = ir.node("Transpose", [own], attributes={"perm": [1, 0]})
        graph.insert_before(head.node, copy)
        head.node.replace_input_with(1, copy.outputs[0])
        if not source.uses():
            graph.remove(transpose, safe=True)
    return Product(head.node, head.activation, own, head.features, head.bias, head.output)


def _plain_norm(graph: ir.Graph, node: ir.Node, size: int) -> None:
    """Give a norm `size` gains of 1."""
    skip = node.op_type.startswith("Skip")
    index = 2 if skip else 1
    old = node.inputs[index]
    assert old is not None
    constant = add_constant(
        graph,
        f"{old.name}.folded" if not str(old.name).endswith(".folded") else str(old.name),
        np.ones(size, np.float32),
    )
    constant.const_value = ir.tensor(np.ones(size, np.float32), name=constant.name)
    constant.shape = ir.Shape([size])
    node.replace_input_with(index, constant)
    if "epsilon" not in node.attributes:
        node.attributes["epsilon"] = ir.AttrFloat32("epsilon", 1e-12 if skip else 1e-5)  # the operators' defaults
    if old is not constant and not old.uses() and old.name in graph.initializers:
        del graph.initializers[str(old.name)]


def _rms_norm(node: ir.Node, stream: Stream) -> None:
    """LayerNormalization of a stream without mean, as the RMS norm that it is."""
    graph = node.graph
    assert isinstance(graph, ir.Graph)
    skip = node.op_type.startswith("Skip")
    offset = node.inputs[3 if skip else 2] if len(node.inputs) > (3 if skip else 2) else None
    op_type = "SkipSimplifiedLayerNormalization" if skip else "SimplifiedLayerNormalization"
    attributes = [node.attributes["epsilon"]]
    if not skip:
        attributes.append(ir.AttrInt64("axis", -1))
    new = ir.Node(
        node.domain,
        op_type,
        node.inputs[: 3 if skip else 2],
        attributes,
        outputs=None,
        num_outputs=len(node.outputs),
        name=node.name,
    )
    for before, after in zip(node.outputs, new.outputs, strict=True):
        after.name, after.shape, after.type = before.name, before.shape, before.type
    graph.insert_before(node, new)
    for before, after in zip(node.outputs, new.outputs, strict=True):
        ir.convenience.replace_all_uses_with(before, after, replace_graph_outputs=True)
        before.name = None
    stream.norms[new] = stream.norms.pop(node)
    graph.remove(node, safe=True)
    if offset is not None and not offset.uses() and offset.name in graph.initializers:
        del graph.initializers[str(offset.name)]


def _write_through(stream: Stream, matrix: Doubles) -> None:
    """Multiply all that writes into the stream by a matrix [width, new width]."""
    for table in stream.tables:
        rotate_rows(table, matrix)
    for product in stream.writers.values():
        set_weight(product, (read_weight(product) @ matrix).astype(np.float32))
        if product.bias is not None:
            set_bias(product, _constant(product.bias) @ matrix)


def _slice(stream: Stream, directions: Doubles, mixed_head: Product | None) -> None:
    """Rotate all that touches the stream, keeping these directions [width, kept]."""
    width, kept = directions.shape
    scale = stream_scale(width, kept)
    _write_through(stream, scale * directions)
    for node, readers in stream.norms.items():
        for product in readers:
            if mixed_head is None or product.node is not mixed_head.node:
                set_weight(product, (directions.T @ read_weight(product) / scale).astype(np.float32))
        graph = node.graph
        assert isinstance(graph, ir.Graph)
        _plain_norm(graph, node, kept)
        for output in node.outputs:
            _narrow(output, width, kept)
    for value in stream.values:
        _narrow(value, width, kept)
    for product in stream.writers.values():
        _narrow(product.node.outputs[0], width, kept)


def _narrow(value: ir.Value, width: int, kept: int) -> None:
    if value.shape is not None and len(value.shape) and value.shape[-1] == width:
        value.shape = ir.Shape([*list(value.shape)[:-1], kept])


def _mix(graph: ir.Graph, head: Product, mixture: Doubles) -> None:
    """A small product before the head."""
    constant = add_constant(graph, "lm_head.mixture.weight", mixture.astype(np.float32))
    mixed = ir.node("MatMul", [head.activation, constant])
    value = mixed.outputs[0]
    value.name, value.type = "lm_head.mixture", head.activation.type
    graph.insert_before(head.node, mixed)
    head.node.replace_input_with(0, value)


def _constant(value: ir.Value | None) -> NDArray[np.floating]:
    if value is None or value.const_value is None:
        raise UnsupportedModelError(f"{value.name if value else 'an input'} of a norm is no constant")
    return np.asarray(value.const_value.numpy())

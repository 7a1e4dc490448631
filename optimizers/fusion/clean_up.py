"""Remove what changes nothing: dead nodes, copies, duplicates, and arithmetic on small constants.

Built from onnx_ir's and onnxscript's own passes, in an order in which one makes work for the next. None of them touches
the values of a large weight; a transposed one, as exporters leave in front of a product, becomes a lazily transposed
weight.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes import common
from onnxscript.optimizer import _constant_folding

from onnxpress.graph.edits import add_weight, drop_unused_weights
from onnxpress.graph.matching import constant, only_reader, producer, same_shape, scalar, weight
from onnxpress.graph.report import Report
from onnxpress.graph.tensors import FileTensor, concrete_shape
from onnxpress.optimizers.base import Context, Pass

SMALL = 1024
"""Elements up to which a constant is read or computed here."""
DUPLICATE = 16
"""Elements up to which equal constants become one: shapes and scalars, but not biases, which would lose their names."""


class CleanUp(Pass):
    """Dead code, identities, duplicates, common subexpressions, constants.

    Does not modify the model's signature.
    """

    name: ClassVar[str] = "clean-up"

    def __init__(self, fold_limit: int = SMALL) -> None:
        """
        Args:
            fold_limit: arithmetic on constants is done beforehand where no input and no result has more elements.
        """
        super().__init__()
        self.fold_limit = fold_limit

    def apply(self, model: ir.Model, context: Context, report: Report) -> None:
        common.InlinePass()(model)
        for graph in model.graphs():
            _share_weights(graph, report)
            _transpose_weights(graph, report)
            _drop_reshapes(graph, report)
            _fold_sizes(graph, report)
        steps: list[tuple[str, Callable[[ir.Model], object]]] = [
            ("folded constants", self._fold),
            ("identities", _drop_identities),
            ("lifted constants", common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)),
            ("duplicate constants", common.DeduplicateInitializersPass(size_limit=DUPLICATE)),
            ("common subexpressions", common.CommonSubexpressionEliminationPass()),
            ("dead code", common.RemoveUnusedNodesPass()),
        ]
        changed = True
        while changed:
            changed = False
            for what, step in steps:
                before = _size(model)
                step(model)
                nodes, weights = (old - new for old, new in zip(before, _size(model), strict=True))
                removed = nodes if what in ("folded constants", "lifted constants") else nodes + weights
                if removed > 0:
                    report.match(what, removed)
                    changed = True
        common.RemoveUnusedFunctionsPass()(model)  # type: ignore[no-untyped-call]
        common.RemoveUnusedOpsetsPass()(model)

    def _fold(self, model: ir.Model) -> None:
        _constant_folding.FoldConstantsPass(
            shape_inference=False,
            input_size_limit=self.fold_limit,
            output_size_limit=self.fold_limit,
            should_fold=self._should_fold,
        )(model)

    def _should_fold(self, node: ir.Node) -> bool | None:
        """Never where an input is large, not even the transposes that onnxscript would always fold."""
        for value in node.inputs:
            if value is not None and value.const_value is not None and value.const_value.size > self.fold_limit:
                return False
        return None


def _drop_identities(model: ir.Model) -> None:
    """Nodes that hand on what they read. One that makes an output of its graph stays unless another node of that graph
    makes what it reads: a branch may return a value from outside only through a node of its own."""
    for graph in model.graphs():
        for node in list(graph):
            if node.op_type != "Identity" or node.domain or node.inputs[0] is None:
                continue
            source, output = node.inputs[0], node.outputs[0]
            if output.is_graph_output():
                maker = source.producer()
                if source.is_graph_output() or maker is None or maker.graph is not graph:
                    continue
                source.name, source.shape, source.type = output.name, output.shape, output.type
            elif source.shape is None:
                source.shape = output.shape
            ir.convenience.replace_all_uses_with(output, source, replace_graph_outputs=True)
            graph.remove(node, safe=True)


def _size(model: ir.Model) -> tuple[int, int]:
    """Nodes and initializers, those of subgraphs included."""
    graphs = list(model.graphs())
    return sum(len(graph) for graph in graphs), sum(len(graph.initializers) for graph in graphs)


def _share_weights(graph: ir.Graph, report: Report) -> None:
    """Initializers that are the same tensor, or the same bytes of the same file, become one."""
    seen: dict[object, ir.Value] = {}
    for value in list(graph.initializers.values()):
        tensor = weight(value)
        if tensor is None:
            continue
        same: object = id(tensor)
        if isinstance(tensor, FileTensor):
            same = (tensor.path, tensor.offset, tensor.dtype, concrete_shape(tensor))
        kept = seen.setdefault(same, value)
        if kept is not value:
            value.replace_all_uses_with(kept)
            drop_unused_weights(graph, [value])
            report.match("duplicate weights")


def _transpose_weights(graph: ir.Graph, report: Report) -> None:
    """Transpose(weight) becomes a weight that is transposed when it is written.

    A weight that is also read as it is, such as an embedding tied to the head, is left: it would be stored twice.
    """
    for node in list(graph):
        value = node.inputs[0] if node.op_type == "Transpose" and not node.domain else None
        tensor = weight(value)
        if value is None or tensor is None or tensor.size <= SMALL or node.outputs[0].is_graph_output():
            continue
        if only_reader(value) is not node:
            report.skip("transposed weight is read elsewhere too")
            continue
        order = tuple(node.attributes.get_ints("perm", tuple(reversed(range(len(tensor.shape))))))
        shape = ir.Shape(concrete_shape(tensor)[axis] for axis in order)
        value.const_value = ir.LazyTensor(_transposer(tensor, order), tensor.dtype, shape, name=value.name)
        value.shape = shape
        node.outputs[0].replace_all_uses_with(value)
        graph.remove(node, safe=True)
        report.match("transposed weights")


def _transposer(tensor: ir.TensorProtocol, order: tuple[int, ...]) -> Callable[[], ir.TensorProtocol]:
    return lambda: ir.Tensor(np.transpose(tensor.numpy(), order), dtype=tensor.dtype)


def _drop_reshapes(graph: ir.Graph, report: Report) -> None:
    """A Reshape to the shape that its input, or the input of the Reshape before it, already has."""
    for node in list(graph):
        if node.op_type != "Reshape" or node.domain or node.outputs[0].is_graph_output():
            continue
        before = producer(node.inputs[0], "Reshape")
        for source in [node.inputs[0], before.inputs[0] if before is not None else None]:
            if source is not None and same_shape(source, node.outputs[0]):
                node.outputs[0].replace_all_uses_with(source)
                graph.remove(node, safe=True)
                report.match("reshapes")
                break


def _fold_sizes(graph: ir.Graph, report: Report) -> None:
    """Dimensions that are read from a shape, and known: Gather(Shape(x), i) and Slice(Shape(x), start, end)."""
    for node in list(graph):
        if node.op_type not in ("Gather", "Slice") or node.domain or node.outputs[0].is_graph_output():
            continue
        shape = producer(node.inputs[0], "Shape")
        if shape is None or shape.inputs[0] is None or shape.inputs[0].shape is None:
            continue
        dimensions = list(shape.inputs[0].shape)[slice(shape.attributes.get_int("start", 0), _end(shape))]
        sizes = (_gathered if node.op_type == "Gather" else _sliced)(node, np.array(dimensions, dtype=object))
        if sizes is not None and all(isinstance(size, int) for size in sizes.ravel()):
            tensor = ir.tensor(sizes.astype(np.int64))
            node.outputs[0].replace_all_uses_with(add_weight(graph, f"{node.outputs[0].name}.size", tensor))
            graph.remove(node, safe=True)
            report.match("known sizes")


def _gathered(node: ir.Node, dimensions: NDArray[np.object_]) -> NDArray[np.object_] | None:
    indices, index = constant(node.inputs[1]), scalar(node.inputs[1])
    if indices is None or index is None or not -len(dimensions) <= index < len(dimensions):
        return None
    return np.full(concrete_shape(indices), dimensions[int(index)], dtype=object)


def _sliced(node: ir.Node, dimensions: NDArray[np.object_]) -> NDArray[np.object_] | None:
    start, end = scalar(node.inputs[1]), scalar(node.inputs[2])
    step = scalar(node.inputs[4]) if len(node.inputs) > 4 else 1
    if start is None or end is None or step != 1:
        return None
    return dimensions[int(start) : int(end)]


def _end(shape: ir.Node) -> int | None:
    end = shape.attributes.get("end")
    return end.as_int() if end is not None else None

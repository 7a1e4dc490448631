"""Edits that structural passes share: other weights for a product, other numbers of heads for an attention."""

from __future__ import annotations

import re

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from onnxpress.arrays import Floats
from onnxpress.errors import UnsupportedModelError
from onnxpress.graph.anatomy import Anatomy, Attention, Block, Product
from onnxpress.graph.anatomy.roles import FUSED, NOT_FUSED
from onnxpress.graph.edits import add_constant
from onnxpress.graph.linear import is_shared, match_linear, read_rows
from onnxpress.graph.tensors import RowTensor, concrete_shape, rows_of

Tensor = ir.TensorProtocol | NDArray[np.floating]

QK_NORM = "QK-norm"
"""The name in errors of a norm of queries and keys, across which heads cannot be mixed, whoever exported the graph."""
QK_NORM_HINT = "prune-ffn, reduce-depth and low-rank take models with QK-norm"
PAST = re.compile(r"past_key_values\.\d+\.(key|value)")


def require_editable(product: Product) -> None:
    """Raise UnsupportedModelError, with the reason and a hint, unless a product's weight is float and its own."""
    linear = match_linear(product.node)
    tensor = product.weight.const_value
    if linear is None or tensor is None or tensor.dtype != ir.DataType.FLOAT or len(tensor.shape) != 2:
        raise UnsupportedModelError(
            f"{product.name} is not float32 any more: structure comes before quantization",
            hint="put structural passes before quantizing and packing ones",
        )
    if is_shared(linear, [linear]):
        raise UnsupportedModelError(f"{product.name} is shared: its other readers would not fit any more")


def read_weight(product: Product) -> Floats:
    """W as [in, out], read now."""
    linear = match_linear(product.node)
    assert linear is not None
    return read_rows(linear).T


def set_weight(product: Product, weight: Tensor) -> None:
    """Put W [in, out] in a product's initializer, which keeps its name, and its layout where that is [out, in]."""
    linear = match_linear(product.node)
    assert linear is not None
    if isinstance(weight, np.ndarray):
        stored = np.ascontiguousarray(weight.T if linear.transposed else weight, dtype=np.float32)
        tensor: ir.TensorProtocol = ir.tensor(stored)
    else:
        tensor = _transposed(weight) if linear.transposed else weight
    _put(product.weight, tensor)
    transpose = product.node.inputs[1].producer() if product.node.inputs[1] is not None else None
    if transpose is not None:
        transpose.outputs[0].shape = None


def keep_weight(product: Product, inputs: NDArray[np.int64] | None, outputs: NDArray[np.int64] | None) -> None:
    """Keep these input and output features of a product, in this order, and those of its bias; None keeps all.

    Nothing is read until the graph is written.
    """
    linear = match_linear(product.node)
    assert linear is not None
    tensor = product.weight.const_value
    assert tensor is not None
    rows, columns = (outputs, inputs) if linear.transposed else (inputs, outputs)
    _put(product.weight, select_part(tensor, rows, columns))
    if outputs is not None and product.bias is not None:
        bias = product.bias.const_value
        assert bias is not None
        _put(product.bias, ir.tensor(np.ascontiguousarray(bias.numpy()[outputs])))


def columns_of(product: Product, outputs: NDArray[np.int64] | None) -> tuple[ir.TensorProtocol, Floats | None]:
    """W [in, these outputs], read when it is needed, and b of them, None where there is none; None takes all."""
    linear = match_linear(product.node)
    tensor = product.weight.const_value
    assert linear is not None
    assert tensor is not None
    weight: ir.TensorProtocol = (
        _transposed(select_part(tensor, outputs, None)) if linear.transposed else select_part(tensor, None, outputs)
    )
    if product.bias is None:
        return weight, None
    assert product.bias.const_value is not None
    bias = np.asarray(product.bias.const_value.numpy(), np.float32)
    return weight, bias if outputs is None else bias[outputs]


def set_bias(product: Product, bias: NDArray[np.floating]) -> None:
    """Give a product this bias [out]: in its own initializer, or in an Add behind it where it had none."""
    values = np.ascontiguousarray(bias, dtype=np.float32)
    if product.bias is not None:
        if len(product.bias.uses()) > 1:
            raise UnsupportedModelError(f"the bias of {product.name} is shared")
        _put(product.bias, ir.tensor(values))
        return
    graph, output = product.node.graph, product.node.outputs[0]
    assert isinstance(graph, ir.Graph)
    constant = add_constant(graph, re.sub(r"(\.weight)?$", ".bias", product.name, count=1), values)
    add = ir.node("Add", [None, constant])
    total = add.outputs[0]
    total.type, total.shape = output.type, output.shape
    ir.convenience.replace_all_uses_with(output, total, replace_graph_outputs=True)
    add.replace_input_with(0, output)
    total.name, output.name = output.name, f"{output.name}/product"
    graph.insert_after(product.node, add)


def set_heads(attention: Attention, heads: int, kv_heads: int, head_dim: int) -> None:
    """Tell a fused attention, and the cache that it reads and writes, how many heads there are by now.

    The scale of the scores stays what it was: it is made explicit where it followed from head_dim.
    """
    node = attention.node
    if node.op_type not in FUSED:
        raise decomposed_attention_error(f"attention {node.name!r}", node)
    if node.op_type == "MultiHeadAttention" and attention.kv_heads not in (None, attention.heads):
        raise UnsupportedModelError(
            f"attention {node.name!r} reads {attention.kv_heads} heads of keys that are repeated for {attention.heads} "
            "outside of it",
            hint="export the checkpoint with onnxpress, or with the genai builder, which fuse groups of heads",
        )
    if "scale" not in node.attributes and attention.head_dim is not None:
        node.attributes["scale"] = ir.AttrFloat32("scale", float(attention.head_dim**-0.5))
    node.attributes[FUSED[node.op_type]] = ir.AttrInt64(FUSED[node.op_type], heads)
    for name in ("kv_num_heads", "num_key_value_heads"):
        if name in node.attributes:
            node.attributes[name] = ir.AttrInt64(name, kv_heads)
    for value in (*node.inputs, *node.outputs):
        if value is None or value.shape is None or len(value.shape) != 4:
            continue
        if PAST.fullmatch(str(value.name)) or value in node.outputs[1:]:
            value.shape = ir.Shape([value.shape[0], kv_heads, value.shape[2], head_dim])


def decomposed_attention_error(where: str, node: ir.Node) -> UnsupportedModelError:
    """The error for an attention that is no operator of its own, with what kept fuse-foreign from making it one."""
    reason = node.metadata_props.get(NOT_FUSED)
    if reason is None:
        return UnsupportedModelError(
            f"{where}: attention is spelled out as {node.op_type}", hint="fuse it first: --pass fuse-foreign"
        )
    return UnsupportedModelError(
        f"{where}: attention is spelled out and could not be fused: {reason}",
        hint=QK_NORM_HINT if QK_NORM in reason else "export the checkpoint with onnxpress",
    )


def forget_shapes(anatomy: Anatomy) -> None:
    """Remove the inferred shapes of what blocks compute inside, which edits have made wrong."""
    for block in anatomy.blocks:
        forget_block_shapes(block)


def forget_block_shapes(block: Block) -> None:
    """Likewise for one block."""
    for node in block.nodes:
        for output in node.outputs:
            if not output.is_graph_output() and output not in block.outputs:
                output.shape = None


def select_part(
    tensor: ir.TensorProtocol, rows: NDArray[np.int64] | None, columns: NDArray[np.int64] | None
) -> RowTensor:
    """Rows and columns of a matrix, read when they are written; None takes all."""
    shape = concrete_shape(tensor)
    read = rows_of(tensor)
    picked = np.arange(shape[0]) if rows is None else np.asarray(rows, np.int64)

    def slab(start: int, stop: int) -> NDArray[np.generic]:
        wanted = picked[start:stop]
        if not len(wanted):
            return np.asarray(read(0, 0))[:, : shape[1] if columns is None else len(columns)]
        low, high = int(wanted.min()), int(wanted.max()) + 1
        found = np.asarray(read(low, high))[wanted - low]
        return found if columns is None else found[:, columns]

    width = shape[1] if columns is None else len(columns)
    return RowTensor(slab, tensor.dtype, (len(picked), width), name=tensor.name)


def _transposed(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    shape = concrete_shape(tensor)
    return RowTensor(
        lambda start, stop: np.ascontiguousarray(tensor.numpy()[:, start:stop].T), tensor.dtype, shape[::-1]
    )


def _put(value: ir.Value, tensor: ir.TensorProtocol) -> None:
    tensor.name = value.name
    value.const_value, value.shape = tensor, ir.Shape(concrete_shape(tensor))
    value.type = ir.TensorType(tensor.dtype)

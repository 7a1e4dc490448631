"""Masks of a graph's weights: which can have one, put on, so that weights become zero, and found again."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from onnxpress.errors import BadInputError, UnsupportedModelError
from onnxpress.graph.anatomy import Product, anatomy_of, find_products
from onnxpress.graph.linear import Linear, match_linear, read_rows, selected
from onnxpress.graph.report import Report
from onnxpress.graph.tensors import RowTensor, concrete_shape, rows_of
from onnxpress.optimizers.pruning.mask_files import PackedMask


def maskable(
    model: ir.Model,
    report: Report,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    min_features: int = 0,
    *,
    once: bool = False,
) -> dict[str, Linear]:
    """Products of the transformer's blocks, one for each weight, by its name, in the order in which they run.

    The head is among them where `include` fits its name. A weight that an embedding or anything but products reads, or
    with `once` several products, is left alone.

    Raises UnsupportedModelError for a weight that is not float32, or a graph without blocks.
    """
    anatomy = anatomy_of(model)
    products = [product for block in anatomy.blocks for product in block.products]
    if anatomy.head is not None and include:
        products.append(anatomy.head)
    nodes = {product.node for product in products}
    linears: dict[str, Linear] = {}
    for product in products:
        if not selected(product.name, include, exclude):
            report.skip("excluded by name")
        elif min(product.features) < min_features:
            report.skip("small")
        elif product.name not in linears:
            linear = _float_linear(product)
            readers = _readers(linear.weight)
            if not readers <= nodes:
                report.skip("the weight is read by others too, such as an embedding")
            elif once and len(readers) > 1:
                report.skip("the weight serves several products, and would be fitted to one of them")
            else:
                linears[product.name] = linear
    return linears


def _float_linear(product: Product) -> Linear:
    linear = match_linear(product.node)
    tensor = product.weight.const_value
    if linear is None or tensor is None or tensor.dtype != ir.DataType.FLOAT:
        raise UnsupportedModelError(
            f"{product.name} is not float32 any more: prune-weights comes before quantization",
            hint="put prune-weights before quantizing passes, or leave the weight out with exclude",
        )
    return linear


def _readers(weight: ir.Value) -> set[ir.Node]:
    """The nodes that read a weight, also through a Transpose."""
    found: set[ir.Node] = set()
    for node in weight.consumers():
        found |= set(node.outputs[0].consumers()) if node.op_type == "Transpose" else {node}
    return found


def put(linear: Linear, tensor: ir.TensorProtocol) -> None:
    """Give a product another weight of the same shape, in the stored layout."""
    tensor.name = linear.weight.name
    linear.weight.const_value = tensor


def put_mask(linear: Linear, mask: PackedMask) -> bool:
    """Put a mask of the stored layout on a weight; whether that changes anything."""
    tensor = linear.weight.const_value
    assert tensor is not None
    result = masked(tensor, mask)
    nonzero = np.asarray(tensor.numpy()) != 0
    if not nonzero[~mask.rows(0, mask.shape[0])].any():
        return False
    put(linear, result)
    return True


def share_of_zeros(linear: Linear) -> float:
    """The share of a weight that is zero."""
    return float(np.mean(read_rows(linear) == 0))


def masked(tensor: ir.TensorProtocol, mask: PackedMask) -> RowTensor:
    """A weight with zeros where a mask of its shape has them, read when it is written; held are the bits alone.

    BadInputError where the shapes differ.
    """
    if concrete_shape(tensor) != mask.shape:
        raise BadInputError(
            f"the mask of {tensor.name} has the shape {list(mask.shape)}, its weight {list(concrete_shape(tensor))}",
            hint="the masks belong to another model, or its weights were packed or cut since",
        )
    read = rows_of(tensor)

    def rows(start: int, stop: int) -> NDArray[np.generic]:
        found = np.asarray(read(start, stop))
        return np.where(mask.rows(start, stop), found, found.dtype.type(0))

    return RowTensor(rows, tensor.dtype, mask.shape, name=tensor.name)


def extract_masks(models: Iterable[ir.Model]) -> dict[str, PackedMask]:
    """The masks of all float products that have zeros, by the names of their weights.

    BadInputError where two graphs have a weight of one name with other zeros.
    """
    found: dict[str, PackedMask] = {}
    for model in models:
        for product in find_products(model.graph):
            tensor = product.weight.const_value
            if match_linear(product.node) is None or tensor is None or not tensor.dtype.is_floating_point():
                continue
            mask = np.asarray(tensor.numpy()) != 0
            if mask.all():
                continue
            packed = PackedMask.pack(mask)
            known = found.setdefault(product.name, packed)
            if known.shape != packed.shape or (known.bits != packed.bits).any():
                raise BadInputError(f"two graphs have a weight called {product.name}, with zeros at other places")
    return found

"""keep-blocks: weights that were quantized before and lie on a grid of blocks get their codes back, with nothing lost.

A .gguf's weights, dequantized, are still whole multiples of one step per block. This pass looks for the grid and stores
the codes, never rounding: what does not lie on one is left alone. It needs no record of where weights came from, so it
also works after projections were packed side by side, and on any graph with dequantized weights (QAT, GPTQ) in it.

Found exactly: Q4_0, Q4_1, Q8_0 and, in 8 bits each, Q5_0 and Q5_1; whatever else has 4 or 5 bits, with or without a
minimum, or 8 bits around zero in blocks of 32. Other grids (K-quants: super-blocks with quantized scales) are not.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from onnxpress.optimizers.base import Pass, Report
from onnxpress.optimizers.linear import MICROSOFT, find_linears, read_matrix, selected, shape_of
from onnxpress.optimizers.quantization.block_format import BlockFormat, Floats, split_columns
from onnxpress.optimizers.quantization.least_squares import round_to_nearest
from onnxpress.optimizers.quantize_blocks import obstacle, quantize_linear
from onnxpress.optimizers.quantize_embedding import quantize_table, tables
from onnxpress.tensors import rows_of

GRIDS = (
    BlockFormat(4, 32, "none", "float16"),  # Q4_0
    BlockFormat(4, 32, "float", "float16"),  # Q4_1
    BlockFormat(4, 32, "float"),  # Q4_1 where an offset from the middle of the codes takes more than 11 bits
    BlockFormat(8, 32, "none", "float16"),  # Q8_0
    BlockFormat(5, 32, "none", "float16"),  # Q5_0, in 8 bits
    BlockFormat(5, 32, "float", "float16"),  # Q5_1, in 8 bits
    BlockFormat(5, 32, "float"),
)
"""In the order of their size."""
SAMPLE = 16
"""Outputs that are tried first: a matrix that lies on no grid is told by a few of them."""
ROUNDING = 2.0**-21
"""Relative to a block's largest weight: float32 arithmetic of code · scale + offset, a few units of 2^-24."""


class KeepBlocks(Pass):
    """Store products and embeddings whose weights lie on a grid of blocks as its codes, and leave the others alone."""

    name = "keep-blocks"
    exact = False  # weights are kept; onnxruntime's kernel rounds activations to 8 bits

    def __init__(self, include: Sequence[str] = (), exclude: Sequence[str] = (), accuracy_level: int = 4) -> None:
        """
        Args:
            include, exclude: patterns of weight names; other weights are left alone.
            accuracy_level: of MatMulNBits; 4 multiplies in integers.
        """
        self.include, self.exclude = tuple(include), tuple(exclude)
        self.accuracy_level = accuracy_level

    def apply(self, model: ir.Model, report: Report) -> None:
        graph = model.graph
        for table in tables(graph):
            if selected(str(table.name), self.include, self.exclude):
                format = grid_of(table, transpose=False)
                if format is None or format.zero_points == "float":
                    report.skip("embedding on no grid")
                elif shape_of(table)[1] % format.block_size:
                    report.skip("blocks do not divide the embedding")
                else:
                    quantize_table(graph, table, format, self.accuracy_level, report, "nearest")
        for linear in list(find_linears(graph, report)):
            if not selected(linear.name, self.include, self.exclude):
                report.skip("excluded by name")
                continue
            format = grid_of(linear.weight, transpose=not linear.transposed)
            reason = "on no grid" if format is None else obstacle(linear, format)
            if format is None or reason:
                report.skip(reason or "")
            else:
                quantize_linear(linear, format, self.accuracy_level, "nearest")
                report.match(f"{format.bits}-bit blocks of {format.block_size}, {format.zero_points} zero points")
        if report.matched:
            model.opset_imports.setdefault(MICROSOFT, 1)


def grid_of(weight: ir.Value, *, transpose: bool) -> BlockFormat | None:
    """The smallest format that holds every weight of a matrix as it is, to the rounding of float32, if one does.

    transpose: the matrix is stored [in, out]; blocks run along the inputs. Raises CorruptFileError for NaN.
    """
    tensor = weight.const_value
    assert tensor is not None
    if transpose:
        matrix = read_matrix(tensor, str(weight.name))
        first, slabs = matrix[:, :SAMPLE], [matrix]
    else:
        read, count = rows_of(tensor), shape_of(weight)[0]
        first = np.asarray(read(0, min(count, SAMPLE)), np.float32).T
        slabs = (np.asarray(read(at, min(count, at + 4096)), np.float32).T for at in range(0, count, 4096))  # type: ignore[assignment]
    likely = [grid for grid in GRIDS if lies_on(first, grid)]
    for slab in slabs if likely else ():
        likely = [grid for grid in likely if lies_on(slab, grid)]
    return likely[0] if likely else None


def lies_on(weight: Floats, grid: BlockFormat) -> bool:
    """Whether a matrix [features, outputs] is code · scale + offset, block by block, to float32 rounding."""
    try:
        found = round_to_nearest(weight, grid).dequantize()
    except ValueError:  # a scale that float16 does not hold
        return False
    largest = np.abs(split_columns(weight, grid.block_size)).max(axis=-1, keepdims=True)
    return bool((np.abs(split_columns(found - weight, grid.block_size)) <= largest * np.float32(ROUNDING)).all())

"""keep-blocks: weights that were quantized before and lie on a grid of blocks get their codes back, with nothing lost.

A .gguf's weights, dequantized, are still whole multiples of one step per block. This pass looks for the grid and stores
the codes, never rounding: what does not lie on one is left alone. It needs no record of where weights came from, so it
also works after projections were packed side by side, and on any graph with dequantized weights (QAT, GPTQ) in it.

Found exactly: Q4_0, Q4_1, Q5_0, Q5_1, Q8_0; whatever else has 4 or 5 bits, with or without a minimum, or 8 bits around
zero in blocks of 32; the K-quants Q2_K to Q6_K; and, in 8 bits, IQ4_NL and IQ4_XS.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from onnxpress.arrays import Floats
from onnxpress.graph.conventions import MICROSOFT
from onnxpress.graph.linear import find_linears, matrix_shape, read_matrix, selected
from onnxpress.graph.report import Report
from onnxpress.graph.tensors import FileTensor, rows_of
from onnxpress.optimizers.base import Context, Pass
from onnxpress.optimizers.quantization.block_operands import AnyMethod
from onnxpress.optimizers.quantization.maths.block_format import BlockFormat, split_columns
from onnxpress.optimizers.quantization.maths.least_squares import round_to_nearest
from onnxpress.optimizers.quantization.maths.reencoding import find_exact_codes
from onnxpress.optimizers.quantization.quantize_blocks import obstacle, quantize_linear
from onnxpress.optimizers.quantization.quantize_embedding import quantize_table, tables


class StoredGrid(NamedTuple):
    """The grid that stored weights lie on."""

    format: BlockFormat
    method: AnyMethod = "nearest"
    """How codes are found: `nearest` where the largest weight of a block has the outermost code, else `exact`."""


GRIDS = {
    "Q2_K": StoredGrid(BlockFormat(2, 16, "float", "int8", 256), "exact"),
    "Q3_K": StoredGrid(BlockFormat(3, 16, "none", "int8", 256), "exact"),
    "Q4_0": StoredGrid(BlockFormat(4, 32, "none", "float16")),
    "Q4_K": StoredGrid(BlockFormat(4, 32, "float", "int8", 256), "exact"),
    "Q4_1": StoredGrid(BlockFormat(4, 32, "float", "float16")),
    "Q5_0": StoredGrid(BlockFormat(5, 32, "none", "float16")),
    "Q5_K": StoredGrid(BlockFormat(5, 32, "float", "int8", 256), "exact"),
    # An offset from the middle of the codes may take more than 11 bits.
    "Q4_1 with long offsets": StoredGrid(BlockFormat(4, 32, "float")),
    "Q5_1": StoredGrid(BlockFormat(5, 32, "float", "float16")),
    "Q6_K": StoredGrid(BlockFormat(6, 16, "none", "int8", 256), "exact"),
    "Q5_1 with long offsets": StoredGrid(BlockFormat(5, 32, "float")),
    "IQ4_XS": StoredGrid(BlockFormat(8, 32, "none", "int8", 256), "exact"),
    "Q8_0": StoredGrid(BlockFormat(8, 32, "none", "float16")),
    "IQ4_NL": StoredGrid(BlockFormat(8, 32, "none", "float16"), "exact"),
}
"""By their names in GGUF, in the order of their size."""
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
            include: patterns of weight names, such as `*.layers.0.*`; only these weights are taken. None: all.
            exclude: patterns of names of weights to leave alone, whatever `include` says.
            accuracy_level: how MatMulNBits multiplies: 4 in integers, activations being quantized in blocks of their
                own; 0 and 1 in float32.
        """
        self.include, self.exclude = tuple(include), tuple(exclude)
        self.accuracy_level = accuracy_level

    def prepare_example(self, model: ir.Model) -> None:
        """Round all weights to Q4_1, which stands for the others here."""
        grid, looked_up = GRIDS["Q4_1"].format, set(tables(model.graph))
        for value in {*looked_up, *(linear.weight for linear in find_linears(model.graph))}:
            assert value.const_value is not None
            weight = np.asarray(value.const_value.numpy(), np.float32)
            rounded = round_to_nearest(weight.T if value in looked_up else weight, grid).dequantize()
            value.const_value = ir.tensor(rounded.T if value in looked_up else rounded, name=value.name)

    def apply(self, model: ir.Model, context: Context, report: Report) -> None:
        graph = model.graph
        for table in tables(graph):
            if selected(str(table.name), self.include, self.exclude):
                grid = grid_of(table, transpose=False)
                if grid is None:
                    report.skip("embedding on no grid")
                else:
                    quantize_table(graph, table, grid.format, self.accuracy_level, report, grid.method)
        for linear in list(find_linears(graph, report)):
            if not selected(linear.name, self.include, self.exclude):
                report.skip("excluded by name")
                continue
            grid = grid_of(linear.weight, transpose=not linear.transposed)
            reason = "on no grid" if grid is None else obstacle(linear, grid.format)
            if grid is None or reason:
                report.skip(reason or "")
            else:
                quantize_linear(linear, grid.format, self.accuracy_level, grid.method)
                report.match(f"{grid.format.bits}-bit blocks of {grid.format.block_size}{_zero_points(grid.format)}")
        if report.matched:
            model.opset_imports.setdefault(MICROSOFT, 1)


def _zero_points(format: BlockFormat) -> str:
    return "" if format.zero_points == "none" else f", {format.zero_points} zero points"


def grid_of(weight: ir.Value, *, transpose: bool) -> StoredGrid | None:
    """The smallest grid that holds every weight of a matrix as it is, to the rounding of float32, if one does.

    transpose: the matrix is stored [in, out]; blocks run along the inputs. Raises CorruptFileError for NaN.
    """
    likely = likely_grids(weight, transpose=transpose)
    tensor = weight.const_value
    assert tensor is not None
    if transpose:
        slabs: Iterable[Floats] = [read_matrix(tensor, str(weight.name))] if likely else []
    else:
        read, count = rows_of(tensor), matrix_shape(weight)[0]
        slabs = (np.asarray(read(at, min(count, at + 4096)), np.float32).T for at in range(0, count, 4096))
    for slab in slabs if likely else ():
        likely = [grid for grid in likely if lies_on(slab, grid)]
    return likely[0] if likely else None


def likely_grid(weight: ir.Value) -> BlockFormat | None:
    """The format, as far as the first outputs of a matrix [in, out] tell, with scales of any width."""
    likely = likely_grids(weight, transpose=True)
    return replace(likely[0].format, scale_type="int8" if likely[0].format.unit_size else "float32") if likely else None


def likely_grids(weight: ir.Value, *, transpose: bool) -> list[StoredGrid]:
    """The grids, smallest first, that hold the first few outputs of a matrix."""
    tensor = weight.const_value
    assert tensor is not None
    rows, columns = matrix_shape(weight)
    features, count = (rows, min(columns, SAMPLE)) if transpose else (columns, min(rows, SAMPLE))
    if not transpose:
        first = np.asarray(rows_of(tensor)(0, count), np.float32).T
    elif isinstance(tensor, FileTensor):
        first = np.asarray(tensor.columns(0, count), np.float32)
    else:
        first = np.asarray(tensor.numpy()[:, :count], np.float32)
    if not np.isfinite(first).all():
        return []
    sizes = [(grid, grid.format.unit_size or grid.format.block_size) for grid in GRIDS.values()]
    return [grid for grid, size in sizes if features % size == 0 and lies_on(first, grid)]


def lies_on(weight: Floats, grid: StoredGrid) -> bool:
    """Whether a matrix [features, outputs] is code · scale + offset, block by block, to float32 rounding."""
    if grid.method == "exact":
        return find_exact_codes(weight, grid.format) is not None
    try:
        found = round_to_nearest(weight, grid.format).dequantize()
    except ValueError:  # a scale that float16 does not hold
        return False
    size = grid.format.block_size
    largest = np.abs(split_columns(weight, size)).max(axis=-1, keepdims=True)
    return bool((np.abs(split_columns(found - weight, size)) <= largest * np.float32(ROUNDING)).all())

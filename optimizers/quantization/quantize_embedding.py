"""quantize-embedding: lookup tables in blocks, read by GatherBlockQuantized and shared with a tied head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import onnx_ir as ir

from onnxpress.errors import UnsupportedModelError
from onnxpress.graph.conventions import MICROSOFT
from onnxpress.graph.edits import add_initializers, replace
from onnxpress.graph.linear import find_linears, matrix_shape, selected
from onnxpress.graph.report import Report
from onnxpress.optimizers.base import Context, Pass
from onnxpress.optimizers.quantization.block_operands import AnyMethod, block_operands, flat_codes
from onnxpress.optimizers.quantization.maths.block_format import BlockFormat, ScaleType
from onnxpress.optimizers.quantization.quantize_blocks import quantize_linear


class QuantizeEmbedding(Pass):
    """Replace Gather on large constant tables; a product with the same table (a tied head) shares its blocks.

    GatherBlockQuantized wants the table as [rows, columns · bits / 8] and MatMulNBits the same bytes as
    [rows, blocks, bytes of a block]: two initializers, one place in the file. Unlike a Reshape, which the runtime folds
    into a copy, that costs no memory: lookups touch only the pages of the rows that they read.
    """

    name = "quantize-embedding"
    exact = False

    def __init__(
        self,
        bits: int = 8,
        block_size: int = 64,
        zero_points: Literal["none", "integer"] = "none",
        accuracy_level: Literal[0, 1, 4] = 4,
        scale_type: ScaleType = "float32",
        unit_size: int = 0,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        min_rows: int = 1024,
    ) -> None:
        """
        Args:
            bits: width of a code, 3 to 8. The operators compute with 4 or 8; other widths save space in the file only.
            block_size: neighbouring values of a row that share a scale: 16, 32, 64, 128 or 256; it must divide the row.
            zero_points: `none`: symmetric codes; `integer`: a code for each block that stands for 0, for values that
                lie to one side.
            accuracy_level: how MatMulNBits multiplies by the tied head: 4 in integers, activations being quantized in
                blocks of their own; 0 and 1 in float32.
            scale_type: how scales are stored; `int8` is double quantization (QLoRA, Dettmers et al. 2023): whole
                numbers of a unit that scales share.
            unit_size: for scales of type int8: values that share a unit, a multiple of block_size; 0: a whole row.
            include: patterns of table names; only these are taken. None: all.
            exclude: patterns of names of tables to leave alone, whatever `include` says.
            min_rows: tables with fewer rows (positions, token types) are left alone.
        """
        self.format = BlockFormat(bits, block_size, zero_points, scale_type, unit_size)
        if self.format.field == 2:
            raise ValueError(f"bits must be 3 to 8, not {bits}")
        if self.format.field == 8 and accuracy_level != 4:
            raise ValueError(f"{bits}-bit blocks need accuracy_level = 4")
        self.accuracy_level = accuracy_level
        self.include, self.exclude = tuple(include), tuple(exclude)
        self.min_rows = min_rows

    def apply(self, model: ir.Model, context: Context, report: Report) -> None:
        graph = model.graph
        for table in tables(graph):
            if matrix_shape(table)[0] < self.min_rows:
                report.skip("small table")
            elif not selected(str(table.name), self.include, self.exclude):
                report.skip("excluded by name")
            else:
                quantize_table(graph, table, self.format, self.accuracy_level, report)
        if report.matched:
            model.opset_imports.setdefault(MICROSOFT, 1)


def tables(graph: ir.Graph) -> list[ir.Value]:
    """The float32 matrices whose rows are looked up, each once."""
    return list(dict.fromkeys(table for table in map(looks_up, graph) if table is not None))


def quantize_table(
    graph: ir.Graph,
    table: ir.Value,
    format: BlockFormat,
    accuracy_level: int,
    report: Report,
    method: AnyMethod | None = None,
) -> None:
    """Quantize one table and all that reads it. Raises UnsupportedModelError where blocks do not divide its rows."""
    rows, columns = matrix_shape(table)
    if columns % (format.unit_size or format.block_size):
        raise UnsupportedModelError(
            f"quantize-embedding: blocks of {format.block_size} do not divide {columns}, the width of {table.name}",
            hint="exclude it" if columns % 16 else f"use block_size = {min(columns & -columns, 128)}",
        )
    operands = block_operands(graph, table, format, transpose=False, method=method)
    flat = flat_codes(graph, str(table.name), operands, [rows, columns * format.field // 8])
    for node, _ in list(table.uses()):
        if looks_up(node) is table:
            gather = ir.node(
                "GatherBlockQuantized",
                [flat, node.inputs[1], operands.scales, operands.zero_points][: 3 + (operands.zero_points is not None)],
                attributes={
                    "bits": format.field,
                    "block_size": format.block_size,
                    "gather_axis": 0,
                    "quantize_axis": 1,
                },
                domain=MICROSOFT,
                name=node.name,
            )
            after = [] if operands.offsets is None else _add_offsets(graph, node, gather, operands.offsets, format)
            replace(node, gather, *after)
            report.match(f"GatherBlockQuantized {format.bits} bits, blocks of {format.block_size}")
    for linear in [linear for linear in find_linears(graph) if linear.weight is table and linear.transposed]:
        quantize_linear(linear, format, accuracy_level, method)
        report.match("MatMulNBits sharing the table")
    if not table.uses() and not table.is_graph_output() and table.name in graph.initializers:
        del graph.initializers[str(table.name)]
    if not operands.codes.uses() and operands.codes.is_initializer():  # no head: only the flat form is read
        del graph.initializers[str(operands.codes.name)]


def _add_offsets(
    graph: ir.Graph, lookup: ir.Node, gather: ir.Node, offsets: ir.Value, format: BlockFormat
) -> list[ir.Node]:
    """rows + the offset of each of their blocks; `lookup` is the float one."""
    ids = lookup.inputs[1]
    assert ids is not None
    assert ids.shape is not None
    lead = [0] * len(ids.shape)  # as they are
    names = [f"row_blocks{len(lead)}.{format.block_size}", f"rows{len(lead)}", "block_axis"]
    shapes = [[*lead, -1, format.block_size], [*lead, -1], [-1]]
    blocks, whole, last = add_initializers(graph, names, [ir.tensor(np.array(one, np.int64)) for one in shapes])
    by_row = ir.node("Transpose", [offsets], {"perm": (1, 0)})
    split = ir.node("Reshape", [gather.outputs[0], blocks])
    found = ir.node("Gather", [by_row.outputs[0], ids])
    wide = ir.node("Unsqueeze", [found.outputs[0], last])
    total = ir.node("Add", [split.outputs[0], wide.outputs[0]])
    return [by_row, split, found, wide, total, ir.node("Reshape", [total.outputs[0], whole])]


def looks_up(node: ir.Node) -> ir.Value | None:
    """The float32 matrix whose rows a Gather node looks up, if it does."""
    if node.domain != "" or node.op_type != "Gather" or len(node.inputs) != 2:
        return None
    axis, data = node.attributes.get("axis"), node.inputs[0]
    if data is None or not data.is_initializer() or data.is_graph_input() or data.const_value is None:
        return None
    if (axis is not None and axis.value != 0) or data.const_value.dtype != ir.DataType.FLOAT:
        return None
    return data if len(data.const_value.shape) == 2 else None

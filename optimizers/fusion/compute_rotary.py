"""compute-rotary: tables of cosines and sines are computed when a graph is loaded, not stored.

    cos, sin [positions, rotated / 2]  =>  Cos(positions · frequencies), Sin(positions · frequencies)

For 8,192 positions of heads of 64 that is 2.1 MB less, two hundredths of a SmolLM2-135M in 4 bits. Runtimes compute
what depends on constants once, while they load a graph (by their basic optimizations; with these off, in every run).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from onnxpress.arrays import Floats
from onnxpress.graph.conventions import MICROSOFT
from onnxpress.graph.edits import add_constant, drop_unused_weights
from onnxpress.graph.matching import weight
from onnxpress.graph.report import Report
from onnxpress.optimizers.base import Context, Pass

SMALLEST = 1 << 16
"""Bytes of a pair of tables that is worth a few nodes."""
ROUNDING = 2e-6
"""The error of a cosine, relative to the amplitude: its float32 rounding, and a function that is no better."""
ROTATED = {
    "GroupQueryAttention": (7, 8),
    ("RotaryEmbedding", MICROSOFT): (2, 3),
    ("RotaryEmbedding", ""): (1, 2),
}


class Frequencies(NamedTuple):
    """The frequencies and amplitude that a pair of tables is made of."""

    frequencies: Floats
    """[rotated / 2], radians from one position to the next."""
    amplitude: np.float32
    """What cosines and sines are multiplied by, as in YaRN."""


class ComputeRotary(Pass):
    """Replace tables of cosines and sines by their frequencies."""

    name = "compute-rotary"
    exact = True

    def apply(self, model: ir.Model, context: Context, report: Report) -> None:
        pairs: dict[tuple[ir.Value, ir.Value], None] = {}
        for node in model.graph:
            places = ROTATED.get(node.op_type) or ROTATED.get((node.op_type, node.domain))
            values = [node.inputs[i] for i in places if i < len(node.inputs)] if places else []
            if len(values) == 2 and values[0] is not None and values[1] is not None:
                pairs.setdefault((values[0], values[1]))
        for cos, sin in pairs:
            tables = weight(cos), weight(sin)
            if tables[0] is None or tables[1] is None:
                report.skip("tables are computed already")
                continue
            if tables[0].nbytes + tables[1].nbytes < SMALLEST or tables[0].dtype != ir.DataType.FLOAT:
                report.skip("small tables, or not float32")
                continue
            found = find_frequencies(tables[0].numpy(), tables[1].numpy())
            if found is None:
                report.skip("not one frequency a column from position 0 on")
                continue
            _compute(model.graph, cos, sin, found)
            report.match("pair of tables computed")


def find_frequencies(cos: Floats, sin: Floats) -> Frequencies | None:
    """The frequencies of tables [positions, n], if every element is amplitude · cos(position · frequency).

    A position that is a power of two multiplies a frequency without rounding, so the angles there, each telling the
    next one's whole turns, give it to float32's last bit.
    """
    if cos.ndim != 2 or cos.shape != sin.shape or len(cos) < 2:
        return None
    amplitude = np.float32(cos[0, 0])
    if not amplitude > 0 or not np.isfinite(cos).all() or not np.isfinite(sin).all():
        return None
    estimate = np.arctan2(sin[1], cos[1]).astype(np.float64)
    for power in range(1, (len(cos) - 1).bit_length()):
        position = 2**power
        if position >= len(cos):
            break
        off = np.arctan2(sin[position], cos[position]).astype(np.float64) - estimate * position
        estimate += ((off + np.pi) % (2 * np.pi) - np.pi) / position
    frequencies = estimate.astype(np.float32)
    angles = np.arange(len(cos), dtype=np.float32)[:, None] * frequencies
    limit = ROUNDING * float(amplitude)
    for table, computed in ((cos, np.cos(angles)), (sin, np.sin(angles))):
        if np.abs(amplitude * computed - table).max() > limit:
            return None
    return Frequencies(frequencies, amplitude)


def _compute(graph: ir.Graph, cos: ir.Value, sin: ir.Value, recognised: Frequencies) -> None:
    """Put the nodes that compute both tables at the beginning of the graph."""
    assert cos.shape is not None
    prefix, type_ = str(cos.name), ir.TensorType(ir.DataType.FLOAT)
    start, step = (add_constant(graph, f"{prefix}.{n}", np.array(n, np.float32)) for n in (0, 1))
    end = add_constant(graph, f"{prefix}.positions", np.array(cos.shape[0], np.float32))
    axis = add_constant(graph, f"{prefix}.axis", np.array([1], np.int64))
    frequencies = add_constant(graph, f"{prefix}.frequencies", recognised.frequencies)
    positions = ir.node("Range", [start, end, step])
    column = ir.node("Unsqueeze", [positions.outputs[0], axis])
    angles = ir.node("Mul", [column.outputs[0], frequencies])
    nodes = [positions, column, angles]
    for table, operator in ((cos, "Cos"), (sin, "Sin")):
        nodes.append(ir.node(operator, [angles.outputs[0]]))
        if recognised.amplitude != 1:
            factor = add_constant(graph, f"{prefix}.amplitude", np.array(recognised.amplitude, np.float32))
            nodes.append(ir.node("Mul", [nodes[-1].outputs[0], factor]))
        result = nodes[-1].outputs[0]
        result.type, result.shape = type_, table.shape
        ir.convenience.replace_all_uses_with(table, result)
    for number, node in enumerate(nodes):
        node.outputs[0].name = f"{prefix}.step{number}"
    graph.insert_before(graph[0], nodes)
    drop_unused_weights(graph, [cos, sin])

"""split-outliers: a few loud input channels stay in floating point, so that int8 holds the others (LLM.int8()).

    x · W = (x masked) · W₀ + x[outliers] · W[outliers]        W₀: W with zeros in the rows of outliers

Channels are chosen beforehand, on samples: outliers live in the same few whatever the token. The first product is for
quantize-dynamic to take; the second has a handful of rows and stays as it is. On SmolLM2-135M, whose down_proj of
layers 11 and 28 reads a channel above 2,000, it makes the error of one range per prompt 50 and 70 times smaller there.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from onnxpress.arrays import Floats, Indices
from onnxpress.calibration.calibration import NO_SAMPLES
from onnxpress.graph.edits import add_constant, add_initializers, replace
from onnxpress.graph.linear import OUTLIERS, Linear, chosen_linears, group_by_activation, is_shared, read_rows
from onnxpress.graph.report import Report
from onnxpress.graph.tensors import RowTensor, concrete_shape, rows_of
from onnxpress.optimizers.base import Context, Pass
from onnxpress.optimizers.fitting.statistics import ChannelStatistics
from onnxpress.optimizers.quantization.maths.outliers import fewest_outliers


class SplitOutliers(Pass):
    """Compute the loudest input channels of products apart, in floating point, where a few of them spoil int8."""

    name = "split-outliers"
    exact = True
    needs_samples = True

    def __init__(
        self,
        max_error: float = 1e-3,
        max_channels: int = 16,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        min_features: int = 32,
    ) -> None:
        """
        Args:
            max_error: share of the products' energy that one int8 range for all tokens may cost; the fewest channels
                are split off that bring it below.
            max_channels: products that would need more are left alone: their outliers are everywhere.
            include: patterns of weight names, such as `*.layers.0.*`; products with others are left alone. None: all.
            exclude: patterns of weight names; products with these are left alone, whatever `include` says.
            min_features: products with fewer inputs or outputs are left alone.
        """
        if max_error <= 0 or max_channels < 1:
            raise ValueError(f"max_error {max_error:g} and max_channels {max_channels} must be positive")
        self.max_error, self.max_channels = max_error, max_channels
        self.include, self.exclude = tuple(include), tuple(exclude)
        self.min_features = min_features

    def apply(self, model: ir.Model, context: Context, report: Report) -> None:
        groups = group_by_activation(chosen_linears(model.graph, report, self.include, self.exclude, self.min_features))
        for activation, linears in list(groups.items()):
            if any(is_shared(linear, linears) for linear in linears):
                report.skip("weight is shared", len(groups.pop(activation)))
        if not groups:
            return
        if not context.calibration.fits(model):
            report.skip(NO_SAMPLES, sum(map(len, groups.values())))
            return
        seen = {str(activation.name): _Loudness(linears) for activation, linears in groups.items()}
        context.calibration.observe(model, {name: [one] for name, one in seen.items()})
        for activation, linears in groups.items():
            columns = seen[str(activation.name)].outliers(self.max_error)
            if not len(columns):
                report.skip("no outliers", len(linears))
            elif len(columns) > self.max_channels:
                report.skip(f"outliers in more than {self.max_channels} channels", len(linears))
            else:
                _split(model.graph, activation, linears, columns)
                report.match("outliers apart", len(linears))


class _Loudness:
    """The largest magnitudes of an activation by channel, and the energy of the products that read it."""

    def __init__(self, linears: Sequence[Linear]) -> None:
        self.linears = linears
        self.channels = ChannelStatistics(linears[0].shape[0], str(linears[0].activation.name))
        self.energy = 0.0

    def update(self, x: Floats, sample: int) -> None:
        self.channels.update(x, sample)
        self.energy += sum(float(np.square(x @ read_rows(linear).T).sum()) for linear in self.linears)

    def outliers(self, max_error: float) -> Indices:
        peaks = self.channels.peaks()
        weight = np.concatenate([read_rows(linear).T for linear in self.linears], axis=1)
        return fewest_outliers(peaks, weight, self.energy / self.channels.count, max_error)


def _split(graph: ir.Graph, activation: ir.Value, linears: Sequence[Linear], columns: Indices) -> None:
    """Mask the outliers in what the products read and add their share."""
    features = linears[0].shape[0]
    mask = np.ones(features, np.float32)
    mask[columns] = 0
    name = f"{activation.name}{OUTLIERS}"
    others = ir.node(
        "Mul", [activation, add_constant(graph, f"{name}.mask", mask)], name=f"{activation.name}.masked{OUTLIERS}"
    )
    loud = ir.node("Gather", [activation, add_constant(graph, f"{name}.channels", columns)], {"axis": -1}, name=name)
    masked = others.outputs[0]
    masked.name, masked.type, masked.shape = others.name, activation.type, activation.shape
    graph.insert_before(linears[0].node, [others, loud])
    for linear in linears:
        (kept,) = add_initializers(graph, [f"{linear.name}{OUTLIERS}"], [_rows(linear, columns)])
        rest = ir.Node(
            linear.node.domain,
            linear.node.op_type,
            [masked, *linear.node.inputs[1:]],
            list(linear.node.attributes.values()),
            name=linear.node.name,
        )
        share = ir.node("MatMul", [loud.outputs[0], kept])
        replace(linear.node, rest, share, ir.node("Add", [rest.outputs[0], share.outputs[0]]))
    for linear in {linear.weight: linear for linear in linears}.values():
        _zero(linear, columns)


def _rows(linear: Linear, columns: Indices) -> ir.TensorProtocol:
    """W[outliers], [channels, out], as it is now."""
    return ir.tensor(np.ascontiguousarray(read_rows(linear)[:, columns].T))


def _zero(linear: Linear, columns: Indices) -> None:
    """W₀ when it is written."""
    tensor = linear.weight.const_value
    assert tensor is not None
    read, shape = rows_of(tensor), concrete_shape(tensor)

    def rows(start: int, stop: int) -> Floats:
        values = np.array(read(start, stop), dtype=np.float32)
        if linear.transposed:
            values[:, columns] = 0
        else:
            values[columns[(columns >= start) & (columns < stop)] - start] = 0
        return values

    linear.weight.const_value = RowTensor(rows, ir.DataType.FLOAT, shape, name=linear.name)

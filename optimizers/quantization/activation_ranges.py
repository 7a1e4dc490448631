"""The range of each activation that is to be quantized to fixed steps, from samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from onnxpress.calibration.calibration import Calibration
from onnxpress.graph.linear import Linear
from onnxpress.optimizers.fitting.statistics import AverageRange
from onnxpress.optimizers.quantization.activation_error import ActivationError
from onnxpress.optimizers.quantization.maths import ranges
from onnxpress.optimizers.quantization.maths.histogram import Histogram

RangeMethod = Literal["min_max", "moving_average", "percentile", "entropy", "mean_squared_error"]
METHODS: tuple[RangeMethod, ...] = get_args(RangeMethod)
ActivationType = Literal["uint8", "int8", "uint16"]


class ActivationGrid(NamedTuple):
    """x ≈ scale · (code − zero point)."""

    scale: np.float32
    zero_point: NDArray[Any]
    """[] of the codes' type."""
    error: float | None = None
    """|q(x)·W − x·W|² / |x·W|² of the products that read x, where it was measured."""

    @property
    def type(self) -> str:
        return str(self.zero_point.dtype)


class _Seen:
    """Statistics of one activation on samples."""

    def __init__(self, name: str) -> None:
        self.histogram, self.average = Histogram(name), AverageRange(name)

    def range(self, method: RangeMethod, bits: int, share: float, *, symmetric: bool) -> ranges.Range:
        if method == "moving_average":
            return self.average.range()
        if method == "percentile":
            return ranges.percentile(self.histogram, share, symmetric=symmetric)
        if method == "entropy":
            return ranges.entropy(self.histogram)
        if method == "mean_squared_error":
            return ranges.mean_squared_error(self.histogram, bits, symmetric=symmetric)
        return ranges.min_max(self.histogram, symmetric=symmetric)


def find_grids(
    model: ir.Model,
    calibration: Calibration,
    readers: Mapping[ir.Value, Sequence[Linear]],
    methods: Sequence[RangeMethod],
    code_type: ActivationType,
    *,
    share: float = 99.99,
    symmetric: bool = False,
    measure: bool = False,
) -> dict[ir.Value, ActivationGrid]:
    """The grid of each of these values.

    Args:
        readers: the products that read each value; none are needed where nothing is measured.
        methods: of several, the one that costs these products least is taken; the first where there are none.
        share: what percentile keeps.
        measure: look at the loss even where there is nothing to choose.

    Samples are run once, and once more where something is measured. Memory: a histogram a value.
    """
    seen = {str(value.name): _Seen(str(value.name)) for value in readers}
    calibration.observe(model, {name: [one.histogram, one.average] for name, one in seen.items()})
    bits = np.iinfo(code_type).bits
    candidates: dict[ir.Value, list[ActivationGrid]] = {}
    for value in readers:
        several = methods if readers[value] else methods[:1]
        found = [seen[str(value.name)].range(method, bits, share, symmetric=symmetric) for method in several]
        candidates[value] = [
            ActivationGrid(*ranges.activation_grid(low, high, code_type, symmetric=symmetric)) for low, high in found
        ]
    probes = {
        str(value.name): ActivationError(linears, *(partial(_round_trip, grid) for grid in candidates[value]))
        for value, linears in readers.items()
        if linears and (measure or len(candidates[value]) > 1)
    }
    if probes:
        calibration.observe(model, {name: [probe] for name, probe in probes.items()})
    chosen = {}
    for value, grids in candidates.items():
        probe = probes.get(str(value.name))
        errors = probe.errors if probe is not None else []
        best = int(np.argmin(errors)) if errors else 0
        chosen[value] = grids[best]._replace(error=errors[best] if errors else None)
    return chosen


def _round_trip(grid: ActivationGrid, x: NDArray[np.float32]) -> NDArray[np.float32]:
    return ranges.round_trip(x, grid.scale, grid.zero_point)

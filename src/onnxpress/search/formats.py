"""Formats: what a unit may become. Each is a pass of the recipe, or a few in a row, tried on a unit alone.

Nothing here knows what a pass does: the unit is run before and after it, so that what the kernels themselves lose, as
by quantizing activations, counts too.
"""

from __future__ import annotations

import contextlib
import glob
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from onnxpress.errors import UnsupportedModelError
from onnxpress.graph_io import copy_graph
from onnxpress.optimizers.base import Pass
from onnxpress.optimizers.calibration import CalibratedPass, Calibration
from onnxpress.optimizers.calibration.subgraphs import session_of
from onnxpress.optimizers.coarseness import TINY
from onnxpress.optimizers.recipe import PassSpec
from onnxpress.search.units import Unit
from onnxpress.storage import stored
from onnxpress.tensors import ViewTensor

Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class Format:
    """A name for passes with options."""

    name: str
    specs: tuple[PassSpec, ...]

    def passes_for(self, weights: Sequence[str]) -> list[tuple[PassSpec, Pass]]:
        """The passes for the weights of these names only, as lines of a recipe and built."""
        included = sorted(map(glob.escape, weights))
        specs = [PassSpec(spec.name, {**spec.options, "include": included}) for spec in self.specs]
        return [(spec, spec.build()) for spec in specs]


FLOAT = "float32"
"""The name of leaving a unit as it is."""


@dataclass(frozen=True)
class Trial:
    """A unit in a format."""

    nbytes: int
    """Of all its constants."""
    outputs: list[dict[str, NDArray[Any]]] = field(default_factory=list)
    """What it makes of each sample."""


def try_format(
    part: ir.Model,
    unit: Unit,
    format: Format,
    fit: Sequence[Arrays],
    samples: Sequence[Arrays],
    session_options: Mapping[str, str],
    threads: int | None = None,
) -> Trial | None:
    """Apply a format to a unit and run it; None where a pass finds nothing or a weight stays as it was.

    Args:
        part: the unit as it is, see `units.unit_model`; it is not changed.
        fit: inputs that calibrated passes look at.
        samples: inputs that the result is judged by.
    """
    model = copy_graph(part)
    with contextlib.suppress(UnsupportedModelError):
        for _, one in format.passes_for(unit.weights):
            if isinstance(one, CalibratedPass):
                one.calibration = Calibration(fit, threads=threads)
            if not one.call(model).report.matched:
                return None
        if not any(name in model.graph.initializers for name in unit.weights):
            return run(model, samples, session_options, threads)
    return None


def run(
    model: ir.Model, samples: Sequence[Arrays], session_options: Mapping[str, str], threads: int | None = None
) -> Trial:
    """Run a unit on samples."""
    with session_of(model, threads, session_options) as session:
        names = [output.name for output in session.get_outputs()]
        outputs = [dict(zip(names, session.run(names, dict(sample)), strict=True)) for sample in samples]
    return Trial(constant_bytes(model), outputs)


def constant_bytes(model: ir.Model) -> int:
    """Bytes that the constants of a graph take in a file; those that are another one in another shape take none."""
    tensors = (value.const_value for value in model.graph.initializers.values())
    return sum(stored(tensor).nbytes for tensor in tensors if tensor is not None and not isinstance(tensor, ViewTensor))


def relative_errors(expected: Sequence[Arrays], found: Sequence[Arrays]) -> NDArray[np.float64]:
    """|found − expected|² / |expected|² of each token of each output."""
    ratios = []
    for before, after in zip(expected, found, strict=True):
        for name in before:
            difference = np.square(after[name].astype(np.float64) - before[name]).sum(axis=-1)
            whole = np.square(before[name].astype(np.float64)).sum(axis=-1)
            ratios.append((difference / np.maximum(whole, TINY)).ravel())
    return np.concatenate(ratios)

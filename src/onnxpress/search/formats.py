"""Formats: what a group may become. Each is a pass of the recipe, or a few in a row, tried on a group alone.

Nothing here knows what a pass does: the group is run before and after it, so that what the kernels themselves lose, as
by quantizing activations, counts too. What a block may become is a format as well, see `block_cuts`.
"""

from __future__ import annotations

import glob
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from onnxpress.arrays import Array, Arrays, Doubles
from onnxpress.calibration.calibration import Calibration
from onnxpress.calibration.subgraphs import session_of
from onnxpress.errors import UnsupportedModelError
from onnxpress.graph.io import copy_graph
from onnxpress.graph.storage import stored
from onnxpress.graph.tensors import ViewTensor
from onnxpress.optimizers.base import Context, Pass
from onnxpress.optimizers.fitting.statistics import TINY
from onnxpress.optimizers.recipe import PassSpec
from onnxpress.search.groups import Part

Shapes = Mapping[str, Sequence[Sequence[int]]]
"""(inputs, outputs) of each product of a group, by the group's name."""


@dataclass(frozen=True)
class Format:
    """A name for passes with options."""

    name: str
    specs: tuple[PassSpec, ...]
    losses_follow: ClassVar[bool] = True
    """Whether losses follow from errors, which are small enough; otherwise every one is measured."""

    @property
    def key(self) -> str:
        """A key by what it does, whatever it is called."""
        return json.dumps([[spec.name, dict(spec.options)] for spec in self.specs], sort_keys=True)

    def passes_for(self, weights: Sequence[str]) -> list[tuple[PassSpec, Pass]]:
        """Make the passes for the weights of these names only, as lines of a recipe and built."""
        included = sorted(map(glob.escape, weights))
        specs = [PassSpec(spec.name, {**spec.options, "include": included}) for spec in self.specs]
        return [(spec, spec.build()) for spec in specs]

    def apply(self, part: ir.Model, of: Part, calibration: Calibration) -> ir.Model | None:
        """Apply the passes to a copy of a part; None where a pass finds nothing or a weight stays as it was.

        Args:
            part: `of` as it is, see `groups.part_model`; it is not changed.
            calibration: with inputs of the part.
        """
        model = self.run_passes(part, of, calibration)
        return None if model is None or any(name in model.graph.initializers for name in of.weights) else model

    def run_passes(self, part: ir.Model, of: Part, calibration: Calibration) -> ir.Model | None:
        """Run all passes on a copy of the part; None where one of them finds nothing to do, or cannot do it."""
        model = copy_graph(part)
        try:
            for _, graph_pass in self.passes_for(of.weights):
                if not graph_pass.run(model, Context(calibration, part)).report.matched:
                    return None
        except UnsupportedModelError:
            return None
        return model

    def left(self, before: ir.Model, after: ir.Model) -> Shapes | None:
        """Return what is left of the groups inside a part, those that changed; None where this is no longer told."""
        return {}


FLOAT = "float32"
"""The name of leaving a group as it is."""


@dataclass(frozen=True)
class Trial:
    """A part in a format."""

    nbytes: int
    """The bytes of all its constants."""
    outputs: list[dict[str, Array]] = field(default_factory=list)
    """What it makes of each sample."""
    left: Shapes = field(default_factory=dict)
    """See `Format.left`."""


def try_format(
    part: ir.Model,
    of: Part,
    format: Format,
    calibration: Calibration,
    samples: Sequence[Arrays],
    session_options: Mapping[str, str],
    threads: int | None = None,
) -> Trial | None:
    """Apply a format to a part and run it on samples; None where it does not take the part. See `Format.apply`."""
    model = format.apply(part, of, calibration)
    left = format.left(part, model) if model is not None else None
    if model is None or left is None:
        return None
    return replace(run_part(model, samples, session_options, threads), left=left)


def run_part(
    model: ir.Model, samples: Sequence[Arrays], session_options: Mapping[str, str], threads: int | None = None
) -> Trial:
    """Run a part on samples; what it does not read of them is left out."""
    with session_of(model, threads, session_options) as session:
        names, read = [value.name for value in session.get_outputs()], session.get_inputs()
        fed = ({one.name: _fitting(sample[one.name], one.shape) for one in read} for sample in samples)
        outputs = [dict(zip(names, session.run(names, feeds), strict=True)) for feeds in fed]
    return Trial(constant_bytes(model), outputs)


def _fitting(array: Array, shape: Sequence[int | str | None]) -> Array:
    """Return an input as it is; an empty cache has as many heads as a part that was cut expects."""
    if array.size:
        return array
    sizes = [wanted if isinstance(wanted, int) else found for found, wanted in zip(array.shape, shape, strict=True)]
    return np.zeros(sizes, array.dtype)


def constant_bytes(model: ir.Model) -> int:
    """Count the bytes of a graph's constants in a file, which holds those once that are seen in several shapes."""
    tensors = [value.const_value for value in model.graph.initializers.values() if value.const_value is not None]
    held = [tensor.source if isinstance(tensor, ViewTensor) else stored(tensor) for tensor in tensors]
    return sum({id(tensor): tensor.nbytes for tensor in held}.values())


def relative_errors(expected: Sequence[Arrays], found: Sequence[Arrays]) -> Doubles:
    """Compute |found − expected|² / |expected|² of each token of each output."""
    ratios = []
    for before, after in zip(expected, found, strict=True):
        for name in before:
            difference = np.square(after[name].astype(np.float64) - before[name]).sum(axis=-1)
            whole = np.square(before[name].astype(np.float64)).sum(axis=-1)
            ratios.append((difference / np.maximum(whole, TINY)).ravel())
    return np.concatenate(ratios)

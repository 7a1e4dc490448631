"""Cuts: what a block may become. Each is a structural pass of the recipe, or a few in a row, tried on a block alone.

A cut is a format of a block: it is run on what the block reads in the float model, and the error of the hidden states
that it hands on is injected into the whole model. Nothing here knows what a pass does to a block. Which groups it made
smaller is seen in the block; two cuts of a block that change different groups, as those of attention and of the
feed-forward network do, may be chosen together.

`reduce-depth` with drop = 1 stands for the removal of the block itself, whatever it adds to the hidden states.
"""

from __future__ import annotations

import glob
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import onnx_ir as ir
from onnx_ir.passes import common

from onnxpress.calibration.calibration import Calibration
from onnxpress.errors import UsageError
from onnxpress.graph.anatomy import Block, anatomy_of
from onnxpress.graph.io import copy_graph
from onnxpress.optimizers.base import Pass
from onnxpress.optimizers.depth.cuts import renumbered, stacks_of
from onnxpress.optimizers.depth.reduce_depth import ReduceDepth
from onnxpress.optimizers.recipe import PassSpec
from onnxpress.search.formats import Format, Shapes
from onnxpress.search.groups import Group, Part, find_groups

REMOVED = PassSpec(ReduceDepth.name, {"drop": 1})
"""The pass of a cut that removes blocks."""


@dataclass(frozen=True)
class CutCandidate:
    """A block that may be cut, by the values between which it lies."""

    name: str
    """`model.layers.3`"""
    weights: tuple[str, ...]
    inputs: tuple[str, ...]
    """The hidden states first."""
    outputs: tuple[str, ...]
    """The hidden states that it hands on."""
    parameters: int

    @property
    def stack(self) -> str:
        """`model.layers`"""
        return self.name.rpartition(".")[0]

    @property
    def layer(self) -> int:
        """Its number in the stack."""
        return int(self.name.rpartition(".")[2])


@dataclass(frozen=True)
class Cut(Format):
    """A format of a block."""

    losses_follow: ClassVar[bool] = False

    @property
    def removes(self) -> bool:
        """True if it takes blocks out."""
        return any(spec.name == REMOVED.name for spec in self.specs)

    def passes_at(self, candidates: Sequence[CutCandidate], weights: Sequence[str]) -> list[tuple[PassSpec, Pass]]:
        """Make the passes for these blocks only, as lines of a recipe and built; one for each stack that loses blocks.

        Args:
            weights: of the groups that change there.
        """
        if not self.removes:
            return self.passes_for(weights)
        layers: dict[str, list[int]] = {}
        for candidate in candidates:
            layers.setdefault(candidate.stack, []).append(candidate.layer)
        specs = [
            PassSpec(REMOVED.name, {"layers": sorted(numbers), "include": [glob.escape(stack)]})
            for stack, numbers in layers.items()
        ]
        return [(spec, spec.build()) for spec in specs]

    def apply(self, part: ir.Model, of: Part, calibration: Calibration) -> ir.Model | None:
        """The block after the cut; None where a pass finds nothing, or the block cannot go."""
        if self.removes:
            return _bypassed(part, of)
        # An empty cache may be left out; calibration takes no empty arrays.
        samples = [{name: array for name, array in one.items() if array.size} for one in calibration.samples]
        return self.run_passes(part, of, replace(calibration, samples=samples))

    def left(self, before: ir.Model, after: ir.Model) -> Shapes | None:
        """Return what is left of the groups that the cut made smaller; nothing of a group that is gone.

        None where no group is smaller, or where others took their place: what they weigh in a format is not known.
        """
        old, new = (
            {group.name: group for group in find_groups(model.graph) if group.table is None}
            for model in (before, after)
        )
        if self.removes:
            return {name: [[0, 0]] * len(group.shapes) for name, group in old.items()}
        changed = {
            name: [list(shape) for shape in group.shapes]
            for name, group in new.items()
            if name in old and group.shapes != old[name].shapes
        }
        return changed if changed and old.keys() == new.keys() else None


def find_candidates(model: ir.Model) -> list[CutCandidate]:
    """Find the blocks of a graph, in their order. Raises UnsupportedModelError where none are recognised."""
    return [_site(block) for blocks in stacks_of(anatomy_of(model)).values() for block in blocks]


def check_cuts(cuts: Mapping[str, Sequence[PassSpec]]) -> list[Cut]:
    """Read the cuts of a recipe. Raises UsageError for a removal that is more than that."""
    found = [Cut(name, tuple(specs)) for name, specs in cuts.items()]
    for cut in found:
        if cut.removes and [(spec.name, dict(spec.options)) for spec in cut.specs] != [(REMOVED.name, REMOVED.options)]:
            raise UsageError(
                f"cut {cut.name}: a search removes single blocks, and nothing makes up for them",
                hint='pass = "reduce-depth" with drop = 1 and nothing else',
            )
    return found


def linked(left: Mapping[str, Shapes], groups: Iterable[Group]) -> dict[str, dict[str, Group]]:
    """Return by cut the groups that it changes, by name, as it leaves them; cuts that change none are left out.

    A group that reaches beyond a block, as the products of all layers that read what an encoder made, is in none: it
    counts as uncut until the model is built.
    """
    known = {group.name: group for group in groups}
    found = {
        cut: {
            name: known[name].with_shapes(shapes)
            for name, shapes in units_left.items()
            if name in known and len(shapes) == len(known[name].shapes)
        }
        for cut, units_left in left.items()
    }
    return {cut: units_left for cut, units_left in found.items() if units_left}


def numbering(candidates: Iterable[CutCandidate], removed: Sequence[CutCandidate]) -> Callable[[str], str]:
    """Return a function from names of weights to those once blocks are gone: layers that stay are numbered from 0."""
    numbers: dict[str, dict[int, int]] = {}
    for candidate in candidates:
        if candidate not in removed:
            kept = numbers.setdefault(candidate.stack, {})
            kept[candidate.layer] = len(kept)

    def name(weight: str) -> str:
        for stack, kept in numbers.items():
            weight = renumbered(weight, stack, kept)
        return weight

    return name


def _site(block: Block) -> CutCandidate:
    hidden = [str(value.name) for value in block.hidden]
    rest = [str(value.name) for value in block.inputs]
    weights = tuple(dict.fromkeys(product.name for product in block.products))
    return CutCandidate(
        block.title,
        weights,
        tuple(dict.fromkeys([*hidden, *rest])),
        tuple(str(value.name) for value in block.outputs),
        sum(product.features[0] * product.features[1] for product in block.products),
    )


def _bypassed(part: ir.Model, of: Part) -> ir.Model | None:
    """Make a block that hands on what it reads; None where that is more than one value, or has another shape."""
    model = copy_graph(part)
    inputs = {value.name: value for value in model.graph.inputs}
    hidden, outputs = inputs.get(of.inputs[0]), list(model.graph.outputs)
    if hidden is None or len(outputs) != 1:
        return None
    identity = ir.node("Identity", [hidden])
    model.graph.append(identity)
    made, (output,) = identity.outputs[0], outputs
    made.type = output.type
    model.graph.outputs[0] = made
    made.name, output.name = output.name, f"{output.name}/removed"
    common.RemoveUnusedNodesPass()(model)
    return model

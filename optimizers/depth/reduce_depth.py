"""reduce-depth: fewer layers.

A layer adds to the hidden states that it reads; without it the next layer reads the same states. Which layers do least
is told by what they do to the states (`influence`, `angular`) or by what the model loses without them (`loss`); what is
lost is made up for by adding weights of removed layers to a neighbour's (`merge`, `average`) or by a linear map that is
folded into the layer before (`linear`). See `depth.choice`, `structure.depth`, `depth.patches`; what each loses is in
docs/passes/depth.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Literal

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from onnxpress.calibration.calibration import NO_SAMPLES, Calibration
from onnxpress.errors import UnsupportedModelError, UsageError
from onnxpress.graph.anatomy import Anatomy, Block, anatomy_of
from onnxpress.graph.anatomy.editing import require_editable
from onnxpress.graph.io import copy_graph
from onnxpress.graph.linear import find_linears
from onnxpress.graph.report import Report
from onnxpress.graph.tensors import RowTensor, concrete_shape, rows_of
from onnxpress.optimizers.base import Context, Pass
from onnxpress.optimizers.depth.choice import Select, choose_removed_layers
from onnxpress.optimizers.depth.compatibility import layer_signature, layer_weights, require_compatible
from onnxpress.optimizers.depth.maths import Merge, combine, merge_coefficients, runs
from onnxpress.optimizers.depth.patches import Gap, Patches, PatchForm, apply, fit_patches
from onnxpress.optimizers.depth.removal import cut_layers, note_merge, require_single_states, stacks_of

Method = Literal["drop", "merge", "average", "linear"]


@dataclass
class _Plan:
    """The decision for a stack, for every graph that has it: both decoders are cut alike."""

    dropped: list[int]
    patches: Patches | None = field(default=None)


class ReduceDepth(Pass):
    """Remove layers from each stack, renumber the others, and make up for what is lost.

    Modifies the signature of decoders: the cache has an entry for each layer that is left.
    """

    name = "reduce-depth"
    exact = False
    needs_anatomy = True

    def __init__(
        self,
        drop: int = 0,
        layers: Sequence[int] = (),
        keep: float = 1.0,
        select: Select = "influence",
        method: Method = "drop",
        patch: PatchForm = "fold",
        include: Sequence[str] = (),
    ) -> None:
        """
        Args:
            drop: how many layers to remove from each stack. One of drop, layers and keep is given.
            layers: which layers to remove from each stack, the first being 0.
            keep: the share of layers that stays, rounded to whole layers.
            select: how layers are chosen: `influence`, the lowest 1 − cos of states before and after; `angular`, those
                in a row that together turn the states least; `loss`, one after another that without which the output
                changes least.
            method: what makes up for removed layers: `drop`, nothing; `merge`, W + Σ(W_k − W) over removed neighbours,
                in the layer before; `average`, their mean with it; `linear`, a linear map fitted to samples.
            patch: for `linear`, where the map goes: `fold`, into the `down` of the layer before; `product`, a product
                of its own.
            include: patterns of stacks' paths, such as "decoder.block"; others are left alone.
        """
        if sum((drop != 0, bool(layers), keep != 1.0)) != 1:
            raise ValueError("give one of drop, layers and keep")
        if drop < 0 or not 0 < keep <= 1:
            raise ValueError(f"drop must be at least 1 and keep lie between 0 and 1, not {drop} and {keep}")
        if len(set(layers)) != len(layers) or any(index < 0 for index in layers):
            raise ValueError(f"layers must be different and not negative: {list(layers)}")
        self.drop, self.layers, self.keep = drop, sorted(layers), keep
        self.select, self.method, self.patch = select, method, patch
        self.include = tuple(include)
        self.wanted_rows, self.wanted_length = (64, 128) if method == "linear" else (8, 64)
        self._plans: dict[tuple[str, int], _Plan | None] = {}

    @property
    def needs_samples(self) -> bool:
        return not self.layers or self.method == "linear"

    def apply(self, model: ir.Model, context: Context, report: Report) -> None:
        stacks = stacks_of(_anatomy(model))
        chosen = [name for name in stacks if not self.include or any(fnmatchcase(name, one) for one in self.include)]
        for name in stacks:
            if name not in chosen:
                report.skip(f"stack {name} excluded by name")
        if self.layers and len(chosen) > 1:
            raise UsageError(
                f"layers {self.layers} of which stack? The graph has {', '.join(chosen)}",
                hint=f'choose one: include=["{chosen[0]}"]',
            )
        for stack in chosen:
            self._reduce(model, stack, context.calibration, report)

    def _reduce(self, model: ir.Model, stack: str, calibration: Calibration, report: Report) -> None:
        blocks = stacks_of(anatomy_of(model))[stack]
        depth = len(blocks)
        count = self._count(stack, depth)
        if count == 0:
            report.skip(f"{stack}: {self.keep:g} of {depth} layers is all of them")
            return
        for block in blocks:
            require_single_states(block)
            for product in block.products:
                require_editable(product)
        known = (stack, depth) in self._plans
        plan = self._plans.get((stack, depth))
        if not known and (not self.needs_samples or calibration.fits(model)):
            plan = _Plan(self.layers or choose_removed_layers(model, blocks, count, self.select, calibration, report))
        self._plans[stack, depth] = plan
        if plan is None:  # also for later graphs of this stack: all are cut alike or none
            report.skip(NO_SAMPLES, count)
            return
        untouched = copy_graph(model)
        signatures = {layer_signature(block) for block in blocks}
        gaps = _gaps(plan.dropped)
        if self.method in ("merge", "average"):
            _merge(model, stack, blocks, gaps, "merge" if self.method == "merge" else "average")
        cut_layers(model, stack, plan.dropped)
        if self.method == "linear":
            if plan.patches is None:
                plan.patches = fit_patches(model, untouched, stack, gaps, self.patch, calibration, report)
            else:
                apply(model, stack, plan.patches)
        for index in plan.dropped:
            report.match(f"{stack}.{index} removed")
        if len(signatures) > 1:
            report.skip("layers of several kinds: per-layer lists of config.json (layer_types) need the same cut")

    def _count(self, stack: str, depth: int) -> int:
        """How many layers go. Raises UsageError where that is all of them, or more."""
        if self.layers and self.layers[-1] >= depth:
            raise UsageError(
                f"{stack} has no layer {self.layers[-1]}: it has {depth}", hint=f"layers count from 0 to {depth - 1}"
            )
        count = len(self.layers) or self.drop or depth - round(depth * self.keep)
        if count >= depth:
            raise UsageError(f"{stack} has {depth} layers; {count} cannot be removed", hint="one at least must stay")
        return count


def _anatomy(model: ir.Model) -> Anatomy:
    """The anatomy; where there is none since layers share weights, the error says so."""
    try:
        return anatomy_of(model)
    except UnsupportedModelError:
        users: dict[str, int] = {}
        for linear in find_linears(model.graph):
            users[linear.name] = users.get(linear.name, 0) + 1
        shared = next((name for name, count in users.items() if count > 1), None)
        if shared is None:
            raise
        raise UnsupportedModelError(
            f"layers share weights: {users[shared]} products read {shared!r}",
            hint="a model that runs one layer again and again has none to remove",
        ) from None


def _gaps(dropped: Sequence[int]) -> list[Gap]:
    """The runs of removed layers; the layer before a run is numbered as in the cut graph."""
    return [Gap(run[0] - 1 - sum(other < run[0] for other in dropped), run[-1]) for run in runs(dropped)]


def _merge(model: ir.Model, stack: str, blocks: Sequence[Block], gaps: Sequence[Gap], method: Merge) -> None:
    """Add the weights of each run to those of the layer before it, or after it where none is before."""
    removed = 0
    for gap in gaps:
        first = gap.after + 1 + removed
        removed += gap.last + 1 - first
        into = first - 1 if gap.after >= 0 else gap.last + 1
        host = blocks[into]
        run = blocks[first : gap.last + 1]
        for block in run:
            require_compatible(host, block)
        coefficients = merge_coefficients(method, len(run))
        others = [layer_weights(block) for block in run]
        for name, value in layer_weights(host).items():
            tensors = [weights[name].const_value for weights in others]
            value.const_value = _combined([value.const_value, *tensors], coefficients, str(value.name))
        note_merge(model, stack, len(blocks), into, range(first, gap.last + 1))


def _combined(tensors: Sequence[ir.TensorProtocol | None], coefficients: Sequence[float], name: str) -> RowTensor:
    """Σ c_i W_i, computed when it is written."""
    known = [tensor for tensor in tensors if tensor is not None]
    readers = [rows_of(tensor) for tensor in known]

    def rows(start: int, stop: int) -> NDArray[np.float32]:
        return combine([np.asarray(read(start, stop)) for read in readers], coefficients)

    return RowTensor(rows, ir.DataType.FLOAT, concrete_shape(known[0]), name=name)

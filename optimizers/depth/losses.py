"""Losses of a whole model without each of its layers, all of them tried in one walk through the graph.

Every candidate is the model without one more layer. Up to that layer it computes what the model computes, so it is
carried on from there only: one block at a time is loaded and run on the states of all candidates that have left it
behind. A round costs half of what running every candidate from its start would, and memory holds one block, and the
hidden states of every candidate.

The loss is the mean over tokens of KL(logits of the whole model ‖ logits without layers), in nats; of a graph without
logits, the mean of 1 − cos of its first output's rows.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

import numpy as np
import onnx_ir as ir

from onnxpress.arrays import Array
from onnxpress.calibration.calibration import Calibration
from onnxpress.calibration.feeds import Padding, check_samples, feed_of
from onnxpress.calibration.subgraphs import extract_subgraph, session_of, values_by_name
from onnxpress.errors import BadInputError, UnsupportedModelError
from onnxpress.graph.anatomy import Block, Segment, split_layers
from onnxpress.optimizers.depth.maths import divergence, influence

Variant = frozenset[int]
"""The layers that a candidate lacks."""
WHOLE: Variant = frozenset()
SPARE = 8
"""After the first round, as many layers as are still to go and these are tried: those that did best by themselves."""


def greedy(model: ir.Model, blocks: Sequence[Block], count: int, calibration: Calibration) -> list[tuple[int, float]]:
    """The `count` layers to remove one after another, each with the model's loss without it and those before it."""
    setup = _Setup(model, blocks, calibration)
    removed: list[tuple[int, float]] = []
    candidates = set(range(len(blocks)))
    for number in range(count):
        losses = setup.losses(frozenset(index for index, _ in removed), candidates)
        ranked = sorted(losses, key=lambda index: (losses[index], -index))
        removed.append((ranked[0], losses[ranked[0]]))
        candidates = set(ranked[1 : count + SPARE]) if number == 0 else candidates - {ranked[0]}
        if calibration.progress is not None:
            calibration.progress(number + 1, count)
    return removed


class _Setup:
    """A graph, cut into blocks, and samples."""

    def __init__(self, model: ir.Model, blocks: Sequence[Block], calibration: Calibration) -> None:
        check_samples(model, calibration.samples)
        self.model, self.samples, self.threads = model, calibration.samples, calibration.threads
        self.layers = {block.title: index for index, block in enumerate(blocks)}
        self.hidden = [str(block.hidden[0].name) for block in blocks]
        self.made = [str(block.outputs[0].name) for block in blocks]
        ends = {block.title: block.outputs[0] for block in blocks}
        self.segments = [part for one in split_layers(model.graph) for part in _parts(one, ends.get(one.title))]
        self.values = values_by_name(model.graph)
        self.padding = Padding(model.graph)
        self.target = _target(model.graph)
        self.inputs = [[str(value.name) for value in segment.inputs()] for segment in self.segments]
        read = {name for names in self.inputs for name in names}
        self.outputs = [
            [
                str(output.name)
                for node in segment.nodes
                for output in node.outputs
                if str(output.name) in read or str(output.name) == self.target
            ]
            for segment in self.segments
        ]

    def losses(self, dropped: Variant, candidates: Collection[int]) -> dict[int, float]:
        """The model's loss without `dropped` and one more layer, by that layer."""
        run = _Round(self, dropped, candidates)
        for number in range(len(self.segments)):
            run.through(number)
        return {index: run.sums[dropped | {index}] / run.rows for index in candidates}

    def distance(self, reference: Array, candidate: Array, sample: int) -> tuple[float, int]:
        """Summed over the rows of the model's output that are no padding, and how many these are."""
        pair = [self.padding.real_rows(self.target, array, self.samples[sample]) for array in (reference, candidate)]
        if not np.isfinite(pair[0]).all():
            raise BadInputError(f"{self.target} is not finite for sample {sample}", hint="leave the sample out")
        compare = divergence if self.target == "logits" else influence
        total = sum(float(compare(pair[0][i : i + 64], pair[1][i : i + 64]).sum()) for i in range(0, len(pair[0]), 64))
        return (total if np.isfinite(total) else np.inf), len(pair[0])


class _Round:
    """The states of all candidates while the graph is walked through."""

    def __init__(self, setup: _Setup, dropped: Variant, candidates: Collection[int]) -> None:
        self.setup, self.dropped, self.candidates = setup, dropped, candidates
        self.variants = list(dict.fromkeys([WHOLE, dropped]))
        self.states: dict[tuple[Variant, str, int], Array] = {}
        self.sums: dict[Variant, float] = {}
        self.rows = 0

    def through(self, number: int) -> None:
        """Run one segment for every candidate, and let the one that lacks it begin."""
        setup = self.setup
        layer = setup.layers.get(setup.segments[number].title)
        names, outputs = setup.inputs[number], setup.outputs[number]
        fresh = self.dropped | {layer} if layer is not None and layer in self.candidates else None
        variants = [*self.variants, fresh] if fresh is not None else self.variants
        if outputs:
            given = {name: ir.DataType.from_numpy(self._look_up(WHOLE, name, 0).dtype) for name in names}
            with session_of(extract_subgraph(setup.model, given, outputs), setup.threads) as session:
                wanted = [value.name for value in session.get_inputs()]
                for sample in range(len(setup.samples)):
                    made: dict[Variant, dict[str, Array]] = {}
                    for variant in variants:
                        if layer is not None and layer in variant:
                            made[variant] = {setup.made[layer]: self._look_up(variant, setup.hidden[layer], sample)}
                        elif variant == WHOLE or any((variant, name, sample) in self.states for name in names):
                            feeds = {name: self._look_up(variant, name, sample) for name in wanted}
                            made[variant] = dict(zip(outputs, session.run(outputs, feeds), strict=True))
                    self._take(made, variants, sample)
        self.variants = variants
        later = {name for names in setup.inputs[number + 1 :] for name in names}
        self.states = {key: array for key, array in self.states.items() if key[1] in later}

    def _take(self, made: dict[Variant, dict[str, Array]], variants: Sequence[Variant], sample: int) -> None:
        target = self.setup.target
        for variant, arrays in made.items():
            for name, array in arrays.items():
                self.states[variant, name, sample] = array
        if target not in made[WHOLE]:
            return
        for variant in variants:
            found = self._look_up(variant, target, sample)
            total, rows = self.setup.distance(made[WHOLE][target], found, sample)
            self.sums[variant] = self.sums.get(variant, 0.0) + total
        self.rows += rows
        later = (*self.setup.inputs, ())
        if not any(target in names for names in later):  # logits are large
            for variant in variants:
                self.states.pop((variant, target, sample), None)

    def _look_up(self, variant: Variant, name: str, sample: int) -> Array:
        """A candidate's array for a value: its own, or that of those that it is like so far."""
        value = self.setup.values[name]
        if value.is_graph_input():
            return feed_of(value, self.setup.samples[sample])
        for like in (variant, self.dropped, WHOLE):
            if (like, name, sample) in self.states:
                return self.states[like, name, sample]
        raise AssertionError(f"{name} was not computed")


def _parts(segment: Segment, states: ir.Value | None) -> list[Segment]:
    """A layer, and what follows it without a weight, such as the mean over tokens, which a layer less does not end."""
    if states is None:
        return [segment]
    behind, reached = [], {states}
    for node in segment.nodes:
        if reached.intersection(value for value in node.inputs if value is not None):
            behind.append(node)
            reached.update(node.outputs)
    layer = tuple(node for node in segment.nodes if node not in behind)
    rest = [Segment(f"after {segment.title}", None, tuple(behind))] if behind else []
    return [replace(segment, nodes=layer), *rest]


def _target(graph: ir.Graph) -> str:
    names = [
        str(value.name)
        for value in graph.outputs
        if not str(value.name).startswith("present") and (value.dtype is None or value.dtype.is_floating_point())
    ]
    if not names:
        raise UnsupportedModelError("the graph has no output that a loss can be measured by", hint="select=influence")
    return "logits" if "logits" in names else names[0]

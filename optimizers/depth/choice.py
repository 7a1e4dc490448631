"""Which layers of a stack do least: by what they do to hidden states, or by what the whole model loses without them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from onnxpress.calibration.calibration import Calibration
from onnxpress.graph.anatomy import Block
from onnxpress.graph.report import Report
from onnxpress.optimizers.depth.losses import greedy
from onnxpress.optimizers.depth.maths import angular_distance, influence, lowest
from onnxpress.optimizers.depth.rows import Each

Select = Literal["influence", "angular", "loss"]
Compare = Callable[[NDArray[np.floating], NDArray[np.floating]], NDArray[np.float64]]


def choose_removed_layers(
    model: ir.Model, blocks: Sequence[Block], count: int, select: Select, calibration: Calibration, report: Report
) -> list[int]:
    """The indices of `count` layers to remove, ascending; scores go to the report by the layer's path.

    influence   the lowest mean of 1 − cos(x_in, x_out), one by one
    angular     the `count` layers in a row between whose ends the mean angle is smallest
    loss        greedy: again and again the layer without which the model's output changes least, see `losses`
    """
    if select == "loss":
        found = greedy(model, blocks, count, calibration)
        for index, loss in found:
            report.measure(blocks[index].title, loss)
        return sorted(index for index, _ in found)
    if select == "influence":
        scores = span_scores(model, blocks, 1, calibration, influence)
        for block, score in zip(blocks, scores, strict=True):
            report.measure(block.title, score)
        return lowest(scores, count)
    scores = span_scores(model, blocks, count, calibration, angular_distance)
    (start,) = lowest(scores, 1)
    report.measure(blocks[start].title, scores[start])
    return list(range(start, start + count))


def span_scores(
    model: ir.Model, blocks: Sequence[Block], span: int, calibration: Calibration, compare: Compare
) -> list[float]:
    """The mean over tokens of `compare(x_l, x_{l + span})` for every l, [len(blocks) − span + 1].

    Memory: hidden states of all samples at span + 1 places.
    """
    places = {block.title: index for index, block in enumerate(blocks)}
    states: dict[int, dict[int, NDArray[np.float32]]] = {}
    scores: list[float] = []
    for step in calibration.walk(model, feed="original"):
        index = places.get(step.title)
        if index is None:
            continue
        wanted = {str(blocks[index].outputs[0].name): Each(states.setdefault(index + 1, {}).__setitem__)}
        if index == 0:
            wanted[str(blocks[0].hidden[0].name)] = Each(states.setdefault(0, {}).__setitem__)
        step.observe({name: [rows] for name, rows in wanted.items()})
        first = index + 1 - span
        if first >= 0:
            pairs = [compare(states[first][sample], states[index + 1][sample]) for sample in states[first]]
            scores.append(float(np.concatenate(pairs).mean()))
            del states[first]
        if index + 1 == len(blocks):
            break
    return scores

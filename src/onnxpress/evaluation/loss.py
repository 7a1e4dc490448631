"""The loss of a graph, computed as cheaply as can be: for many small changes of one graph, one after the other.

A graph with logits gets nodes that compute the divergence itself, so that nothing large leaves the runtime; any other
graph is compared by its vectors. The figures are those of `metrics`: KL in nats per token, or 1 - mean cosine.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxpress.arrays import Array, Floats
from onnxpress.evaluation.metrics import cosine
from onnxpress.runtime.sessions import pool

LOGITS, REFERENCE, DIVERGENCE = "logits", "onnxpress.reference", "onnxpress.divergence"
LOG_PROBABILITIES = f"{LOGITS}.{REFERENCE}"

Run = Callable[[Sequence[str], Mapping[str, Array]], Sequence[Any]]
"""Runs the graph: (names of outputs, inputs besides those of the sample) to the outputs."""


class Loss(ABC):
    """A loss of one graph, made by `loss_of` before the graph is opened."""

    inputs: tuple[str, ...] = ()
    """Inputs of the graph that only the loss feeds."""

    @abstractmethod
    def expected(self, run: Run) -> Array:
        """Run the unchanged graph on a sample; what `lost` is to be given."""

    @abstractmethod
    def lost(self, run: Run, expected: Array) -> float:
        """Run the changed graph on the same sample and compare."""


class TokenLoss(Loss):
    """KL in nats per token, by nodes of the graph."""

    inputs = (REFERENCE,)

    def __init__(self, model: ir.Model) -> None:
        _add_divergence(model)

    def expected(self, run: Run) -> Array:
        (found,) = run([LOG_PROBABILITIES], {REFERENCE: np.zeros((1, 1, 1), np.float32)})
        return np.asarray(found)

    def lost(self, run: Run, expected: Array) -> float:
        (found,) = run([DIVERGENCE], {REFERENCE: expected})
        return max(0.0, float(np.mean(found, dtype=np.float64)))


class VectorLoss(Loss):
    """1 - mean cosine of the pooled outputs, see `onnxpress.runtime.sessions.pool`."""

    def __init__(self, model: ir.Model) -> None:
        self.outputs = [str(output.name) for output in model.graph.outputs]

    def expected(self, run: Run) -> Floats:
        return pool(dict(zip(self.outputs, run(self.outputs, {}), strict=True)))

    def lost(self, run: Run, expected: Array) -> float:
        return float(1 - cosine(expected, self.expected(run)).mean())


def loss_of(model: ir.Model) -> Loss:
    """Choose the loss of a graph, and add to the graph what computes it."""
    language = any(output.name == LOGITS for output in model.graph.outputs)
    return TokenLoss(model) if language else VectorLoss(model)


def _add_divergence(model: ir.Model) -> None:
    """Replace the outputs by log-probabilities, and their KL from the input REFERENCE, by token."""
    graph = model.graph
    (logits,) = [output for output in graph.outputs if output.name == LOGITS]
    reference = ir.Value(
        name=REFERENCE, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([None] * len(logits.shape or [0] * 3))
    )
    graph.inputs.append(reference)
    axes = ir.Value(name="onnxpress.last_axis", const_value=ir.tensor(np.array([-1], np.int64)))
    axes.name = "onnxpress.last_axis"
    assert axes.const_value is not None
    axes.const_value.name = axes.name
    graph.register_initializer(axes)
    log_probabilities = ir.node("LogSoftmax", [logits], {"axis": -1})
    difference = ir.node("Sub", [reference, log_probabilities.outputs[0]])
    probabilities = ir.node("Exp", [reference])
    weighted = ir.node("Mul", [probabilities.outputs[0], difference.outputs[0]])
    total = ir.node("ReduceSum", [weighted.outputs[0], axes], {"keepdims": 0})
    graph.extend([log_probabilities, difference, probabilities, weighted, total])
    for output, name in ((log_probabilities.outputs[0], LOG_PROBABILITIES), (total.outputs[0], DIVERGENCE)):
        output.name, output.type = name, ir.TensorType(ir.DataType.FLOAT)
    graph.outputs[:] = [log_probabilities.outputs[0], total.outputs[0]]

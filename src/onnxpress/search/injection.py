"""Inject errors: what a whole model loses when a part of it computes something else, without building it anew.

To what each group makes, an input of the graph is added: zero, or the very error that a format of the group was seen to
make on the same sample. As nothing before the group has changed, that is what the model with this group in this format
computes; one session does for all groups and formats, and a measurement takes one run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxpress.arrays import Feeds, Floats
from onnxpress.calibration.samples import feed_of
from onnxpress.calibration.subgraphs import session_of
from onnxpress.evaluation.metrics import cosine
from onnxpress.graph.io import copy_graph
from onnxpress.runtime.sessions import pool

Errors = Mapping[str, Floats]
"""What is added to what groups make, by the name of the value."""

LOGITS, REFERENCE, DIVERGENCE = "logits", "onnxpress.reference", "onnxpress.divergence"
ERROR = "onnxpress.error:"
FRUGAL = {"enable_cpu_mem_arena": "0"}
"""The arena would keep what the largest run ever took."""


@contextmanager
def inject(
    model: ir.Model, values: Iterable[str], samples: Sequence[Feeds], threads: int | None = None
) -> Iterator[Callable[[int, Errors], float]]:
    """Yield a function from (sample, errors) to what is lost: KL in nats per token of `logits`, else 1 − mean cosine.

    Args:
        values: names of the values that errors may be added to.
    """
    graph = copy_graph(model)
    for value in values:
        _add_error(graph.graph, value)
    language = any(output.name == LOGITS for output in graph.graph.outputs)
    if language:
        _add_divergence(graph)
    inputs = [value for value in graph.graph.inputs if not value.is_initializer()]
    zeros = {
        str(value.name): np.zeros([1] * len(value.shape or ()), np.float32)
        for value in inputs
        if str(value.name).startswith(ERROR)
    }
    given = [value for value in inputs if str(value.name) not in zeros and value.name != REFERENCE]
    with session_of(graph, threads, FRUGAL) as session:
        outputs = [output.name for output in session.get_outputs()]
        log_probabilities, divergence = f"{LOGITS}.{REFERENCE}", DIVERGENCE

        def feeds(sample: int, errors: Errors) -> dict[str, Any]:
            return {
                **{str(value.name): feed_of(value, samples[sample]) for value in given},
                **zeros,
                **{ERROR + name: error for name, error in errors.items()},
            }

        expected: list[Any] = []
        for sample in range(len(samples)):
            if language:
                nothing = {REFERENCE: np.zeros((1, 1, 1), np.float32)}
                expected += session.run([log_probabilities], feeds(sample, {}) | nothing)
            else:
                expected.append(_vectors(dict(zip(outputs, session.run(outputs, feeds(sample, {})), strict=True))))

        def lost(sample: int, errors: Errors) -> float:
            if language:
                (found,) = session.run([divergence], feeds(sample, errors) | {REFERENCE: expected[sample]})
                return max(0.0, float(np.mean(found, dtype=np.float64)))
            after = _vectors(dict(zip(outputs, session.run(outputs, feeds(sample, errors)), strict=True)))
            return float(1 - cosine(expected[sample], after).mean())

        yield lost


def _vectors(outputs: Mapping[str, Floats]) -> Floats:
    """Pool what two encoders are compared by, see `onnxpress.runtime.sessions.pool`."""
    return pool(outputs)


def _add_error(graph: ir.Graph, name: str) -> None:
    """Add a new graph input to a value."""
    value = next(output for node in graph for output in node.outputs if output.name == name)
    node = value.producer()
    assert node is not None
    rank = len(value.shape) if value.shape is not None else 3
    error = ir.Value(name=ERROR + name, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([None] * rank))
    graph.inputs.append(error)
    plain = f"{name}.without_error"
    add = ir.node("Add", [None, error])
    total = add.outputs[0]
    total.shape, total.type = value.shape, value.type
    ir.convenience.replace_all_uses_with(value, total, replace_graph_outputs=True)
    add.replace_input_with(0, value)
    value.name, total.name = plain, name
    graph.insert_after(node, add)


def _add_divergence(model: ir.Model) -> None:
    """Outputs: log-probabilities, and their KL from the input REFERENCE, by token."""
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
    found = ir.node("LogSoftmax", [logits], {"axis": -1})
    difference = ir.node("Sub", [reference, found.outputs[0]])
    probabilities = ir.node("Exp", [reference])
    weighted = ir.node("Mul", [probabilities.outputs[0], difference.outputs[0]])
    total = ir.node("ReduceSum", [weighted.outputs[0], axes], {"keepdims": 0})
    graph.extend([found, difference, probabilities, weighted, total])
    for output, name in ((found.outputs[0], f"{LOGITS}.{REFERENCE}"), (total.outputs[0], DIVERGENCE)):
        output.name, output.type = name, ir.TensorType(ir.DataType.FLOAT)
    graph.outputs[:] = [found.outputs[0], total.outputs[0]]

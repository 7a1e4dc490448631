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
from onnxpress.calibration.feeds import feed_of
from onnxpress.calibration.subgraphs import session_of
from onnxpress.evaluation.loss import Run, loss_of
from onnxpress.graph.io import copy_graph

Errors = Mapping[str, Floats]
"""What is added to what groups make, by the name of the value."""

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
    loss = loss_of(graph)
    inputs = [value for value in graph.graph.inputs if not value.is_initializer()]
    zeros = {
        str(value.name): np.zeros([1] * len(value.shape or ()), np.float32)
        for value in inputs
        if str(value.name).startswith(ERROR)
    }
    given = [value for value in inputs if str(value.name) not in (*zeros, *loss.inputs)]
    with session_of(graph, threads, FRUGAL) as session:

        def run_on(sample: int, errors: Errors) -> Run:
            feeds: dict[str, Any] = {
                **{str(value.name): feed_of(value, samples[sample]) for value in given},
                **zeros,
                **{ERROR + name: error for name, error in errors.items()},
            }
            return lambda outputs, more: session.run(outputs, {**feeds, **more})

        expected = [loss.expected(run_on(sample, {})) for sample in range(len(samples))]
        yield lambda sample, errors: loss.lost(run_on(sample, errors), expected[sample])


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

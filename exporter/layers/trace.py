"""A torch module to an ONNX graph whose parameters are named but not yet bound to values."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import onnx_ir as ir
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from onnxpress.exporter import aten
from onnxpress.exporter.tracing.dimensions import Dimensions
from onnxpress.exporter.tracing.functions import WholeFunctions
from onnxpress.exporter.tracing.lowering import PLACEHOLDERS
from onnxpress.exporter.tracing.recorder import Recorder, recording
from onnxpress.graph.conventions import MICROSOFT

OPSET = 21
IR_VERSION = 10
VERSIONS = {MICROSOFT: 1, PLACEHOLDERS: 1}


def trace(
    wrapper: nn.Module,
    inputs: tuple[Any, ...],
    dynamic_shapes: tuple[Any, ...],
    input_names: list[str],
    output_names: list[str],
) -> ir.Model:
    """Trace `wrapper`, a module that holds the model as `.model`.

    dynamic_shapes: shaped as `inputs`; for each tensor the names of its free dimensions by axis.

    Parameters of the model are initializers without values, named as in the model's state_dict; every other tensor
    (rotary tables, constants) has its value. Nothing is computed from a parameter: while tracing they have no values.
    Raises CannotRecord for what has no translation, UnsupportedModelError for a dimension that is not free.
    """
    dimensions = Dimensions()
    names = {name: name.removeprefix("model.") for name in wrapper.state_dict() if name.startswith("model.")}
    recorder = Recorder(wrapper, dimensions, names, aten.translate)
    examples, structure = tree_flatten(inputs)
    free = tree_leaves(dynamic_shapes, is_leaf=_is_axes)
    with quiet(), recording(recorder, wrapper.model), WholeFunctions():
        tensors = [
            recorder.input(name, example, axes) for name, example, axes in zip(input_names, examples, free, strict=True)
        ]
        made = wrapper(*tree_unflatten(tensors, structure))
    dimensions.check()
    outputs = [made] if isinstance(made, Tensor) else list(made)
    values = {name: recorder.value(output) for name, output in zip(output_names, outputs, strict=True)}
    graph = recorder.writer.finish(values, OPSET, VERSIONS)
    return ir.Model(graph, ir_version=IR_VERSION)


def _is_axes(entry: Any) -> bool:
    return isinstance(entry, dict) and all(isinstance(key, int) for key in entry)


@contextmanager
def quiet() -> Iterator[None]:
    """torch warns of much that is none of the user's business; errors still raise."""
    # torch's exporter also logs whole graphs as errors before it raises
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logging.disable(level)


def first_line(error: Exception) -> str:
    """The first line of a message that may be pages of an exporter's diagnosis."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__

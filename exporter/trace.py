"""A torch module to an ONNX graph whose parameters are named but not yet bound to values."""

from __future__ import annotations

import logging
import re
import warnings
from contextlib import contextmanager
from typing import Any

import onnx_ir as ir
import onnx_ir.passes.common as common_passes
import onnxscript.optimizer
import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map_only

from onnxpress.errors import UnsupportedModelError

OPSET = 21
IR_VERSION = 10
SCOPES = "pkg.torch.onnx.name_scopes"
"""Metadata under which torch notes the module that a node came from."""
MODULE = "onnxpress.module"
"""Metadata under which we keep it: the innermost module's qualified name."""


def trace(
    wrapper: nn.Module,
    inputs: tuple[Any, ...],
    dynamic_shapes: tuple[Any, ...],
    input_names: list[str],
    output_names: list[str],
) -> ir.Model:
    """Trace `wrapper` (a module that holds the model as `.model`) and tidy up what comes out.

    dynamic_shapes: shaped as `inputs`; for each tensor the names of its free dimensions by axis.

    Parameters of the model are initializers without values, named as in the model's state_dict; every other tensor
    (rotary tables, constants) has its value. Nothing is folded that depends on a parameter: while tracing they have
    no values.
    """
    with quiet(), torch.no_grad():
        free = tree_map_only(str, lambda _: torch.export.Dim.DYNAMIC, dynamic_shapes)
        exported = torch.export.export(wrapper, inputs, dynamic_shapes=free, strict=False)
        program = torch.onnx.export(
            exported,
            args=(),
            dynamo=True,
            optimize=False,
            verbose=False,
            opset_version=OPSET,
            input_names=input_names,
            output_names=output_names,
        )
    assert program is not None
    model: ir.Model = program.model
    _name_dimensions(model, dynamic_shapes)
    parameters = _release_parameters(model, set(wrapper.state_dict()))
    _use_first_source_of_dimensions(model)
    model.graph.inputs.extend(parameters)  # an input is nothing that can be folded
    onnxscript.optimizer.optimize_ir(model, input_size_limit=4096, output_size_limit=4096)
    _drop_idle_reshapes(model)
    common_passes.IdentityEliminationPass()(model)
    common_passes.RemoveUnusedNodesPass()(model)
    for parameter in parameters:
        model.graph.inputs.remove(parameter)
        if parameter.uses():
            model.graph.initializers.add(parameter)
    _note_modules(model)
    model.ir_version = IR_VERSION
    return model


def _name_dimensions(model: ir.Model, dynamic_shapes: tuple[Any, ...]) -> None:
    """Give torch's symbols (s17, s70) the names that were asked for, everywhere in the graph."""
    axes = tree_leaves(
        dynamic_shapes, is_leaf=lambda entry: isinstance(entry, dict) and all(isinstance(k, int) for k in entry)
    )
    names: dict[str, str] = {}
    for graph_input, wanted in zip(model.graph.inputs, axes, strict=True):
        for axis, name in wanted.items():
            dimension = graph_input.shape[axis] if graph_input.shape is not None else None
            if not isinstance(dimension, ir.SymbolicDim) or dimension.value is None:
                raise UnsupportedModelError(f"the model only takes {graph_input.name} with {name} = {dimension}")
            if str(dimension.value).isidentifier():
                names.setdefault(str(dimension.value), name)

    def renamed(dimension: int | ir.SymbolicDim) -> int | ir.SymbolicDim:
        if isinstance(dimension, int) or dimension.value is None:
            return dimension
        return ir.SymbolicDim(
            re.sub(r"[A-Za-z_]\w*", lambda found: names.get(found[0], found[0]), str(dimension.value))
        )

    values = {value for node in model.graph for value in node.outputs} | set(model.graph.inputs)
    for value in values:
        if value.shape is not None:
            value.shape = ir.Shape([renamed(dimension) for dimension in value.shape])
    for graph_input, wanted in zip(model.graph.inputs, axes, strict=True):
        assert graph_input.shape is not None
        graph_input.shape = ir.Shape([wanted.get(axis, dim) for axis, dim in enumerate(graph_input.shape)])


@contextmanager
def quiet() -> Any:
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


def _release_parameters(model: ir.Model, names: set[str]) -> list[ir.Value]:
    """Take the parameters out of the initializers, strip the wrapper's prefix and forget their (uninitialised)
    values."""
    released = []
    for value in list(model.graph.initializers.values()):
        if value.name not in names or not value.name.startswith("model."):
            continue
        model.graph.initializers.pop(value.name)
        value.const_value = None
        value.name = value.name.removeprefix("model.")
        released.append(value)
    return released


def _use_first_source_of_dimensions(model: ir.Model) -> None:
    """Read each named dimension from the first input that has it.

    torch takes any input with the dimension, for example the last layer's cache, whose shape a client may choose
    freely.
    """
    first: dict[str, tuple[ir.Value, int]] = {}
    for graph_input in model.graph.inputs:
        for axis, dimension in enumerate(graph_input.shape or ()):
            if isinstance(dimension, ir.SymbolicDim) and dimension.value is not None:
                first.setdefault(str(dimension.value), (graph_input, axis))
    for node in list(model.graph):
        source = node.inputs[0] if node.op_type == "Shape" else None
        if source is None or not source.is_graph_input() or source.shape is None:
            continue
        axis = node.attributes.get_int("start", 0)
        if node.attributes.get_int("end", len(source.shape)) != axis + 1:
            continue
        best, best_axis = first.get(str(getattr(source.shape[axis], "value", None)), (source, axis))
        if best is not source:
            node.replace_input_with(0, best)
            node.attributes["start"] = ir.AttrInt64("start", best_axis)
            node.attributes["end"] = ir.AttrInt64("end", best_axis + 1)


def _drop_idle_reshapes(model: ir.Model) -> None:
    """Reshape after reshape that ends where it began: heads split off and merged again around a fused operator."""
    for node in list(model.graph):
        if node.op_type not in {"Reshape", "Identity"} or node.domain:
            continue
        output = node.outputs[0]
        source = node.inputs[0]
        while source is not None and not _same_shape(source, output):
            producer = source.producer()
            source = (
                producer.inputs[0] if producer is not None and producer.op_type in {"Reshape", "Identity"} else None
            )
        if source is not None and not output.is_graph_output():
            output.replace_all_uses_with(source)


def _same_shape(first: ir.Value, second: ir.Value) -> bool:
    if first.shape is None or second.shape is None or len(first.shape) != len(second.shape):
        return False
    return all(
        one == other and (isinstance(one, int) or one.value is not None)
        for one, other in zip(first.shape, second.shape, strict=True)
    )


def _note_modules(model: ir.Model) -> None:
    """Replace torch's metadata (stack traces and all) by the name of the module that a node belongs to."""
    for node in model.graph.all_nodes():
        scopes = re.findall(r"'([^']*)'", node.metadata_props.get(SCOPES, ""))
        node.metadata_props.clear()
        modules = [scope for scope in scopes[:-1] if scope.startswith("model.")]
        if modules:
            node.metadata_props[MODULE] = modules[-1].removeprefix("model.")
    for node in reversed(list(model.graph)):  # rewriting loses the place: a node belongs to the module that uses it
        users = [user for output in node.outputs for user in output.consumers() if MODULE in user.metadata_props]
        if users and MODULE not in node.metadata_props:
            node.metadata_props[MODULE] = users[0].metadata_props[MODULE]
    for value in [*model.graph.inputs, *model.graph.initializers.values()]:
        value.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.metadata_props.clear()


def first_line(error: Exception) -> str:
    """Of a message that may be pages of an exporter's diagnosis."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__

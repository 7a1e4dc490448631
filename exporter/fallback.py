"""Models that cannot be traced our way go through transformers' own exporter: unfused, every layer traced, all
weights in memory. What comes out is verified like every other graph."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import onnx_ir as ir
import torch
from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

from onnxpress.errors import UnsupportedModelError
from onnxpress.exporter.encoder import OUTPUTS, example_inputs
from onnxpress.exporter.layers.trace import IR_VERSION, OPSET, first_line, quiet
from onnxpress.exporter.sources.parameters import match_parameters
from onnxpress.exporter.sources.torch_arrays import to_torch
from onnxpress.graph.tensors import WeightTensor


def export_unfused(model_class: Any, config: Any, task: str, tensors: Mapping[str, WeightTensor], why: str) -> ir.Model:
    """The graph of an encoder or classifier, weights included.

    Raises UnsupportedModelError, saying both why the first way and why this one failed.
    """
    model = model_class._from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
    parameters = model.state_dict()
    with torch.no_grad():
        for name, tensor in match_parameters(model, tensors).items():
            parameters[name].copy_(to_torch(tensor.checked(name).numpy()))
    inputs, free = example_inputs(model, config)
    shapes = {name: dict.fromkeys(axes, torch.export.Dim.DYNAMIC) for name, axes in free.items()}
    try:
        with quiet():
            graph: ir.Model = (
                OnnxExporter()
                .export(model, inputs, config=OnnxConfig(dynamic=True, dynamic_shapes=shapes, opset_version=OPSET))
                .program
            )
    except Exception as error:
        raise UnsupportedModelError(
            f"{type(model).__name__} cannot be exported: {why}; unfused: {first_line(error)}",
            hint="an ONNX file made by other means can be optimized with: onnxpress optimize",
        ) from error
    outputs = {output.name: output for output in graph.graph.outputs}
    missing = [name for name in OUTPUTS[task] if name not in outputs]
    if missing:
        raise UnsupportedModelError(f"{type(model).__name__} has no output {missing[0]} for the task {task}")
    graph.graph.outputs.clear()
    graph.graph.outputs.extend(outputs[name] for name in OUTPUTS[task])
    for graph_input in graph.graph.inputs:
        assert graph_input.shape is not None
        assert graph_input.name is not None
        axes = free[graph_input.name]
        graph_input.shape = ir.Shape([axes.get(axis, dimension) for axis, dimension in enumerate(graph_input.shape)])
    graph.ir_version = IR_VERSION
    return graph

"""Run a part of a graph: between some of its values and others."""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import onnx_ir as ir
import onnx_ir.passes.common as common_passes

from onnxpress.graph.io import copy_graph, save_graph
from onnxpress.graph.tensors import FileTensor

if TYPE_CHECKING:
    import onnxruntime


def values_by_name(graph: ir.Graph) -> dict[str, ir.Value]:
    """Every value of a graph, subgraphs aside."""
    values = {str(value.name): value for value in graph.inputs}
    values |= {str(output.name): output for node in graph for output in node.outputs}
    return values


def extract_subgraph(model: ir.Model, inputs: Mapping[str, ir.DataType], outputs: Sequence[str]) -> ir.Model:
    """The part of a graph that computes `outputs` from `inputs` and weights, as a graph of its own.

    Args:
        inputs: the type of each value that the part starts from, by its name.

    Weights are shared and stay lazy.
    """
    graph = ir.convenience.extract(model.graph, list(inputs), list(outputs))
    part = copy_graph(ir.Model(graph, ir_version=model.ir_version))
    for value in part.graph.inputs:
        value.type, value.shape = ir.TensorType(inputs[str(value.name)]), None
    read = {value for node in ir.traversal.RecursiveGraphIterator(part.graph) for value in node.inputs}
    part.graph.inputs[:] = [value for value in part.graph.inputs if value in read]
    if any(value.type is None for value in part.graph.outputs):
        common_passes.ShapeInferencePass()(part)
    for value in part.graph.outputs:
        value.type = value.type or ir.TensorType(ir.DataType.FLOAT)
        value.shape = None
    return part


@contextmanager
def session_of(
    part: ir.Model, threads: int | None = None, session_options: Mapping[str, str] | None = None
) -> Iterator[onnxruntime.InferenceSession]:
    """A session for a graph; weights that lie in files are mapped where they are, if their folder can be written."""
    from onnxpress.runtime.sessions import open_session

    weights = [value.const_value for value in part.graph.initializers.values()]
    folders = Counter[Path]()
    for weight in weights:
        if isinstance(weight, FileTensor):
            folders[weight.path.parent] += weight.nbytes
    place = max(folders, key=lambda folder: folders[folder], default=None)
    if place is None or not os.access(place, os.W_OK):
        with tempfile.TemporaryDirectory(prefix="onnxpress-") as folder:
            path = Path(folder) / "part.onnx"
            save_graph(part, path, external_data="part.onnx_data")
            yield open_session(path, session_options, threads)
        return
    handle, name = tempfile.mkstemp(".onnx", "part_", place)
    os.close(handle)
    path, data = Path(name), Path(f"{name}_data")
    try:
        save_graph(part, path, external_data=data.name, reuse=place)
        session = open_session(path, session_options, threads)
        path.unlink()  # it is open; a process that is killed from here on leaves nothing behind
        data.unlink(missing_ok=True)
        yield session
    finally:
        path.unlink(missing_ok=True)
        data.unlink(missing_ok=True)

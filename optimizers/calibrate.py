"""What activations look like: run a graph on sample inputs and look at values inside it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes.common import RemoveUnusedNodesPass

from onnxpress.errors import UsageError
from onnxpress.graph_io import copy_graph, save_graph
from onnxpress.optimizers.base import Pass
from onnxpress.tensors import FileTensor

Feeds = Mapping[str, NDArray[Any]]
PAST = "past_key_values."
NO_SAMPLES = "no sample inputs for this graph"


class CalibratedPass(Pass):
    """A pass that looks at activations; the driver sets `samples` before it runs it."""

    samples: Sequence[Feeds] = ()
    """Inputs by name, each one run of the graph; an empty key/value cache may be left out."""

    @property
    def needs_samples(self) -> bool:
        """Whether this pass, with its options, reads `samples` at all."""
        return True

    def has_samples_for(self, model: ir.Model) -> bool:
        """Whether there are samples and they feed all inputs of this graph."""
        names = {str(value.name) for value in model.graph.inputs if not value.is_initializer()}
        return bool(self.samples) and all(
            name in sample or name.startswith(PAST) for sample in self.samples for name in names
        )


def observe(
    model: ir.Model, values: Sequence[ir.Value], samples: Sequence[Feeds]
) -> Iterator[dict[str, NDArray[np.float32]]]:
    """Run `model` in onnxruntime once per sample; yields `values` [tokens, features] by name."""
    import onnxruntime

    names = [str(value.name) for value in values]
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    with _tapped(model, names) as path:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        inputs = {node.name: node for node in session.get_inputs()}
        for sample in samples:
            feeds = {name: sample[name] if name in sample else _empty(inputs[name], sample) for name in inputs}
            results = session.run(names, feeds)
            yield {name: result.reshape(-1, result.shape[-1]) for name, result in zip(names, results, strict=True)}


@contextmanager
def _tapped(model: ir.Model, names: Sequence[str]) -> Iterator[Path]:
    """A file with only what `names` need, these being its outputs. Weights that lie in one folder stay there."""
    copy = copy_graph(model)
    inside = {str(value.name): value for node in copy.graph for value in node.outputs}
    inside |= {str(value.name): value for value in copy.graph.inputs}
    copy.graph.outputs[:] = [inside[name] for name in names]
    for value in copy.graph.outputs:
        value.type = value.type or ir.TensorType(ir.DataType.FLOAT)
    RemoveUnusedNodesPass()(copy)
    weights = [value.const_value for value in copy.graph.initializers.values()]
    folders = {weight.path.parent for weight in weights if isinstance(weight, FileTensor)}
    home = folders.pop() if len(folders) == 1 else None
    if home is not None and os.access(home, os.W_OK):
        handle, name = tempfile.mkstemp(".onnx", "observed_", home)
        os.close(handle)
        data = Path(f"{name}_data")
        try:
            save_graph(copy, name, external_data=data.name, reuse=home)
            yield Path(name)
        finally:
            Path(name).unlink(missing_ok=True)
            data.unlink(missing_ok=True)
    else:
        with tempfile.TemporaryDirectory(prefix="onnxpress-") as folder:
            path = Path(folder) / "observed.onnx"
            save_graph(copy, path, external_data="observed.data")
            yield path


def _empty(node: Any, sample: Feeds) -> NDArray[Any]:
    """An input that the sample leaves out: a cache [batch, heads, 0, head_dim] of nothing."""
    if not node.name.startswith(PAST):
        raise UsageError(f"the samples have no {node.name}, which the graph needs")
    batch = next(iter(sample.values())).shape[0]
    kinds = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
    return np.zeros((batch, node.shape[1], 0, node.shape[3]), kinds[node.type])

"""Small graphs from ONNX text, and the checks of any pass: golden listing, equal numbers, no change when run again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from onnxpress.arrays import Array
from onnxpress.artifact.artifact import Source
from onnxpress.graph.io import copy_graph
from onnxpress.optimizers.base import PassResult

HEADER = '<ir_version: 10, opset_import: ["": 21, "com.microsoft": 1]>\n'


def make_graph(text: str, *, header: str = HEADER, **weights: Array | ir.TensorProtocol) -> ir.Model:
    """A model from ONNX text; graph inputs named in `weights` (with `.` for `__`) become initializers."""
    model = ir.from_onnx_text(header + text)
    inputs = {value.name: value for value in model.graph.inputs}
    for name, weight in weights.items():
        tensor = ir.tensor(weight) if isinstance(weight, np.ndarray) else weight
        value = inputs[name]
        model.graph.inputs.remove(value)
        value.const_value, value.shape, value.type = tensor, ir.Shape(tensor.shape), ir.TensorType(tensor.dtype)
        value.name = name.replace("__", ".")
        model.graph.register_initializer(value)
    return model


def run_graph(model: ir.Model, feeds: Mapping[str, Array]) -> list[Array]:
    """The outputs according to onnxruntime with its own optimizations off."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return session.run(None, dict(feeds))


def list_nodes(model: ir.Model) -> str:
    """The graph as text, one line per node: outputs = Operator[attributes](inputs)."""
    lines = []
    for node in model.graph:
        attributes = [
            f"{name}={attribute.value:.6g}" if attribute.type == ir.AttributeType.FLOAT else f"{name}={attribute.value}"
            for name, attribute in sorted(node.attributes.items())
            if attribute.type not in (ir.AttributeType.TENSOR, ir.AttributeType.GRAPH)
        ]
        brackets = f"[{', '.join(attributes)}]" if attributes else ""
        inputs = ", ".join("" if value is None else str(value.name) for value in node.inputs)
        outputs = ", ".join(str(value.name) for value in node.outputs)
        lines.append(f"{outputs} = {node.op_type}{brackets}({inputs})")
    return "\n".join(lines)


def assert_well_formed(model: ir.Model) -> None:
    """What must hold for any graph: names are unique, values are defined before they are read, operator sets known."""
    for graph in model.graphs():
        known = {*graph.inputs, *graph.initializers.values()}
        for node in graph:
            for value in node.inputs:
                assert value is None or value in known or value.graph is not graph, (
                    f"{value} is read before it is defined"
                )
            known.update(node.outputs)
        assert all(value in known for value in graph.outputs)
        names = [value.name for value in known if value.name]
        assert len(names) == len(set(names)), "two values have one name"
        domains = {node.domain for node in graph}
        assert domains <= set(model.opset_imports), f"operator set of {domains} is not declared"


def unread_weights(model: ir.Model) -> set[str]:
    return {
        name for name, value in model.graph.initializers.items() if not value.uses() and not value.is_graph_output()
    }


@dataclass
class Checked:
    """What came of a pass."""

    model: ir.Model
    result: PassResult
    listing: str


def check_pass(
    optimizer: Callable[[ir.Model], Any],
    model: ir.Model,
    feeds: Mapping[str, Array],
    *,
    golden: str | None = None,
    tolerance: float = 1e-5,
    relative: float = 1e-5,
) -> Checked:
    """Run a pass (or its `run` with a context) on a copy and assert all that holds for any pass.

    The graph becomes `golden` (when given), its inputs and outputs keep name, dtype and shape, its outputs agree with
    those of the untouched graph, and a second run finds nothing more to do.
    """
    before = run_graph(model, feeds)
    copy = model.clone()
    result = optimizer(copy)
    assert isinstance(result, PassResult)
    assert_well_formed(copy)
    assert unread_weights(copy) <= unread_weights(model), "the pass leaves weights behind that nothing reads"
    listing = list_nodes(copy)
    if golden is not None:
        assert listing == "\n".join(line.strip() for line in golden.strip().splitlines())
    for ours, theirs in zip(
        [*copy.graph.inputs, *copy.graph.outputs], [*model.graph.inputs, *model.graph.outputs], strict=True
    ):
        assert (ours.name, ours.dtype, ours.shape) == (theirs.name, theirs.dtype, theirs.shape)
    for got, want in zip(run_graph(copy, feeds), before, strict=True):
        assert got.dtype == want.dtype
        np.testing.assert_allclose(got, want, atol=tolerance, rtol=relative)
    again = optimizer(copy)
    assert isinstance(again, PassResult)
    assert not again.report.matched, f"a second run matched {dict(again.report.matched)}"
    assert list_nodes(copy) == listing
    return Checked(copy, result, listing)


@pytest.fixture
def graph() -> Callable[..., ir.Model]:
    return make_graph


@pytest.fixture
def run() -> Callable[..., list[Array]]:
    return run_graph


@pytest.fixture
def listing() -> Callable[[ir.Model], str]:
    return list_nodes


@pytest.fixture
def check() -> Callable[..., Checked]:
    return check_pass


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., ir.Model]:
    """`exported("llama")`, `exported("t5", "decoder_model")`: tiny graphs of our exporter, each exported once."""

    @cache
    def graphs(name: str) -> dict[str, ir.Model]:
        from onnxpress.exporter import architectures
        from onnxpress.exporter.export import export
        from onnxpress.exporter.sources.checkpoint import load_folder

        folder = tmp_path_factory.mktemp(name)
        architectures.tiny_model(name, folder)
        task = architectures.catalog()[name]["task"]
        return dict(export(load_folder(folder, Source(name, "huggingface-folder")), task=task, remember=False).graphs)

    return lambda name, stem="model": copy_graph(graphs(name)[stem])

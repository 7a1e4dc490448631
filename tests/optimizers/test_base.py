"""The contract of a pass: with a context and without, and the hook for what lies beside the graph."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import FrozenInstanceError
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from onnxpress.artifact.artifact import Artifact, Source
from onnxpress.calibration.calibration import Calibration
from onnxpress.graph.report import Report
from onnxpress.optimizers import registry
from onnxpress.optimizers.base import Context, Pass


class CountSamples(Pass):
    name = "count-samples"
    needs_samples = True

    def apply(self, model: ir.Model, context: Context, report: Report) -> None:
        for _ in context.calibration.samples:
            report.match("samples")


@pytest.fixture
def model(graph: Callable[..., ir.Model]) -> ir.Model:
    return graph("g (float[N, 4] x) => (float[N, 4] y) { y = Relu(x) }")


def test_a_pass_sees_its_context_and_keeps_nothing_of_it(model: ir.Model) -> None:
    optimizer = CountSamples()
    result = optimizer.run(model, Context(Calibration([{"x": np.zeros((2, 4), np.float32)}])))
    assert result.modified
    assert result.report.matched == {"samples": 1}
    again = optimizer(model)  # as onnx_ir runs its passes
    assert not again.modified


def test_a_context_is_not_edited() -> None:
    with pytest.raises(FrozenInstanceError):
        Context().calibration = Calibration()  # type: ignore[misc]


def test_contexts_share_no_results() -> None:
    assert Context().known is not Context().known
    assert Context().calibration.walks is not Context().calibration.walks


def test_nothing_follows_by_default(model: ir.Model, tmp_path: Path) -> None:
    artifact = Artifact("text-generation", {"model": model}, {}, {}, Source("x", "onnx"))
    assert CountSamples().follow(artifact, tmp_path / "new") is artifact
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", sorted(registry.PASSES))
def test_all_passes_say_what_they_need(name: str) -> None:
    cls = registry.pass_class(name)
    assert isinstance(cls.needs_reference, bool)
    assert cls.wanted_rows > 0
    assert cls.wanted_length > 0

"""The one loop of fitted passes: stages in order, results of a killed run, results of another graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from onnxpress.calibration.calibration import Calibration
from onnxpress.calibration.known_results import KnownResults, Result
from onnxpress.calibration.walk import WalkStep
from onnxpress.errors import BadInputError
from onnxpress.graph.io import copy_graph
from onnxpress.graph.linear import Linear, find_linears, read_linear
from onnxpress.graph.report import Report
from onnxpress.optimizers.base import Context
from onnxpress.optimizers.fitting.blockwise import (
    ERROR,
    Arrays,
    by_input,
    fit_blockwise,
    require_tokens,
    second_moments,
)

NAMES = ("h.0.up", "h.0.down", "h.1.up", "h.1.down")
TEXT = """g (int64[batch_size, n] input_ids, float[60, 16] table, float[16, 24] h__0__up, float[24, 16] h__0__down,
    float[16, 24] h__1__up, float[24, 16] h__1__down) => (float[batch_size, n, 16] y) {
        e = Gather (table, input_ids)
        a = MatMul (e, h__0__up)  b = Tanh (a)  c = MatMul (b, h__0__down)  d = Add (e, c)
        f = MatMul (d, h__1__up)  i = Tanh (f)  j = MatMul (i, h__1__down)  y = Add (d, j) }"""


class KilledError(Exception):
    pass


@pytest.fixture
def model(graph: Callable[..., ir.Model], rng: np.random.Generator) -> ir.Model:
    layer = {"up": (16, 24), "down": (24, 16)}
    shapes = {"table": (60, 16)} | {f"h__{i}__{name}": shape for i in (0, 1) for name, shape in layer.items()}
    return graph(TEXT, **{name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()})


def samples(seed: int = 0) -> list[dict[str, Any]]:
    return [{"input_ids": np.random.default_rng(seed).integers(0, 60, (2, 8))}]


def shrink(model: ir.Model, context: Context, **options: Any) -> tuple[list[str], Report]:
    """A method for the tests: divide each weight by the mean square of what it reads; the weights that were solved."""
    solved: list[str] = []
    report = Report()

    def solve(step: WalkStep, linears: Sequence[Linear]) -> dict[str, Arrays]:
        energy = np.diagonal(second_moments(step, linears)).mean()
        solved.extend(linear.name for linear in linears)
        return {linear.name: {"weight": read_linear(linear) / energy, ERROR: np.array([energy])} for linear in linears}

    def put(linear: Linear, result: Result) -> None:
        linear.weight.const_value = ir.tensor(result["weight"].numpy().astype(np.float32), name=linear.name)

    fit_blockwise(
        model,
        context,
        report,
        fit="shrink",
        options=(),
        stages=by_input(list(find_linears(model.graph))),
        solve=solve,
        put=put,
        by_product=True,
        **options,
    )
    return solved, report


def weights(model: ir.Model) -> dict[str, np.ndarray]:
    return {linear.name: read_linear(linear) for linear in find_linears(model.graph)}


def test_each_weight_is_fitted_once_in_order_and_its_error_reported(model: ir.Model) -> None:
    solved, report = shrink(model, Context(Calibration(samples())))
    assert solved == list(NAMES)
    assert list(report.errors) == list(NAMES)


def test_later_weights_see_what_became_of_those_before(model: ir.Model) -> None:
    apart = copy_graph(model)
    _, together = shrink(model, Context(Calibration(samples())))
    _, untouched = shrink(apart, Context(Calibration(samples())), feed="original")
    assert together.errors["h.0.up"] == pytest.approx(untouched.errors["h.0.up"])
    assert together.errors["h.0.down"] != pytest.approx(untouched.errors["h.0.down"])


def test_another_graph_gets_the_same_weights(model: ir.Model) -> None:
    other, known = copy_graph(model), KnownResults()
    table = other.graph.initializers["h.1.down"]
    assert table.const_value is not None
    table.const_value = ir.tensor(table.const_value.numpy() * np.float32(1.01))  # another weight of the same name
    shrink(model, Context(Calibration(samples()), known=known))
    solved, report = shrink(other, Context(Calibration(samples(1)), known=known))
    assert solved == ["h.1.down"]
    assert list(report.errors) == ["h.1.down"]
    ours, theirs = weights(model), weights(other)
    assert [name for name in NAMES if (ours[name] != theirs[name]).any()] == ["h.1.down"]


def test_a_fit_may_be_done_anew_in_each_graph(model: ir.Model) -> None:
    other, known = copy_graph(model), KnownResults()
    shrink(model, Context(Calibration(samples()), known=known), once=False)
    solved, _ = shrink(other, Context(Calibration(samples(1)), known=known), once=False)
    assert solved == list(NAMES)


def test_a_run_that_was_killed_goes_on(model: ir.Model, tmp_path: Path) -> None:
    expected, killed, resumed = copy_graph(model), copy_graph(model), copy_graph(model)
    shrink(expected, Context(Calibration(samples())))

    def kill(done: int, _: int) -> None:
        if done == 3:
            raise KilledError

    with pytest.raises(KilledError):
        shrink(killed, Context(Calibration(samples(), tmp_path, progress=kill)))
    solved, report = shrink(resumed, Context(Calibration(samples(), tmp_path)))
    assert 0 < len(solved) < len(NAMES)
    assert list(report.errors) == list(NAMES), "those that are read from files as well"
    for name, weight in weights(expected).items():
        np.testing.assert_array_equal(weights(resumed)[name], weight, name)


def test_too_few_tokens() -> None:
    with pytest.raises(BadInputError, match="gptq has 16 tokens to calibrate with; it needs at least 256") as error:
        require_tokens(Calibration(samples()), "gptq", "method = least-squares")
    assert "method = least-squares" in str(error.value.hint)
    require_tokens(Calibration(), "gptq", "method = least-squares")

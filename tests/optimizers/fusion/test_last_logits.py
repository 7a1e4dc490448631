"""last-logits: the head computes the newest position only, and what it computes is what it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from onnxpress.graph.logits import restore_logits
from onnxpress.optimizers.fusion.last_logits import LastLogits

Make = Callable[..., ir.Model]
Run = Callable[..., list[NDArray[Any]]]
generator = np.random.default_rng(0)
HEAD = generator.standard_normal((8, 16)).astype(np.float32)
IDS = np.array([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]], np.int64)
TABLE = generator.standard_normal((10, 8)).astype(np.float32)

PLAIN = """g (int64[batch_size, sequence_length] ids, float[10, 8] table, float[8, 16] head)
    => (float[batch_size, sequence_length, 16] logits)
{
    h = Gather(table, ids)
    logits = MatMul(h, head)
}"""
CAPPED = """g (int64[batch_size, sequence_length] ids, float[10, 8] table, float[8, 16] head, float cap)
    => (float[batch_size, sequence_length, 16] logits)
{
    h = Gather(table, ids)
    product = MatMul(h, head)
    small = Div(product, cap)
    bent = Tanh(small)
    logits = Mul(bent, cap)
}"""


@pytest.mark.parametrize(("text", "extra"), [(PLAIN, {}), (CAPPED, {"cap": np.array(3.0, np.float32)})])
def test_the_last_position_is_kept_as_it_was(graph: Make, run: Run, text: str, extra: dict[str, Any]) -> None:
    model = graph(text, table=TABLE, head=HEAD, **extra)
    (everything,) = run(model, {"ids": IDS})
    result = LastLogits()(model)
    assert result.report.matched == {"MatMul of logits": 1}
    assert [str(dim) for dim in model.graph.outputs[0].shape or ()] == ["batch_size", "1", "16"]
    (last,) = run(model, {"ids": IDS})
    np.testing.assert_allclose(last, everything[:, -1:], atol=1e-6)


MASKED = PLAIN.replace("] ids", "] input_ids, int64[batch_size, total] attention_mask").replace(
    "table, ids", "table, input_ids"
)
MASKS = np.array([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0], [1, 1, 0, 1, 0, 0]], np.int64)


@pytest.mark.parametrize("length", [1, 4, 6])
def test_the_newest_attended_token_of_each_row(graph: Make, run: Run, length: int) -> None:
    """Rows padded left, right and with a hole; the mask also covers the past."""
    model = graph(MASKED, table=TABLE, head=HEAD)
    feeds = {"input_ids": generator.integers(0, 10, (4, length)), "attention_mask": MASKS}
    (everything,) = run(model, feeds)
    LastLogits()(model)
    (last,) = run(model, feeds)
    assert last.shape == (4, 1, 16)
    for row in range(4):
        fresh = np.flatnonzero(MASKS[row, -length:])
        if len(fresh):
            np.testing.assert_allclose(last[row, 0], everything[row, fresh[-1]], atol=1e-6)


def test_the_cut_can_be_undone(graph: Make, run: Run) -> None:
    model = graph(PLAIN, table=TABLE, head=HEAD)
    assert not restore_logits(model)
    (before,) = run(model, {"ids": IDS})
    LastLogits()(model)
    assert restore_logits(model)
    np.testing.assert_array_equal(run(model, {"ids": IDS})[0], before)
    assert not restore_logits(model)


def test_a_second_run_finds_nothing(graph: Make) -> None:
    model = graph(PLAIN, table=TABLE, head=HEAD)
    LastLogits()(model)
    again = LastLogits()(model)
    assert not again.report.matched
    assert again.report.skipped == {"logits has one position already": 1}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (PLAIN.replace("logits", "scores"), "no output logits"),
        (PLAIN.replace("logits = MatMul(h, head)", 'logits = Einsum<equation = "bsh,hv->bsv">(h, head)'), "no product"),
        # A factor of its own per position: cutting the head alone would broadcast it back to all positions.
        (
            PLAIN.replace(
                "logits = MatMul(h, head)",
                "axis = Constant<value = int64[1] {2}>()\n product = MatMul(h, head)\n"
                "size = ReduceL2<keepdims = 1>(h, axis)\n logits = Mul(product, size)",
            ),
            "no product",
        ),
    ],
)
def test_near_misses_are_left_alone(graph: Make, run: Run, text: str, reason: str) -> None:
    model = graph(text, table=TABLE, head=HEAD)
    (before,) = run(model, {"ids": IDS})
    report = LastLogits()(model).report
    assert not report.matched
    assert next(iter(report.skipped)).startswith(reason)
    np.testing.assert_array_equal(run(model, {"ids": IDS})[0], before)

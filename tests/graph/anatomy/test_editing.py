"""Edits of products and attentions: what they put is what the graph computes with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from onnxpress.errors import UnsupportedModelError
from onnxpress.graph.anatomy import anatomy_of
from onnxpress.graph.anatomy.editing import (
    forget_shapes,
    keep_weight,
    read_weight,
    require_editable,
    select_part,
    set_bias,
    set_heads,
    set_weight,
)

Exported = Callable[..., ir.Model]
Run = Callable[..., list[Any]]
LLAMA = {
    "input_ids": np.array([[1, 5, 9, 2, 7]]),
    "attention_mask": np.ones((1, 5), np.int64),
    **{
        f"past_key_values.{i}.{kind}": np.zeros((1, 1, 0, 16), np.float32)
        for i in range(4)
        for kind in ("key", "value")
    },
}


def test_keeping_one_group_of_heads_is_what_the_rest_being_zero_computes(exported: Exported, run: Run) -> None:
    """4 query heads share 2 kv heads: the second group goes, its part of the output's weight being zero."""
    zeroed, cut = exported("llama"), exported("llama")
    feeds = {**LLAMA}
    for model, remove in ((zeroed, False), (cut, True)):
        anatomy = anatomy_of(model)
        forget_shapes(anatomy)
        for block in anatomy.blocks:
            (attention,) = block.attentions
            assert attention.key is not None
            assert attention.value is not None
            assert attention.output is not None
            weight = read_weight(attention.output)
            weight[32:] = 0
            set_weight(attention.output, weight)
            if remove:
                keep_weight(attention.query, None, np.arange(32))
                keep_weight(attention.key, None, np.arange(16))
                keep_weight(attention.value, None, np.arange(16))
                keep_weight(attention.output, np.arange(32), None)
                set_heads(attention, 2, 1, 16)
    expected = run(zeroed, {k: v if "past" not in k else np.zeros((1, 2, 0, 16), np.float32) for k, v in feeds.items()})
    found = run(cut, feeds)
    np.testing.assert_allclose(found[0], expected[0], atol=1e-5)
    assert found[1].shape == (1, 1, 5, 16)
    again = anatomy_of(cut).blocks[0].attentions[0]
    assert (again.heads, again.kv_heads, again.head_dim) == (2, 1, 16)
    past = next(value for value in cut.graph.inputs if value.name == "past_key_values.0.key")
    present = next(value for value in cut.graph.outputs if value.name == "present.0.key")
    assert past.shape is not None
    assert present.shape is not None
    assert (past.shape[1], present.shape[1]) == (1, 1)


def test_a_bias_where_there_was_none_and_where_there_was(graph: Callable[..., ir.Model], run: Run) -> None:
    model = graph(
        "g (float[2, 3] x, float[3, 4] a__weight, float[4, 4] b__weight, float[4] b__bias) => (float[2, 4] y) "
        "{ h = MatMul(x, a__weight) \n p = MatMul(h, b__weight) \n y = Add(p, b__bias) }",
        a__weight=np.ones((3, 4), np.float32),
        b__weight=np.eye(4, dtype=np.float32),
        b__bias=np.ones(4, np.float32),
    )
    from onnxpress.graph.anatomy import find_products

    first, second = find_products(model.graph)
    set_bias(first, np.arange(4))
    set_bias(second, np.full(4, 10.0))
    (y,) = run(model, {"x": np.zeros((2, 3), np.float32)})
    np.testing.assert_array_equal(y, [[10, 11, 12, 13]] * 2)
    assert "a.bias" in model.graph.initializers


def test_a_weight_that_others_read_is_refused(exported: Exported) -> None:
    anatomy = anatomy_of(exported("llama"))
    assert anatomy.head is not None
    with pytest.raises(UnsupportedModelError, match="shared"):
        require_editable(anatomy.head)
    require_editable(anatomy.blocks[0].products[0])


@pytest.mark.parametrize("rows", [None, [2, 0, 1, 2], []])
@pytest.mark.parametrize("columns", [None, [1, 3], []])
def test_selected_rows_and_columns(rows: list[int] | None, columns: list[int] | None) -> None:
    matrix = np.arange(12, dtype=np.float32).reshape(3, 4)
    picked = [None if one is None else np.array(one, np.int64) for one in (rows, columns)]
    expected = matrix if picked[0] is None else matrix[picked[0]]
    expected = expected if picked[1] is None else expected[:, picked[1]]
    np.testing.assert_array_equal(select_part(ir.tensor(matrix), *picked).numpy(), expected)

"""Plans from sizes to sizes, and requests that are refused."""

from __future__ import annotations

from typing import Any

import pytest

from onnxpress.errors import UsageError
from onnxpress.optimizers.heads.maths.request import HeadRequest, Sizes, Wanted, plan_heads, plan_resampling


@pytest.mark.parametrize(
    ("before", "wanted", "dropped", "after"),
    [
        ((9, 3, 64), (6, None, None), (6, 3), (6, 3, 64)),
        ((9, 3, 64), (None, 2, None), (6, 2), (6, 2, 64)),
        ((9, 3, 64), (2, 2, 32), (2, 2), (2, 2, 32)),
        ((12, 12, 32), (4, None, 16), (4, 4), (4, 4, 16)),
        ((32, 32, 128), (None, 8, None), (32, 32), (32, 8, 128)),
        ((32, 32, 128), (16, 4, None), (16, 16), (16, 4, 128)),
        ((9, 3, 64), (9, 1, None), (9, 3), (9, 1, 64)),
        ((8, 4, 16), (6, 1, None), (6, 3), (6, 1, 16)),
        ((12, 12, 32), (12, None, None), (12, 12), (12, 12, 32)),
    ],
)
def test_plans(before: Sizes, wanted: Wanted, dropped: tuple[int, int], after: Sizes) -> None:
    plan = plan_heads(before, wanted, "layer 0")
    assert (plan.dropped, plan.after) == (dropped, after)
    assert plan.changes is (before != after)
    assert plan.merges is (dropped[1] != after[1])


@pytest.mark.parametrize(
    ("before", "wanted", "message"),
    [
        ((9, 3, 64), (12, None, None), r"layer 0 has heads 9; it cannot be reduced to 12"),
        ((9, 3, 64), (7, None, None), r"7 query heads cannot share 3 key/value heads evenly"),
        ((9, 3, 64), (None, None, 0), r"head_dim 64; it cannot be reduced to 0"),
        ((9, 3, 64), (None, 4, None), r"heads 9; it cannot be reduced to 12"),
        ((6, 3, 64), (6, 2, None), r"cannot become 6 over 2"),
    ],
)
def test_refusals(before: Sizes, wanted: Wanted, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        plan_heads(before, wanted, "layer 0")


def test_resampling_takes_the_sizes_of_the_founding_example() -> None:
    for heads, head_dim in ((32, 128), (128, 32)):
        plan = plan_resampling((heads, heads, head_dim), (8, None, 32), "layer 0")
        assert plan.after == (8, 8, 32)
    assert plan_resampling((9, 3, 64), (4, 2, None), "layer 0").after == (4, 2, 64)
    with pytest.raises(UsageError, match="evenly"):
        plan_resampling((9, 3, 64), (4, None, None), "layer 0")


@pytest.mark.parametrize(
    ("before", "ratio", "heads"),
    [
        ((9, 3, 64), 0.67, 6),  # SmolLM2: three groups of three
        ((9, 3, 64), 0.5, 6),  # a tie: the larger
        ((9, 3, 64), 0.49, 3),
        ((9, 3, 64), 0.9, 9),
        ((9, 3, 64), 0.01, 3),
        ((12, 12, 32), 0.67, 8),  # MiniLM: no groups
        ((12, 12, 32), 0.01, 1),
        ((32, 8, 128), 0.8, 24),
        ((8, 1, 16), 0.4, 3),
    ],
)
def test_a_share_of_the_heads_is_the_nearest_number_that_divides(before: Sizes, ratio: float, heads: int) -> None:
    wanted = HeadRequest(ratio=ratio, head_dim=16).wanted(before)
    assert wanted == (heads, None, 16)
    assert plan_heads(before, wanted, "layer 0").after == (heads, min(before[1], heads), 16)


@pytest.mark.parametrize(
    ("before", "ratio", "after"),
    [
        ((9, 3, 64), 0.67, (6, 2, 64)),
        ((9, 3, 64), 0.1, (3, 1, 64)),
        ((32, 8, 128), 0.65, (20, 5, 128)),
        ((12, 12, 32), 0.4, (12, 4, 32)),  # merged: a divisor of the heads
        ((12, 12, 32), 0.8, (12, 12, 32)),
    ],
)
def test_a_share_of_the_key_value_heads(before: Sizes, ratio: float, after: Sizes) -> None:
    wanted = HeadRequest(kv_ratio=ratio).wanted(before)
    assert plan_heads(before, wanted, "layer 0").after == after
    assert plan_resampling(before, wanted, "layer 0").after == after


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "say how many heads are to stay"),
        ({"ratio": 0.5, "heads": 2, "head_dim": 16}, "give ratio, a share of the heads, without heads$"),
        ({"ratio": 0.5, "kv_heads": 2}, "without kv_heads"),
        ({"ratio": 0.5, "kv_ratio": 0.5}, "without kv_ratio"),
        ({"kv_ratio": 0.5, "heads": 4, "kv_heads": 2}, "give kv_ratio, .* without heads and kv_heads"),
        ({"ratio": 0.0}, "above 0 and up to 1: 0.0"),
        ({"kv_ratio": 1.5}, "kv_ratio is a share of the heads, above 0 and up to 1: 1.5"),
    ],
)
def test_requests_that_contradict_themselves(options: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        HeadRequest(**options)

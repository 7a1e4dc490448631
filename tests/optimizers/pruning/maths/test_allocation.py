"""A budget of steps goes where it costs least."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxpress.optimizers.pruning.maths.allocation import spread

SLOPES = st.lists(st.lists(st.floats(0, 10), min_size=1, max_size=4), min_size=1, max_size=4)


@given(SLOPES, st.data())
@settings(deadline=None, max_examples=60)
def test_the_least_loss_where_each_step_costs_more_than_the_one_before(
    slopes: list[list[float]], data: st.DataObject
) -> None:
    curves = [np.concatenate([[0.0], np.cumsum(sorted(layer))]) for layer in slopes]
    budget = data.draw(st.integers(0, sum(map(len, slopes))))
    taken = spread(curves, budget)
    assert sum(taken) == budget
    best = min(
        sum(curve[steps] for curve, steps in zip(curves, choice, strict=True))
        for choice in product(*(range(len(curve)) for curve in curves))
        if sum(choice) == budget
    )
    assert sum(curve[steps] for curve, steps in zip(curves, taken, strict=True)) == pytest.approx(best, abs=1e-9)


def test_a_cheap_step_behind_a_dear_one_is_seen() -> None:
    assert spread([np.array([0, 3.0, 3.1, 3.2]), np.array([0, 2.0, 4.0, 6.0])], 3) == [3, 0]


def test_more_than_there_is() -> None:
    with pytest.raises(ValueError, match="3 steps wanted, the layers can take 2"):
        spread([np.zeros(2), np.zeros(2)], 3)

"""The knapsack against trying everything."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxpress.search.assignment import Choice, assign, totals

COSTS = st.fixed_dictionaries({"loss": st.integers(0, 50), "size": st.integers(1, 50), "latency": st.integers(1, 50)})


def best_of_all(choices: list[Choice], limits: dict[str, float], weights: dict[str, float]) -> float | None:
    units = list(dict.fromkeys(choice.unit for choice in choices))
    formats = [[choice.format for choice in choices if choice.unit == unit] for unit in units]
    scores = []
    for combination in itertools.product(*formats):
        sums = totals(choices, dict(zip(units, combination, strict=True)))
        if all(sums[name] <= limit for name, limit in limits.items()):
            scores.append(sum(weight * sums[name] for name, weight in weights.items()))
    return min(scores, default=None)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(COSTS, min_size=1, max_size=3), min_size=1, max_size=4),
    st.dictionaries(st.sampled_from(["loss", "size", "latency"]), st.integers(0, 150), max_size=2),
    st.fixed_dictionaries({"loss": st.just(0.01), "size": st.integers(0, 3), "latency": st.integers(0, 3)}),
)
def test_nothing_is_better(
    units: list[list[dict[str, int]]], limits: dict[str, float], weights: dict[str, float]
) -> None:
    choices = [
        Choice(f"unit{i}", f"format{j}", costs) for i, formats in enumerate(units) for j, costs in enumerate(formats)
    ]
    expected = best_of_all(choices, limits, weights)
    found = assign(choices, limits, weights)
    if expected is None:
        assert found is None
        return
    assert found is not None
    sums = totals(choices, found)
    assert all(sums[name] <= limit + 1e-6 * max(1, limit) for name, limit in limits.items())
    score = sum(weight * sums[name] for name, weight in weights.items())
    assert score <= expected + 1e-3 * abs(expected) + 1e-6, "within the solver's gap"


def test_hundreds_of_units_of_very_different_scales_are_solved() -> None:
    choices = [
        Choice(f"unit{i}", f, {"loss": loss * (1 + i % 7), "size": size})
        for i in range(300)
        for f, loss, size in (("float", 0.0, 4e6), ("8 bits", 1e-6, 1e6), ("4 bits", 1e-4, 5e5))
    ]
    found = assign(choices, {"loss": 0.02}, {"size": 1.0})
    assert found is not None
    sums = totals(choices, found)
    assert 0.019 < sums["loss"] <= 0.02 * (1 + 1e-6)
    assert all(f == "4 bits" for unit, f in found.items() if int(unit[4:]) % 7 == 0), "the cheapest come first"
    assert assign(choices, {"loss": 0.02, "size": 1e6}, {"size": 1.0}) is None


def test_limits_are_in_the_units_of_the_costs() -> None:
    choices = [Choice("a", "x", {"loss": 1.0, "size": 1e9}), Choice("a", "y", {"loss": 2.0, "size": 1.0})]
    assert assign(choices, {"size": 1e9}, {"loss": 1.0}) == {"a": "x"}
    assert assign(choices, {"size": 1e9 - 1e4}, {"loss": 1.0}) == {"a": "y"}
    assert totals(choices, {"a": "y"}) == {"loss": pytest.approx(2.0), "size": 1.0}

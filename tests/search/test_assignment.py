"""The knapsack against trying everything."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxpress.search.assignment import Assignment, Choice, CutChoice, Program

COSTS = st.fixed_dictionaries({"loss": st.integers(0, 50), "size": st.integers(1, 50), "latency": st.integers(1, 50)})


def best_of_all(program: Program, limits: dict[str, float], weights: dict[str, float]) -> float | None:
    """The least score of all sets of cuts that leave each group to one of them, with all formats."""
    groups = list(dict.fromkeys(choice.group for choice in program.choices))
    scores = []
    for count in range(len(program.cuts) + 1):
        for cuts in itertools.combinations([cut.name for cut in program.cuts], count):
            changed = [(choice.group, choice.cut) for choice in program.choices if choice.cut in cuts]
            if len({group for group, _ in changed}) < len(set(changed)):
                continue  # two cuts of one group
            after = dict(changed)
            formats = [
                [one.format for one in program.choices if (one.group, one.cut) == (group, after.get(group))]
                for group in groups
            ]
            for combination in itertools.product(*formats):
                sums = program.totals(Assignment(dict(zip(groups, combination, strict=True)), cuts))
                if all(sums[name] <= limit for name, limit in limits.items()):
                    scores.append(sum(weight * sums[name] for name, weight in weights.items()))
    return min(scores, default=None)


@st.composite
def programs(draw: st.DrawFn) -> Program:
    """A few groups, and cuts that change one or two of them."""
    groups = [f"group{i}" for i in range(draw(st.integers(1, 4)))]
    formats = [f"format{j}" for j in range(3)]

    def choices(group: str, cut: str | None) -> list[Choice]:
        return [Choice(group, f, draw(COSTS), cut) for f in formats[: draw(st.integers(1, 3))]]

    found = [one for group in groups for one in choices(group, None)]
    cuts = []
    for number in range(draw(st.integers(0, 3))):
        name = f"cut{number}"
        for group in draw(st.lists(st.sampled_from(groups), min_size=1, max_size=2, unique=True)):
            found += choices(group, name)
        cuts.append(CutChoice(name, {"loss": draw(st.integers(0, 50))}))
    return Program(found, cuts)


@settings(max_examples=80, deadline=None)
@given(
    programs(),
    st.dictionaries(st.sampled_from(["loss", "size", "latency"]), st.integers(0, 150), max_size=2),
    st.fixed_dictionaries({"loss": st.just(0.01), "size": st.integers(0, 3), "latency": st.integers(0, 3)}),
)
def test_nothing_is_better(program: Program, limits: dict[str, float], weights: dict[str, float]) -> None:
    expected = best_of_all(program, limits, weights)
    found = program.assign(limits, weights)
    if expected is None:
        assert found is None
        return
    assert found is not None
    sums = program.totals(found)
    assert all(sums[name] <= limit + 1e-6 * max(1, limit) for name, limit in limits.items())
    score = sum(weight * sums[name] for name, weight in weights.items())
    assert score <= expected + 1e-3 * abs(expected) + 1e-6, "within the solver's gap"


def test_a_group_is_as_its_cut_leaves_it_and_cuts_of_other_groups_combine() -> None:
    def of(group: str, cut: str | None, size: float) -> Choice:
        return Choice(group, "float", {"loss": 0.0, "size": size}, cut)

    program = Program(
        [
            *(of("up", None, 10), of("down", None, 10), of("o", None, 10)),
            *(of("up", "half", 5), of("down", "half", 5), of("o", "heads", 6)),
            *(of("up", "gone", 0), of("down", "gone", 0), of("o", "gone", 0)),
        ],
        [CutChoice("half", {"loss": 1.0}), CutChoice("heads", {"loss": 2.0}), CutChoice("gone", {"loss": 9.0})],
    )
    for limit, cuts in ((30, ()), (29, ("half",)), (19, ("half", "heads")), (15, ("gone",))):
        found = program.assign({"size": limit}, {"loss": 1.0})
        assert found is not None
        assert found.cuts == cuts
        assert program.totals(found)["size"] <= limit
    assert program.assign({"size": -1.0}, {"loss": 1.0}) is None
    kept = Program(program.choices, program.cuts, [(["gone"], 0)])
    assert kept.assign({"size": 15}, {"loss": 1.0}) is None
    assert kept.assign({"size": 19}, {"loss": 1.0}) == program.assign({"size": 19}, {"loss": 1.0})


def test_hundreds_of_groups_of_very_different_scales_are_solved() -> None:
    choices = [
        Choice(f"group{i}", f, {"loss": loss * (1 + i % 7), "size": size})
        for i in range(300)
        for f, loss, size in (("float", 0.0, 4e6), ("8 bits", 1e-6, 1e6), ("4 bits", 1e-4, 5e5))
    ]
    program = Program(choices)
    found = program.assign({"loss": 0.02}, {"size": 1.0})
    assert found is not None
    sums = program.totals(found)
    assert 0.019 < sums["loss"] <= 0.02 * (1 + 1e-6)
    assert all(f == "4 bits" for group, f in found.formats.items() if int(group[5:]) % 7 == 0), (
        "the cheapest come first"
    )
    assert program.assign({"loss": 0.02, "size": 1e6}, {"size": 1.0}) is None


def test_limits_are_in_the_units_of_the_costs() -> None:
    program = Program([Choice("a", "x", {"loss": 1.0, "size": 1e9}), Choice("a", "y", {"loss": 2.0, "size": 1.0})])
    assert program.assign({"size": 1e9}, {"loss": 1.0}) == Assignment({"a": "x"})
    assert program.assign({"size": 1e9 - 1e4}, {"loss": 1.0}) == Assignment({"a": "y"})
    assert program.totals(Assignment({"a": "y"})) == {"loss": pytest.approx(2.0), "size": 1.0}

"""What is built next: the least sum, or the mildest of the worst cuts."""

from __future__ import annotations

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from onnxpress.search.assignment import Choice, CutChoice, Program
from onnxpress.search.choosing import best_choice, most_even


def program_of(blocks: list[list[tuple[int, int]]]) -> Program:
    """One unit of ten bytes for each block, and cuts of it, as (bytes left, loss)."""
    choices, cuts = [], []
    for block, options in enumerate(blocks):
        unit = f"block{block}"
        choices.append(Choice(unit, "float32", {"loss": 0.0, "size": 10.0}))
        for number, (left, loss) in enumerate(options):
            name = f"{unit}.cut{number}"
            choices.append(Choice(unit, "float32", {"loss": 0.0, "size": float(left)}, name))
            cuts.append(CutChoice(name, {"loss": float(loss)}))
    return Program(choices, cuts)


def test_many_mild_cuts_rather_than_one_deep_one() -> None:
    program = program_of([[(8, 4), (4, 7)], [(8, 4)], [(8, 4)]])
    limits = {"size": 24.0}
    deep, even = best_choice(program, limits, "loss"), most_even(program, limits, "loss")
    assert deep is not None
    assert deep.cuts == ("block0.cut1",)
    assert even is not None
    assert even.cuts == ("block0.cut0", "block1.cut0", "block2.cut0")


def test_nothing_reaches_the_limit() -> None:
    program = program_of([[(8, 4)], [(8, 4)]])
    assert most_even(program, {"size": 15.0}, "loss") is None
    assert most_even(program_of([[]]), {"size": 5.0}, "loss") is None


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 50)), max_size=2), min_size=1, max_size=4),
    st.integers(0, 45),
)
def test_no_choice_has_a_milder_worst_cut(blocks: list[list[tuple[int, int]]], limit: int) -> None:
    """Against every combination of cuts."""
    options = [[(10, 0), *block] for block in blocks]
    worst = [
        max(loss for _, loss in taken)
        for taken in itertools.product(*options)
        if sum(left for left, _ in taken) <= limit and any(loss for _, loss in taken)
    ]
    program = program_of(blocks)
    found = most_even(program, {"size": float(limit)}, "loss")
    losses = {cut.name: cut.costs["loss"] for cut in program.cuts}
    if found is None:
        assert not worst
    elif found.cuts:
        assert max(losses[name] for name in found.cuts) == min(worst)

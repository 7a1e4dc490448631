"""What is built next: the least sum, or blocks cut as alike as can be."""

from __future__ import annotations

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from onnxpress.search.assignment import Choice, CutChoice, Program
from onnxpress.search.selection import best_choice, most_alike


def program_of(blocks: list[list[tuple[int, int]]]) -> Program:
    """One group of ten parameters for each block, and cuts of it, as (parameters left, loss)."""
    choices, cuts = [], []
    for block, options in enumerate(blocks):
        group = f"block{block}"
        choices.append(Choice(group, "float32", {"loss": 0.0, "parameters": 10.0}))
        for number, (left, loss) in enumerate(options):
            name = f"{group}.cut{number}"
            choices.append(Choice(group, "float32", {"loss": 0.0, "parameters": float(left)}, name))
            cuts.append(CutChoice(name, {"loss": float(loss)}))
    return Program(choices, cuts)


def test_many_mild_cuts_rather_than_one_deep_one() -> None:
    program = program_of([[(8, 4), (4, 7)], [(8, 4)], [(8, 4)]])
    limits = {"parameters": 24.0}
    deep, even = best_choice(program, limits, "loss"), most_alike(program, limits, "loss")
    assert deep is not None
    assert deep.cuts == ("block0.cut1",)
    assert even is not None
    assert even.cuts == ("block0.cut0", "block1.cut0", "block2.cut0")


def test_nothing_reaches_the_limit() -> None:
    program = program_of([[(8, 4)], [(8, 4)]])
    assert most_alike(program, {"parameters": 15.0}, "loss") is None
    assert most_alike(program_of([[]]), {"parameters": 5.0}, "loss") is None


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 50)), max_size=2), min_size=1, max_size=4),
    st.integers(0, 45),
)
def test_no_choice_has_a_milder_deepest_cut(blocks: list[list[tuple[int, int]]], limit: int) -> None:
    """Against every combination of cuts."""
    options = [[(10, 0), *block] for block in blocks]
    reaching = [taken for taken in itertools.product(*options) if sum(left for left, _ in taken) <= limit]
    program = program_of(blocks)
    found = most_alike(program, {"parameters": float(limit)}, "loss")
    if found is None:
        assert not reaching or not program.cuts
        return
    deepest = min(max(10 - left for left, _ in taken) for taken in reaching)
    left = {choice.cut: choice.costs["parameters"] for choice in program.choices}
    assert max((10 - left[cut] for cut in found.cuts), default=0) <= max(
        deepest, min(10 - left[c.name] for c in program.cuts)
    )

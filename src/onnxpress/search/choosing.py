"""Which of all choices to build next: the best as far as sums tell, or the most even one."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping

from onnxpress.search.assignment import Assignment, Program

TIES = 0.02
"""What all other costs together weigh beside the least of the one to minimise."""


def best_choice(program: Program, limits: Mapping[str, float], objective: str) -> Assignment | None:
    """The assignment with the least of the objective; among those that hardly differ, with little of everything else.

    Everything else counts as a share of the most that it could be, all of it together for `TIES` of the least.
    """
    first = program.assign(limits, {objective: 1.0})
    least = program.totals(first)[objective] if first is not None else 0.0
    if first is None or not least:
        return first
    weights = {objective: 1.0 / least}
    others = [name for name in program.choices[0].costs if name != objective]
    for name in others:
        most: dict[str, float] = {}
        for choice in program.choices:
            most[choice.unit] = max(most.get(choice.unit, 0.0), choice.costs[name])
        weights[name] = TIES / len(others) / (sum(most.values()) or 1.0)
    return program.assign(limits, weights) or first


def most_even(program: Program, limits: Mapping[str, float], objective: str) -> Assignment | None:
    """The best choice of those whose most harmful cut does least harm.

    What cuts of layers in a row lose compounds, so that a sum likes few deep cuts more than it should.
    """
    losses = sorted({cut.costs["loss"] for cut in program.cuts})

    def milder(most: float) -> Program:
        return program.without({cut.name for cut in program.cuts if cut.costs["loss"] > most})

    enough = bisect_left(losses, True, key=lambda most: milder(most).assign(limits, {objective: 1.0}) is not None)
    return best_choice(milder(losses[enough]), limits, objective) if enough < len(losses) else None

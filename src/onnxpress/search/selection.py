"""Select which of all choices to build next: the best as far as sums tell, or blocks cut as alike as can be."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping

from onnxpress.search.assignment import Assignment, Program

TIES = 0.02
"""What all other costs together weigh beside the least of the one to minimise."""


def best_choice(program: Program, limits: Mapping[str, float], objective: str) -> Assignment | None:
    """Find the assignment with the least of the objective; of those that hardly differ, with little of all else.

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
            most[choice.group] = max(most.get(choice.group, 0.0), choice.costs[name])
        weights[name] = TIES / len(others) / (sum(most.values()) or 1.0)
    return program.assign(limits, weights) or first


def most_alike(program: Program, limits: Mapping[str, float], objective: str) -> Assignment | None:
    """Find the best choice of those whose deepest cut is least deep, in parameters: blocks are cut alike.

    What was measured on some text is not quite what other text loses: where sums hardly differ, cuts that are alike are
    the safer choice.
    """
    depth = _removed(program)
    depths = sorted(set(depth.values()))

    def milder(most: float) -> Program:
        return program.without({name for name, removed in depth.items() if removed > most})

    enough = bisect_left(depths, True, key=lambda most: milder(most).assign(limits, {objective: 1.0}) is not None)
    return best_choice(milder(depths[enough]), limits, objective) if enough < len(depths) else None


def _removed(program: Program) -> dict[str, float]:
    """Count the parameters that each cut removes."""
    whole = {one.group: one.costs["parameters"] for one in program.choices if one.cut is None}
    left = {(one.cut, one.group): one.costs["parameters"] for one in program.choices if one.cut is not None}
    return {
        cut.name: sum(whole[group] - parameters for (name, group), parameters in left.items() if name == cut.name)
        for cut in program.cuts
    }

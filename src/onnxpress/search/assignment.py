"""A format for each unit: the multiple-choice knapsack, solved exactly as an integer program (HiGHS, through scipy)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

GAP = 1e-3
"""How far from the best the answer may be: what it is made of is known less well."""


@dataclass(frozen=True)
class Choice:
    """A unit in a format, and what it adds to the model's figures: `loss`, `size`, `latency`."""

    unit: str
    format: str
    costs: Mapping[str, float]


def assign(
    choices: Sequence[Choice], limits: Mapping[str, float], weights: Mapping[str, float]
) -> dict[str, str] | None:
    """The format of each unit, or None where no assignment keeps the limits.

    Args:
        limits: upper bounds of the sums of costs.
        weights: of the sums of costs, whose weighted sum is to be least.
    """
    units = list(dict.fromkeys(choice.unit for choice in choices))
    one_each = np.array([[choice.unit == unit for choice in choices] for unit in units], dtype=np.float64)
    constraints = [LinearConstraint(one_each, 1, 1)]
    for name, limit in limits.items():
        row = _column(choices, name)
        scale = max(abs(limit), float(row.max(initial=0)), 1e-30)  # so that the solver's tolerances fit
        constraints.append(LinearConstraint(row[None] / scale, -np.inf, limit / scale))
    objective = sum((weight * _column(choices, name) for name, weight in weights.items()), np.zeros(len(choices)))
    objective /= max(float(np.abs(objective).max(initial=0)), 1e-30)
    found = milp(
        objective,
        integrality=np.ones(len(choices)),
        bounds=Bounds(0, 1),
        constraints=constraints,
        options={"mip_rel_gap": GAP, "time_limit": 30},
    )
    if found.x is None:
        return None
    return {choice.unit: choice.format for choice, taken in zip(choices, found.x, strict=True) if taken > 0.5}


def totals(choices: Sequence[Choice], assignment: Mapping[str, str]) -> dict[str, float]:
    """The sums of costs of an assignment."""
    taken = [choice for choice in choices if assignment[choice.unit] == choice.format]
    return {name: sum(choice.costs[name] for choice in taken) for name in taken[0].costs}


def _column(choices: Sequence[Choice], name: str) -> np.ndarray:
    return np.array([choice.costs[name] for choice in choices], dtype=np.float64)

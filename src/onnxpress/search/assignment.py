"""A format for each group, and the cuts: a multiple-choice knapsack, solved exactly as an integer program (HiGHS).

A 0/1 variable stands for each group in each format, as it is and as each cut leaves it, and one for each cut. Each
group has one format, and is as the cuts that are made leave it:

    Σ x[group, cut, format] over cuts and formats = 1                       for each group
    Σ x[group, cut, format] over formats = y[cut]                           for each cut and each group that it changes

so that of two cuts that change one group no more than one is made, and cuts of different groups combine. Of some cuts,
such as the removals of all layers, no more than so many may be made.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

GAP = 1e-3
"""How far from the best the answer may be: what it is made of is known less well."""
SECONDS = 30
"""What a solution may take."""


@dataclass(frozen=True)
class Choice:
    """A group in a format, and what it adds to the model's figures: `loss`, `size`, `latency`."""

    group: str
    format: str
    costs: Mapping[str, float]
    cut: str | None = None
    """The cut that leaves the group as it is here; None: the whole group."""


@dataclass(frozen=True)
class CutChoice:
    """A cut, and what it adds by itself to the model's figures, whatever the formats of the groups that it changes:
    `cut_loss`."""

    name: str
    costs: Mapping[str, float]


@dataclass(frozen=True)
class Assignment:
    """A choice of formats and cuts."""

    formats: Mapping[str, str]
    """By group."""
    cuts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Program:
    """The integer program: all that can be chosen from."""

    choices: Sequence[Choice]
    cuts: Sequence[CutChoice] = ()
    most: Sequence[tuple[Sequence[str], int]] = ()
    """Cuts, and how many of them may be made."""

    def without(self, cuts: Collection[str]) -> Program:
        """Return the program that is left where these cuts are not made."""
        return Program(
            [one for one in self.choices if one.cut not in cuts],
            [one for one in self.cuts if one.name not in cuts],
            [([name for name in names if name not in cuts], count) for names, count in self.most],
        )

    @cached_property
    def names(self) -> list[str]:
        """The names of all costs."""
        return list(dict.fromkeys(name for costs in self._costs for name in costs))

    def assign(self, limits: Mapping[str, float], weights: Mapping[str, float]) -> Assignment | None:
        """Find the best choice, or None where none keeps the limits.

        Args:
            limits: upper bounds of the sums of costs.
            weights: of the sums of costs, whose weighted sum is to be least.
        """
        constraints = [self._structure]
        for name, limit in limits.items():
            row = self._column(name)
            scale = max(abs(limit), float(row.max(initial=0)), 1e-30)  # so that the solver's tolerances fit
            constraints.append(LinearConstraint(row[None] / scale, -np.inf, limit / scale))
        count = len(self.choices) + len(self.cuts)
        objective = sum((weight * self._column(name) for name, weight in weights.items()), np.zeros(count))
        objective /= max(float(np.abs(objective).max(initial=0)), 1e-30)
        found = milp(
            objective,
            integrality=np.ones(count),
            bounds=Bounds(0, 1),
            constraints=constraints,
            options={"mip_rel_gap": GAP, "time_limit": SECONDS},
        )
        if found.x is None:
            return None
        taken = found.x > 0.5
        return Assignment(
            {one.group: one.format for one, is_taken in zip(self.choices, taken, strict=False) if is_taken},
            tuple(cut.name for cut, is_taken in zip(self.cuts, taken[len(self.choices) :], strict=True) if is_taken),
        )

    def totals(self, assignment: Assignment) -> dict[str, float]:
        """Sum the costs of an assignment."""
        changed = {choice.group: choice.cut for choice in self.choices if choice.cut in assignment.cuts}
        taken: list[Choice | CutChoice] = [
            choice
            for choice in self.choices
            if assignment.formats[choice.group] == choice.format and changed.get(choice.group) == choice.cut
        ]
        taken += [cut for cut in self.cuts if cut.name in assignment.cuts]
        return {name: sum(choice.costs.get(name, 0.0) for choice in taken) for name in self.names}

    @cached_property
    def _structure(self) -> LinearConstraint:
        """One format for each group, and each group as the cuts leave it."""
        groups = {choice.group: number for number, choice in enumerate(self.choices)}
        rows: dict[tuple[str, str | None], int] = {(group, None): number for number, group in enumerate(groups)}
        entries: list[tuple[int, int, float]] = []
        for column, choice in enumerate(self.choices):
            entries.append((rows[choice.group, None], column, 1.0))
            if choice.cut is not None:
                entries.append((rows.setdefault((choice.group, choice.cut), len(rows)), column, 1.0))
        for number, cut in enumerate(self.cuts):
            entries += [(row, len(self.choices) + number, -1.0) for (_, name), row in rows.items() if name == cut.name]
        sums = [1.0 if cut is None else 0.0 for _, cut in rows]
        columns = {cut.name: len(self.choices) + number for number, cut in enumerate(self.cuts)}
        for number, (names, _) in enumerate(self.most):
            entries += [(len(rows) + number, columns[name], 1.0) for name in names]
        i, j, values = zip(*entries, strict=True)
        shape = (len(rows) + len(self.most), len(self.choices) + len(self.cuts))
        least = np.array([*sums, *(0.0 for _ in self.most)])
        return LinearConstraint(csr_array((values, (i, j)), shape), least, [*sums, *(count for _, count in self.most)])

    def _column(self, name: str) -> NDArray[np.float64]:
        return np.array([costs.get(name, 0.0) for costs in self._costs], dtype=np.float64)

    @cached_property
    def _costs(self) -> list[Mapping[str, float]]:
        """The costs of each variable."""
        return [*(one.costs for one in self.choices), *(cut.costs for cut in self.cuts)]

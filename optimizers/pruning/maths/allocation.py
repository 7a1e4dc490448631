"""Spread a budget of removals over layers: where the next step costs least, it is taken.

Greedy on the cost of each layer's next step; steps beyond an expensive one are reached by looking at the cheapest
average over any number of steps, so that curves need not be convex.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def spread(curves: Sequence[NDArray[np.float64]], budget: int) -> list[int]:
    """How many steps each layer takes.

    Args:
        curves: by layer, what has been lost after 0, 1, 2, … steps; a layer can take one less than its curve has.
        budget: steps in all; ValueError if the layers cannot take as many.
    """
    if budget > (room := sum(len(curve) - 1 for curve in curves)):
        raise ValueError(f"{budget} steps wanted, the layers can take {room}")
    taken = [0] * len(curves)
    while (left := budget - sum(taken)) > 0:
        offers = []
        for layer, curve in enumerate(curves):
            ahead = np.asarray(curve)[taken[layer] + 1 : taken[layer] + 1 + left]
            if len(ahead):
                slopes = (ahead - curve[taken[layer]]) / np.arange(1, len(ahead) + 1)
                steps = int(slopes.argmin())
                offers.append((float(slopes[steps]), layer, steps + 1))
        _, layer, steps = min(offers)
        taken[layer] += steps
    return taken

"""equalize: let two consecutive weights reach equally far in each channel between them.

Cross-layer equalization (Nagel et al. 2019): with s[k] = √(max|W1[:, k]| / max|W2[k, :]|),

    f(x W1) W2 = f(x W1 / s) (s W2)

for any f that keeps positive factors of channels: nothing, ReLU, a gate's product, attention. It needs no samples and
adds no node; one range for all channels of the activation, and one for all of W2, then waste less.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import onnx_ir as ir

from onnxpress.graph.report import Report
from onnxpress.optimizers.base import Context, Pass
from onnxpress.optimizers.quantization.folding import FoldingSite, find_folding_sites
from onnxpress.optimizers.quantization.maths.channel_scaling import equalizing_factors

SWEEPS = 20
"""A weight between two others shares with both: its neighbours settle within a few."""
SETTLED = 1e-3
"""Factors that differ less from 1 change nothing that 8 bits could show."""


class Equalize(Pass):
    """Rescale the channels between two products, by their weights alone."""

    name = "equalize"
    exact = True

    def __init__(self, sites: Sequence[Literal["up", "value"]] = ("up", "value")) -> None:
        """
        Args:
            sites: pairs of products to equalize. `up`: one and that which follows, as `up` and `down`; `value`: that
                of the values and, behind attention, the output projection.
        """
        self.sites = tuple(sites)

    def apply(self, model: ir.Model, context: Context, report: Report) -> None:
        sites = find_folding_sites(model.graph, report, self.sites)
        waiting, changed = list(range(len(sites))), set[int]()
        for _ in range(SWEEPS):
            moved = [number for number in waiting if _equalize(sites[number])]
            changed.update(moved)
            waiting = [
                number
                for number, site in enumerate(sites)
                if any(other != number and site.weights & sites[other].weights for other in moved)
            ]
            if not waiting:
                break
        for number, site in enumerate(sites):
            if number in changed:
                report.match(site.title)
            else:
                report.skip("already equal")


def _equalize(site: FoldingSite) -> bool:
    """Whether there was something to do."""
    factors = equalizing_factors(site.source_peaks(), site.weight_peaks())
    if np.abs(np.log(factors)).max() <= SETTLED:
        return False
    site.fold(factors)
    return True

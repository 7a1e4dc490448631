"""Statistics of one attention on samples, before it is changed and after."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from onnxpress.arrays import Indices
from onnxpress.calibration.walk import WalkStep
from onnxpress.optimizers.fitting.moments import Moments, StreamLengths
from onnxpress.optimizers.fitting.residual import addition_of
from onnxpress.optimizers.fitting.ridge import Normal
from onnxpress.optimizers.fitting.targets import Plus, Regression, Target
from onnxpress.optimizers.heads.attended import KeptHeads, attended_states
from onnxpress.optimizers.heads.maths.output_refit import OutputSums
from onnxpress.optimizers.heads.maths.reduction import Attended
from onnxpress.optimizers.heads.maths.value_regression import HeadProducts
from onnxpress.optimizers.heads.sites import HeadSite


class HeadSamples:
    """Statistics of an attention; `look` before it is edited."""

    def __init__(self, step: WalkStep, site: HeadSite, target: Target) -> None:
        self.step, self.site = step, site
        self.target = target
        """What it puts out as it was."""
        self.lengths = StreamLengths()
        self.hidden = Moments(site.query.features[0], str(site.hidden.name))
        self.states = Moments(site.output.features[0], str(site.states.name), self.lengths)

    def look(self) -> None:
        """Take in the hidden states, what heads compute, what comes out, and the stream that this joins."""
        stream = addition_of(self.site.block, self.site.output).stream
        wanted: dict[str, list[Any]] = {str(value.name): [self.lengths] for value in stream}
        for name, accumulator in (
            (self.hidden.tensor, self.hidden),
            (str(self.site.output.output.name), Plus(self.target)),
            (self.states.tensor, self.states),
        ):
            wanted.setdefault(name, []).append(accumulator)
        self.step.observe(wanted)

    def regress(self, features: int) -> Normal:
        """Sums of what the output product reads by now, and a 1, against what it put out before."""
        return self._regression(features, lambda regression: {self.states.tensor: [regression]})

    def attended(self, kept: Indices) -> Attended:
        products = HeadProducts(self.site.sizes[0])
        with attended_states(self.site) as (*values, joined):
            wanted = {str(value.name): [products] for value in values}
            normal = self._regression(
                len(kept) * self.site.value.features[0],
                lambda regression: wanted | {str(joined.name): [KeptHeads(self.site, kept, regression)]},
            )
        return Attended(products.total, OutputSums.of(normal, centred=self.site.biased))

    def _regression(self, features: int, wanted: Callable[[Regression], dict[str, Any]]) -> Normal:
        shape = (features, self.site.output.features[1])
        regression = Regression(self.target, self.lengths, shape, self.states.tensor, intercept=True)
        self.step.observe(wanted(regression))
        return regression.fit + regression.held_out

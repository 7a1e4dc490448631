"""The channels of a feed-forward network: which are removed, and what makes up for them."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from onnxpress.arrays import Arrays, Doubles, Floats
from onnxpress.calibration.calibration import Computed
from onnxpress.calibration.walk import WalkStep
from onnxpress.graph.anatomy.editing import read_weight
from onnxpress.optimizers.fitting.blockwise import ERROR
from onnxpress.optimizers.fitting.moments import Moments, StreamLengths
from onnxpress.optimizers.fitting.residual import addition_of
from onnxpress.optimizers.fitting.ridge import penalties
from onnxpress.optimizers.pruning.feed_forwards import Channels
from onnxpress.optimizers.pruning.maths import width as maths
from onnxpress.optimizers.pruning.maths.width import Method, Removal


class Recall(Protocol):
    """`Calibration.recall` for one graph."""

    def __call__(
        self, key: Hashable, compute: Callable[[], Computed], still: Callable[[Computed], bool] = ..., /
    ) -> Computed: ...


def compute_always(
    key: Hashable, compute: Callable[[], Computed], still: Callable[[Computed], bool] = lambda _: True, /
) -> Computed:
    """Remember nothing."""
    return compute()


@dataclass(frozen=True)
class ChannelFit:
    """How channels are chosen, and whether the others are fitted anew; see `PruneFfn`."""

    method: Method
    refit: bool
    ridge: float
    bias_compensation: bool | None
    gradients: Mapping[str, Any] | None = None
    """Gradients of the loss, by weight, [in, out] each."""
    recall: Recall = compute_always
    """Takes what is known of the same network from other options."""

    def observe(self, step: WalkStep, network: Channels) -> Moments:
        """The moments of the channels, tokens weighted by the residual stream that the network joins."""

        def compute() -> Moments:
            lengths = StreamLengths()
            moments = Moments(network.count, str(network.down.activation.name), lengths)
            stream = addition_of(network.block, network.down).stream
            wanted: dict[str, list[Any]] = {str(value.name): [lengths] for value in stream}
            step.observe({**wanted, moments.tensor: [moments]})
            return moments

        return self.recall(network.name, compute)

    def removal(self, network: Channels, count: int, moments: Moments | None) -> Removal:
        """The `count` channels that matter least, in the order in which they go.

        Args:
            moments: what `observe` found; None for methods that look at weights alone.
        """
        down = read_weight(network.down)
        if self.method == "taylor":
            assert self.gradients is not None
            slopes = network.halves([self.gradients[product.name] for product in network.into])
            pairs = list(zip(network.weights_into(), slopes, strict=True))
            return maths.rank(maths.importance_by_gradient((down, self.gradients[network.name]), pairs), count)
        if self.method in ("l1", "l2"):
            return maths.rank(maths.importance_by_magnitude(int(self.method[1]), down, network.weights_into()), count)
        assert moments is not None
        if self.method == "activation":
            return maths.rank(maths.importance_by_activation(moments.second(), down), count)
        if self.method == "flap":
            return maths.rank(maths.importance_by_fluctuation(moments.second(), moments.mean(), down), count)
        return self._elimination(network, count, down, moments)

    def _elimination(self, network: Channels, count: int, down: Floats, moments: Moments) -> Removal:
        """Removing fewer begins like removing more: the longest removal so far is remembered."""
        key = (network.name, self.ridge, self._compensates(network))
        longest = self.recall(
            key,
            lambda: maths.eliminate(self._second(network, moments), down, count, self._penalty(network, moments)),
            lambda known: len(known.order) >= count,
        )
        return Removal(longest.order[:count], longest.costs[:count])

    def solve(self, network: Channels, count: int, moments: Moments | None) -> Arrays:
        """The channels that are `kept`, the new `weight` of down, and its `bias` and the relative `error` if known.

        Args:
            count: how many are kept.
            moments: see `removal`.
        """
        down = read_weight(network.down)
        removed = self.removal(network, network.count - count, moments).order
        kept = np.setdiff1d(np.arange(network.count), removed)
        weight = down[kept]
        if moments is None:
            return {"kept": kept, "weight": weight}
        second = self._second(network, moments)
        if self.refit:
            weight = maths.refit(second, down, kept, self._penalty(network, moments)).astype(np.float32)
        error = maths.error(second, down, kept, weight)
        result: dict[str, NDArray[Any]] = {"kept": kept, "weight": weight, ERROR: np.array([error])}
        if self._compensates(network):
            bias = maths.compensation(moments.mean(), down, kept, weight)
            if network.down.bias is not None and network.down.bias.const_value is not None:
                bias = bias + network.down.bias.const_value.numpy()
            result["bias"] = bias.astype(np.float32)
        return result

    def _compensates(self, network: Channels) -> bool:
        if self.bias_compensation is None:
            return self.method == "flap" or network.down.bias is not None
        return self.bias_compensation

    def _second(self, network: Channels, moments: Moments) -> Doubles:
        """The second moments that weights are fitted to: around the mean, where a bias takes that."""
        return moments.covariance() if self._compensates(network) else moments.second()

    def _penalty(self, network: Channels, moments: Moments) -> Doubles:
        return penalties(self._second(network, moments), self.ridge, np.diagonal(moments.second()))

"""prune-ffn: narrower feed-forward networks.

Channels that matter least are removed from `gate`, `up` and `down` together, and `down` is fitted anew so that the
channels that stay give what all of them gave. Methods and formulas: `structure/width.py`. Statistics are of the layers
before as they were pruned, so that a layer is fitted to what it reads by then.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from onnxpress.calibration.calibration import NO_SAMPLES
from onnxpress.calibration.fingerprint import fingerprint
from onnxpress.calibration.walk import Step
from onnxpress.errors import UsageError
from onnxpress.graph.anatomy import Block, anatomy_of
from onnxpress.graph.anatomy.editing import read_weight, set_bias, set_weight
from onnxpress.graph.linear import selected
from onnxpress.graph.report import Report
from onnxpress.optimizers.calibrated_pass import CalibratedPass
from onnxpress.optimizers.fitting.fitted_once import FittedOnce
from onnxpress.optimizers.fitting.moments import Moments, StreamLengths
from onnxpress.optimizers.fitting.residual import addition_of
from onnxpress.optimizers.fitting.ridge import ROUNDING, penalties
from onnxpress.optimizers.pruning.feed_forwards import Channels, channels_of
from onnxpress.optimizers.pruning.gradients import read_gradients
from onnxpress.optimizers.pruning.maths import width as maths
from onnxpress.optimizers.pruning.maths.allocation import spread
from onnxpress.optimizers.pruning.maths.width import Method, Removal

LEAST = 0.25
"""Of its channels, what a global budget leaves every layer."""


class PruneFfn(CalibratedPass):
    """Remove the least important channels of feed-forward networks, and fit the rest to make up for them."""

    name = "prune-ffn"
    exact = False
    needs_anatomy = True
    wanted_rows = 32
    wanted_length = 512

    def __init__(
        self,
        width: int | None = None,
        ratio: float | None = None,
        method: Method = "least-squares",
        allocation: Literal["uniform", "global"] = "uniform",
        refit: bool = True,
        ridge: float = 0.1,
        bias_compensation: bool | None = None,
        multiple_of: int = 32,
        gradients: Path | None = None,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
    ) -> None:
        """
        Args:
            width: channels to keep in each network; or
            ratio: the share of its channels, such as 0.75.
            method: how channels are chosen: by what their removal costs once the others make up for it, by activation
                and weight, magnitude (l1, l2), gradients (taylor) or fluctuation (flap).
            allocation: uniform: every network keeps as much; global: as much is kept in all, most where it matters
                most, and at least a quarter in each.
            refit: fit what `down` keeps to the output of all channels.
            ridge: how much a refitted weight is drawn to what it was; in parts of each channel's second moment.
            bias_compensation: keep the mean output with a bias. By default where `down` has a bias, and with flap.
            multiple_of: widths are multiples of this, so that blocks of quantized weights divide them.
            gradients: for taylor: .npz with the gradient of the loss by name of the weight, [in, out] as in MatMul.
            include: patterns of `down`'s weight names, such as "*.layers.[4-9].*"; none: all networks.
            exclude: patterns of those to leave alone.
        """
        if (width is None) == (ratio is None):
            raise ValueError("give either width, the channels to keep, or ratio, their share such as 0.75")
        if ratio is not None and not 0 < ratio <= 1:
            raise ValueError(f"ratio is the share of channels to keep, above 0 and up to 1, not {ratio}")
        if multiple_of < 1:
            raise ValueError(f"multiple_of must be at least 1, not {multiple_of}")
        if width is not None and (width < 1 or width % multiple_of):
            raise ValueError(f"width must be a positive multiple of {multiple_of}, not {width}; or give multiple_of=1")
        if ridge < ROUNDING:
            raise ValueError(f"ridge must be at least {ROUNDING}, not {ridge}")
        if (method == "taylor") != (gradients is not None):
            raise ValueError(
                "taylor needs gradients=FILE.npz, and nothing else takes it: onnxpress computes none itself"
            )
        if not refit and method == "least-squares":
            raise ValueError(
                "least-squares chooses channels for being replaced by a refit: choose another method without"
            )
        self.width, self.ratio, self.method, self.allocation = width, ratio, method, allocation
        self.refit, self.ridge, self.bias_compensation = refit, ridge, bias_compensation
        self.multiple_of, self.gradients = multiple_of, gradients
        self.include, self.exclude = tuple(include), tuple(exclude)
        self._known = FittedOnce()
        self._digest: str | None = None
        """Of a graph of which one network alone is pruned, in several ways; see `Calibration.memory`."""

    @property
    def needs_samples(self) -> bool:
        return self.refit or bool(self.bias_compensation) or self.method not in ("l1", "l2", "taylor")

    def apply(self, model: ir.Model, report: Report) -> None:
        networks = self._networks(model, report)
        if not networks:
            return
        products = [product for one in networks for product in one.feed_forward.products]
        gradients = read_gradients(self.gradients, products) if self.gradients is not None else None
        if self.needs_samples and not self.calibration.fits(model):
            report.skip(NO_SAMPLES, len(networks))
            return
        if not self.needs_samples:
            kept = self._widths([self._curve(one, None, gradients) for one in networks], networks)
            for one, count in zip(networks, kept, strict=True):
                self._put(one, _tensors(self._solve(one, count, None, gradients)), report)
            return
        widths = self._widths(None, networks)
        if self.allocation == "global":
            widths = self._widths(self._measured_curves(model, networks, gradients), networks)
        self._digest = (
            fingerprint(model, (), "") if self.calibration.memory is not None and len(networks) == 1 else None
        )
        pending = dict(zip((one.block.title for one in networks), zip(networks, widths, strict=True), strict=True))
        for step in self.calibration.walk(model, method=self._title(widths)):
            if step.title in pending:
                one, count = pending[step.title]
                compute = partial(self._observed, step, one, count, gradients)
                self._put(one, self._known.get(one.down, partial(step.results, "channels", compute)), report)

    def _networks(self, model: ir.Model, report: Report) -> list[Channels]:
        """What is to be pruned. Raises UnsupportedModelError where a network that is meant cannot be."""
        found = []
        for block in anatomy_of(model).blocks:
            if block.feed_forward is None:
                report.skip(_no_network(block))
            elif not selected(block.feed_forward.down.name, self.include, self.exclude):
                report.skip("excluded by name")
            elif self._target(block) >= block.feed_forward.down.features[0]:
                report.skip("as narrow already")
            else:
                found.append(channels_of(block))
        return found

    def _target(self, block: Block) -> int:
        """Channels to keep, where all keep as much."""
        assert block.feed_forward is not None
        count = block.feed_forward.down.features[0]
        if self.width is not None:
            return self.width
        assert self.ratio is not None
        target = round(self.ratio * count / self.multiple_of) * self.multiple_of
        if not target:
            raise UsageError(
                f"{block.title} has {count} channels; {self.ratio} of them are no multiple of {self.multiple_of}",
                hint="give a larger ratio, or a smaller multiple_of",
            )
        return target

    def _widths(self, curves: Sequence[Removal] | None, networks: Sequence[Channels]) -> list[int]:
        """Channels to keep in each network."""
        uniform = [self._target(one.block) for one in networks]
        if curves is None or self.allocation == "uniform":
            return uniform
        costs = []
        for one, curve in zip(networks, curves, strict=True):
            rest = one.count % self.multiple_of  # the first step makes it a multiple
            after = np.arange(rest or self.multiple_of, len(curve.order) + 1, self.multiple_of)
            costs.append(np.concatenate([[0.0], curve.costs[after - 1]]))
        steps = sum(-(-(one.count - count) // self.multiple_of) for one, count in zip(networks, uniform, strict=True))
        taken = spread(costs, steps)
        return [
            -(-one.count // self.multiple_of) * self.multiple_of - number * self.multiple_of if number else one.count
            for one, number in zip(networks, taken, strict=True)
        ]

    def _most(self, one: Channels) -> int:
        """Channels that a global budget may take from a network."""
        least = max(1, round(LEAST * one.count / self.multiple_of)) * self.multiple_of
        return one.count - min(least, self._target(one.block))

    def _measured_curves(
        self, model: ir.Model, networks: Sequence[Channels], gradients: Mapping[str, Any] | None
    ) -> list[Removal]:
        """By network of the untouched model, what is lost with each channel."""
        pending = {one.block.title: one for one in networks}
        curves: dict[str, Removal] = {}
        for step in self.calibration.walk(model, feed="original", method=f"{self._title([])} curves"):
            if step.title not in pending:
                continue
            one = pending[step.title]

            def compute(step: Step = step, one: Channels = one) -> dict[str, NDArray[Any]]:
                found = self._curve(one, self._moments(step, one), gradients)
                return {"order": found.order, "costs": found.costs}

            found = step.results("curve", compute)
            curves[step.title] = Removal(found["order"].numpy(), found["costs"].numpy())
        return [curves[one.block.title] for one in networks]

    def _curve(self, one: Channels, moments: Moments | None, gradients: Mapping[str, Any] | None) -> Removal:
        """All removals that a budget may ask for, with costs that compare across layers."""
        found = self._removal(one, self._most(one), read_weight(one.down), moments, gradients)
        return found if moments is None else Removal(found.order, found.costs * moments.scale())

    def _moments(self, step: Step, one: Channels) -> Moments:
        def compute() -> Moments:
            lengths = StreamLengths()
            moments = Moments(one.count, str(one.down.activation.name), lengths)
            stream = addition_of(one.block, one.down).stream
            wanted: dict[str, list[Any]] = {str(value.name): [lengths] for value in stream}
            step.observe({**wanted, moments.tensor: [moments]})
            return moments

        if self._digest is None:
            return compute()
        return self.calibration.recall((self.name, self._digest, one.down.name), compute)

    def _observed(
        self, step: Step, one: Channels, count: int, gradients: Mapping[str, Any] | None
    ) -> dict[str, NDArray[Any]]:
        return self._solve(one, count, self._moments(step, one), gradients)

    def _removal(
        self,
        one: Channels,
        count: int,
        down: NDArray[np.float32],
        moments: Moments | None,
        gradients: Mapping[str, Any] | None,
    ) -> Removal:
        if self.method == "taylor":
            assert gradients is not None
            slopes = one.halves([gradients[product.name] for product in one.into])
            pairs = list(zip(one.weights_into(), slopes, strict=True))
            return maths.rank(maths.by_gradient((down, gradients[one.down.name]), pairs), count)
        if self.method in ("l1", "l2"):
            return maths.rank(maths.by_magnitude(int(self.method[1]), down, one.weights_into()), count)
        assert moments is not None
        if self.method == "activation":
            return maths.rank(maths.by_activation(moments.second(), down), count)
        if self.method == "flap":
            return maths.rank(maths.by_fluctuation(moments.second(), moments.mean(), down), count)

        def eliminate() -> Removal:
            return maths.eliminate(self._second(one, moments), down, count, self._penalty(one, moments))

        if self._digest is None:
            return eliminate()
        # Removing fewer begins like removing more.
        key = (self.name, self._digest, one.down.name, self.ridge, self._compensates(one))
        longest = self.calibration.recall(key, eliminate, lambda found: len(found.order) >= count)
        return Removal(longest.order[:count], longest.costs[:count])

    def _compensates(self, one: Channels) -> bool:
        if self.bias_compensation is None:
            return self.method == "flap" or (one.down.bias is not None and self.needs_samples)
        return self.bias_compensation

    def _second(self, one: Channels, moments: Moments) -> NDArray[np.float64]:
        """What is left to fit by weights: around the mean, where a bias takes that."""
        return moments.covariance() if self._compensates(one) else moments.second()

    def _penalty(self, one: Channels, moments: Moments) -> NDArray[np.float64]:
        return penalties(self._second(one, moments), self.ridge, np.diagonal(moments.second()))

    def _solve(
        self, one: Channels, count: int, moments: Moments | None, gradients: Mapping[str, Any] | None
    ) -> dict[str, NDArray[Any]]:
        """`kept`, the new `weight` of down, and its `bias` and the relative `error` where these are known."""
        down = read_weight(one.down)
        removal = self._removal(one, one.count - count, down, moments, gradients)
        kept = np.setdiff1d(np.arange(one.count), removal.order)
        if moments is None:
            return {"kept": kept, "weight": down[kept]}
        second = self._second(one, moments)
        weight = down[kept]
        if self.refit:
            weight = maths.refit(second, down, kept, self._penalty(one, moments)).astype(np.float32)
        loss = np.array([maths.error(second, down, kept, weight)])
        found: dict[str, NDArray[Any]] = {"kept": kept, "weight": weight, "error": loss}
        if self._compensates(one):
            bias = maths.compensation(moments.mean(), down, kept, weight)
            if one.down.bias is not None and one.down.bias.const_value is not None:
                bias = bias + one.down.bias.const_value.numpy()
            found["bias"] = bias.astype(np.float32)
        return found

    def _put(self, one: Channels, found: Mapping[str, ir.TensorProtocol], report: Report) -> None:
        kept = found["kept"].numpy()
        one.keep(kept)
        set_weight(one.down, found["weight"])
        if "bias" in found:
            set_bias(one.down, found["bias"].numpy())
        if "error" in found:
            report.measure(one.down.name, float(found["error"].numpy()[0]))
        report.match(f"feed-forward {one.count} -> {len(kept)}")

    def _title(self, widths: Sequence[int]) -> str:
        """Names the method and its options to a walk that may go on in another process."""
        options = (self.method, self.refit, self.ridge, self.bias_compensation, self.multiple_of, self.include)
        return f"{self.name} {options} {self.exclude} {self.width} {self.ratio} {self.gradients} {list(widths)}"


def _no_network(block: Block) -> str:
    """What a layer has in the place of a plain feed-forward network."""
    if any(node.op_type in ("MoE", "QMoE") for node in block.nodes):
        return "experts in the place of a feed-forward network"
    inside = {product.weight for attention in block.attentions for product in attention.products}
    names = [product.name for product in block.products if product.weight not in inside]
    parts = sorted({name.removeprefix(f"{block.title}.") for name in names})
    return f"no plain feed-forward network among what is not attention: {', '.join(parts) or 'no products'}"


def _tensors(arrays: Mapping[str, NDArray[Any]]) -> dict[str, ir.TensorProtocol]:
    return {name: ir.tensor(array) for name, array in arrays.items()}

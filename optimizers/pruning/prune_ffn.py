"""prune-ffn: narrower feed-forward networks.

Channels that matter least are removed from `gate`, `up` and `down` together, and `down` is fitted anew so that the
channels that stay give what all of them gave. Methods and formulas: `maths.width`, put together in
`channel_fit`. Statistics are of the layers before as they were pruned, so that a layer is fitted to what it reads by
then.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import onnx_ir as ir

from onnxpress.arrays import Arrays
from onnxpress.calibration.calibration import Calibration, Computed
from onnxpress.calibration.fingerprint import fingerprint
from onnxpress.calibration.known_results import Result
from onnxpress.errors import UsageError
from onnxpress.graph.anatomy import Block, anatomy_of
from onnxpress.graph.anatomy.editing import set_bias, set_weight
from onnxpress.graph.linear import selected
from onnxpress.graph.report import Report
from onnxpress.optimizers.base import Context, Pass
from onnxpress.optimizers.fitting.blockwise import as_tensors, by_segment, fit_blockwise, lacks_samples
from onnxpress.optimizers.fitting.moments import Moments
from onnxpress.optimizers.fitting.ridge import ROUNDING
from onnxpress.optimizers.pruning.channel_fit import ChannelFit, Recall, compute_always
from onnxpress.optimizers.pruning.feed_forwards import Channels, channels_of
from onnxpress.optimizers.pruning.gradients import read_gradients
from onnxpress.optimizers.pruning.maths.allocation import spread
from onnxpress.optimizers.pruning.maths.width import Method, Removal

LEAST = 0.25
"""The share of its channels that a global budget leaves every layer."""


class PruneFfn(Pass):
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
            width: channels to keep in each network; this or `ratio` is given.
            ratio: the share of its channels to keep in each network, such as 0.75.
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
            exclude: patterns of `down`'s weight names to leave alone.
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

    @property
    def needs_samples(self) -> bool:
        return self.refit or bool(self.bias_compensation) or self.method not in ("l1", "l2", "taylor")

    def apply(self, model: ir.Model, context: Context, report: Report) -> None:
        networks = self._networks(model, report)
        if not networks:
            return
        products = [product for network in networks for product in network.feed_forward.products]
        gradients = read_gradients(self.gradients, products) if self.gradients is not None else None
        if lacks_samples(self, model, context, report, len(networks)):
            return
        recall = _recall(model, context.calibration) if len(networks) == 1 else compute_always
        fit = ChannelFit(self.method, self.refit, self.ridge, self.bias_compensation, gradients, recall)
        widths = self._uniform_widths(networks)
        if self.allocation == "global":
            widths = self._global_widths(networks, self._curves(model, context, networks, fit))
        if not self.needs_samples:
            for network in networks:
                _put(report, network, as_tensors(fit.solve(network, widths[network.name], None)))
            return
        fit_blockwise(
            model,
            context,
            report,
            fit=self.name,
            options=(*self._options(), list(widths.values())),
            stages=by_segment({network.block.title: [network] for network in networks}),
            solve=lambda step, targets: {
                network.name: fit.solve(network, widths[network.name], fit.observe(step, network))
                for network in targets
            },
            put=partial(_put, report),
        )

    def _networks(self, model: ir.Model, report: Report) -> list[Channels]:
        """The networks to prune. Raises UnsupportedModelError where one of those chosen cannot be."""
        networks = []
        for block in anatomy_of(model).blocks:
            if block.feed_forward is None:
                report.skip(_no_network(block))
            elif not selected(block.feed_forward.down.name, self.include, self.exclude):
                report.skip("excluded by name")
            elif self._target(block) >= block.feed_forward.down.features[0]:
                report.skip("as narrow already")
            else:
                networks.append(channels_of(block))
        return networks

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

    def _uniform_widths(self, networks: Sequence[Channels]) -> dict[str, int]:
        """Channels to keep in each network, by its name."""
        return {network.name: self._target(network.block) for network in networks}

    def _global_widths(self, networks: Sequence[Channels], curves: Mapping[str, Removal]) -> dict[str, int]:
        """Channels to keep in each network, as many in all as `_uniform_widths` has, where their loss is least."""
        costs, steps = [], 0
        for network in networks:
            curve = curves[network.name]
            rest = network.count % self.multiple_of  # the first step makes it a multiple
            after = np.arange(rest or self.multiple_of, len(curve.order) + 1, self.multiple_of)
            costs.append(np.concatenate([[0.0], curve.costs[after - 1]]))
            steps += -(-(network.count - self._target(network.block)) // self.multiple_of)
        return {
            network.name: (-(-network.count // self.multiple_of) - taken) * self.multiple_of if taken else network.count
            for network, taken in zip(networks, spread(costs, steps), strict=True)
        }

    def _curves(
        self, model: ir.Model, context: Context, networks: Sequence[Channels], fit: ChannelFit
    ) -> dict[str, Removal]:
        """By network of the untouched model, what is lost with each channel that a global budget may take."""

        def solve(network: Channels, moments: Moments | None) -> Arrays:
            least = max(1, round(LEAST * network.count / self.multiple_of)) * self.multiple_of
            most = network.count - min(least, self._target(network.block))
            removal = fit.removal(network, most, moments)
            # Costs that compare across layers.
            return {"order": removal.order, "costs": removal.costs * (1.0 if moments is None else moments.scale())}

        results: dict[str, Result] = {}
        if not self.needs_samples:
            results = {network.name: as_tensors(solve(network, None)) for network in networks}
        else:
            fit_blockwise(
                model,
                context,
                report=Report(),
                fit=f"{self.name} curves",
                options=self._options(),
                stages=by_segment({network.block.title: [network] for network in networks}),
                solve=lambda step, targets: {one.name: solve(one, fit.observe(step, one)) for one in targets},
                put=lambda network, result: results.update({network.name: result}),
                feed="original",
                once=False,
            )
        return {name: Removal(result["order"].numpy(), result["costs"].numpy()) for name, result in results.items()}

    def _options(self) -> tuple[object, ...]:
        """All that results depend on, for a walk that may go on in another process."""
        how = (self.method, self.refit, self.ridge, self.bias_compensation, self.multiple_of, self.width, self.ratio)
        return *how, self.include, self.exclude, self.gradients


def _recall(model: ir.Model, calibration: Calibration) -> Recall:
    """Remembers what is found about a graph of which one network alone is pruned, in several ways."""
    if calibration.memory is None:
        return compute_always
    digest = fingerprint(model, (), "")

    def recall(
        key: Hashable, compute: Callable[[], Computed], still: Callable[[Computed], bool] = lambda _: True, /
    ) -> Computed:
        return calibration.recall((PruneFfn.name, digest, key), compute, still)

    return recall


def _put(report: Report, network: Channels, result: Result) -> None:
    kept = result["kept"].numpy()
    network.keep(kept)
    set_weight(network.down, result["weight"])
    if "bias" in result:
        set_bias(network.down, result["bias"].numpy())
    report.match(f"feed-forward {network.count} -> {len(kept)}")


def _no_network(block: Block) -> str:
    """Say what a layer has in the place of a plain feed-forward network."""
    if any(node.op_type in ("MoE", "QMoE") for node in block.nodes):
        return "experts in the place of a feed-forward network"
    inside = {product.weight for attention in block.attentions for product in attention.products}
    names = [product.name for product in block.products if product.weight not in inside]
    parts = sorted({name.removeprefix(f"{block.title}.") for name in names})
    return f"no plain feed-forward network among what is not attention: {', '.join(parts) or 'no products'}"

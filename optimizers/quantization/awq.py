"""awq: rescale channels so that those that matter get finer steps within their block.

AWQ (Lin et al. 2023): x · W = (x / s) · (s W) with s = E|x|^α for each channel. A weight s times as large is rounded as
coarsely as its neighbours in the block, so that its own error becomes s times smaller; too large an s coarsens the
block. The best α of a grid is taken for each activation, by the error that the products lose in the format to come.
1 / s goes into what computes x, see `folding`: no node is added, and the outputs stay the same. Quantize afterwards,
with quantize-blocks and the same format.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import onnx_ir as ir

from onnxpress.calibration.calibration import NO_SAMPLES
from onnxpress.calibration.walk import WalkStep
from onnxpress.graph.linear import read_linear, selected
from onnxpress.graph.report import Report
from onnxpress.optimizers.base import Context, Pass
from onnxpress.optimizers.fitting.statistics import ChannelStatistics, Gram
from onnxpress.optimizers.quantization.block_operands import METHODS, DataFree
from onnxpress.optimizers.quantization.folding import FREE, FoldingSite, Kind, find_folding_sites
from onnxpress.optimizers.quantization.maths.block_format import BlockFormat, ScaleType, ZeroPoints
from onnxpress.optimizers.quantization.maths.channel_scaling import AwqScaling, awq


class Awq(Pass):
    """Rescale the channels of activations for weights that are about to be quantized in blocks."""

    name = "awq"
    exact = True
    needs_samples = True
    wanted_rows = 32
    wanted_length = 256

    def __init__(
        self,
        bits: int = 4,
        block_size: int = 32,
        zero_points: ZeroPoints = "none",
        method: DataFree = "nearest",
        scale_type: ScaleType = "float32",
        strengths: int = 10,
        sites: Sequence[Kind] = FREE,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
    ) -> None:
        """
        Args:
            bits: width of a code, 2 to 8, in the format that quantize-blocks is going to use.
            block_size: inputs of an output that share a scale in that format: 16, 32, 64, 128 or 256.
            zero_points: those of that format: `none`, symmetric codes; `integer`, a code for each block; `float`, any
                number, as in HQQ.
            method: how codes are found while searching: `nearest` rounds; `least-squares` fits scales to the weights;
                `hqq` fits zero points (Half-Quadratic Quantization, Badri and Shaji 2023).
            scale_type: how that format stores scales; `int8` is double quantization (QLoRA, Dettmers et al. 2023).
            strengths: the exponents α that are tried, so many in equal steps up to 1.
            sites: activations to rescale, by what computes them. `norm`: a norm; `up`: another product, as the input of
                `down`; `value`: attention; `node`: anything else, for a Mul each.
            include: patterns of weight names, such as `*.layers.0.*`; only activations that feed nothing else are
                taken. None: all.
            exclude: patterns of weight names; activations that feed one of these are left alone.
        """
        if strengths < 1:
            raise ValueError(f"strengths must be at least 1, not {strengths}")
        self.format = BlockFormat(bits, block_size, zero_points, scale_type)
        self.method = METHODS[method]
        self.strengths = tuple(np.linspace(0, 1, strengths + 1)[1:].tolist())
        self.sites = tuple(sites)
        self.include, self.exclude = tuple(include), tuple(exclude)

    def apply(self, model: ir.Model, context: Context, report: Report) -> None:
        waiting: dict[str, FoldingSite] = {}
        for site in find_folding_sites(model.graph, report, self.sites):
            if all(selected(linear.name, self.include, self.exclude) for linear in site.linears):
                waiting[str(site.activation.name)] = site
            else:
                report.skip("excluded by name")
        if not waiting:
            return
        if not context.calibration.fits(model):
            report.skip(NO_SAMPLES, len(waiting))
            return
        for step in context.calibration.walk(model, feed="original"):
            here = [waiting.pop(name) for name in list(waiting) if name in step.values]
            for site, scaling in self._search(step, here):
                for linear in site.linears:
                    report.measure(linear.name, scaling.error)
                    report.measure(f"{linear.name} without awq", scaling.plain_error)
                if scaling.strength:
                    site.fold(scaling.factors)
                    report.match(site.title)
                else:
                    report.skip("nothing gained")
            if not waiting:
                return

    def _search(self, step: WalkStep, sites: Sequence[FoldingSite]) -> Iterator[tuple[FoldingSite, AwqScaling]]:
        """The best factors of the sites of one block, last to first, each to be folded at once, see
        `find_folding_sites`.

        Folding changes no input of another site, so that all are looked at in one run.
        """
        grams = {str(site.activation.name): Gram(site.features, str(site.activation.name)) for site in sites}
        seen = {name: ChannelStatistics(site.features, name) for site in sites for name in [str(site.activation.name)]}
        step.observe({name: [grams[name], seen[name]] for name in grams})
        for site in reversed(sites):
            name = str(site.activation.name)
            weights = [read_linear(linear) for linear in {linear.weight: linear for linear in site.linears}.values()]
            magnitudes = site.tied(seen[name].mean_magnitudes())
            gram = grams.pop(name).matrix()
            yield site, awq(weights, magnitudes, gram, self.format, quantize=self.method, strengths=self.strengths)

"""reduce-heads: attention with fewer heads, fewer key/value heads, or smaller heads, repaired in closed form.

    least-squares   drop the heads that a refitted output product misses least (see maths.selection)
    regress         likewise, and let the values of the others stand in for them (maths.value_regression)
    slice           keep the loudest heads and dimensions
    resample        every new head is a mixture of all, by given, averaging or random matrices (maths.resample)

Where query heads stay and key/value heads become fewer, these are turned towards each other and merged
(maths.kv_merge). Smaller heads: maths.head_dim, maths.rotary_planes. Then the output product is refitted
by ridge regression to what the attention put out before, tokens weighted as in fitting.moments. One block at a time;
each sees what those before it make of the samples by then.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Literal

import numpy as np
import onnx_ir as ir

from onnxpress.arrays import Doubles, Floats, Indices
from onnxpress.calibration.calibration import Calibration
from onnxpress.errors import UsageError
from onnxpress.graph.anatomy import Attention, Block, anatomy_of
from onnxpress.graph.edits import drop_unused
from onnxpress.graph.linear import selected
from onnxpress.graph.report import Report
from onnxpress.optimizers.base import Context, Pass
from onnxpress.optimizers.fitting.blockwise import lacks_samples
from onnxpress.optimizers.fitting.statistics import ChannelStatistics
from onnxpress.optimizers.fitting.targets import Target
from onnxpress.optimizers.heads.head_samples import HeadSamples
from onnxpress.optimizers.heads.limits import require_possible
from onnxpress.optimizers.heads.maths.attention_sinks import mixed_sums
from onnxpress.optimizers.heads.maths.attention_weights import AttentionWeights
from onnxpress.optimizers.heads.maths.output_refit import output_error, refit_output
from onnxpress.optimizers.heads.maths.reduction import Observed, Reduction
from onnxpress.optimizers.heads.maths.request import HeadPlan, HeadRequest, plan_heads, plan_resampling
from onnxpress.optimizers.heads.maths.resample import matrices_for, resample
from onnxpress.optimizers.heads.maths.rotary_planes import kept_dimensions, plane_energies, strongest_planes
from onnxpress.optimizers.heads.packed import unpacked
from onnxpress.optimizers.heads.sites import (
    HeadSite,
    cut_tables,
    pack_output,
    pack_weights,
    site_of,
    skip_reason,
)

Method = Literal["least-squares", "regress", "slice", "resample"]
Tables = tuple[ir.Value, ir.Value]


class ReduceHeads(Pass):
    """Reduce the heads of every self-attention to the same numbers; which ones stay is up to each layer."""

    name = "reduce-heads"
    exact = False
    needs_anatomy = True
    wanted_rows = 24
    wanted_length = 512

    def __init__(
        self,
        heads: int | None = None,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        ratio: float | None = None,
        kv_ratio: float | None = None,
        method: Method = "least-squares",
        matrix: str = "average",
        corrected: bool = True,
        seed: int = 0,
        refit: bool | None = None,
        ridge: float = 0.1,
        first_tokens: float = 0.01,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
    ) -> None:
        """
        Args:
            heads: query heads that each attention is to have; left out, they follow from the other numbers.
            kv_heads: key/value heads that each attention is to have; left out, they follow from the query heads.
            head_dim: dimensions that each head is to compute in; left out, as many as before.
            ratio: or the share of each attention's query heads, such as 0.67, the nearest that can be had. Where they
                share keys and values, they leave evenly and all key/value heads stay.
            kv_ratio: or the share of its key/value heads: with their query heads where several share them, else merged.
            method: what the heads that stay are made of: `least-squares`, `regress`, `slice` or `resample`.
            matrix: for resample: `average`, `random`, or a .npz file with `heads` [heads, new], `head_dim`
                [head_dim, new] and, unless they are the same as heads, `kv_heads`; columns are scaled to sum to one.
            corrected: for resample: False averages values and output both, as the formula was first written down.
            seed: of random matrices.
            refit: whether the output is refitted to samples; by default unless the method is slice or resample.
            ridge: how strongly the refit holds on to what it starts from, in parts of each input's second moment.
            first_tokens: the share of the fit that is given to tokens which attend to nothing but themselves, as the
                first of a text does; of decoders only.
            include: patterns of names of query weights; attentions with others are left alone. None: all.
            exclude: patterns of names of query weights; attentions with these are left alone, whatever `include` says.
        """
        if ridge < 0:
            raise UsageError(f"reduce-heads: ridge must not be negative: {ridge}")
        self.request = HeadRequest(heads, kv_heads, head_dim, ratio, kv_ratio)
        self.method, self.matrix, self.corrected, self.seed, self.ridge = method, matrix, corrected, seed, ridge
        self.refit = method in ("least-squares", "regress") if refit is None else refit
        if not 0 <= first_tokens < 1:
            raise UsageError(f"reduce-heads: first_tokens is a share, from 0 and below 1: {first_tokens}")
        self.first_tokens = first_tokens
        self.include, self.exclude = tuple(include), tuple(exclude)

    @property
    def needs_samples(self) -> bool:
        return self.method != "resample" or self.refit

    def apply(self, model: ir.Model, context: Context, report: Report) -> None:
        chosen = self._chosen(model, report)
        with unpacked(model, chosen):
            self._reduce(model, {attention.node for _, attention in chosen}, context, report)

    def _reduce(self, model: ir.Model, chosen: Collection[ir.Node], context: Context, report: Report) -> None:
        sites = [
            site_of(block, attention)
            for block in anatomy_of(model).blocks
            for attention in block.attentions
            if attention.node in chosen
        ]
        plans = {site.attention.node: self._plan(site) for site in sites}
        unchanged = [site for site in sites if not plans[site.attention.node].changes]
        if unchanged:
            report.skip("no more and no larger heads than wanted", len(unchanged))
        sites = [site for site in sites if plans[site.attention.node].changes]
        if not sites:
            return
        if lacks_samples(self, model, context, report, len(sites)):
            return
        for site in sites:
            require_possible(site, plans[site.attention.node], self.method, context.calibration.memory_bytes)
        planes = self._planes(model, context.calibration, sites, plans)
        tables = {
            table[0]: cut_tables(model.graph, table, planes[table[0]])
            for site in sites
            if (table := site.attention.rotary) is not None and table[0] in planes
        }
        old = [table for site in sites if site.attention.rotary is not None for table in site.attention.rotary]
        if self.needs_samples:
            self._walk(model, context.calibration, sites, plans, planes, tables, report)
        else:
            for site in sites:
                plan, dimensions = plans[site.attention.node], self._dimensions(site, planes)
                weights = self._resampled(site.read(), plan, dimensions)
                site.write({name: ir.tensor(array) for name, array in pack_weights(site, weights).items()})
                self._finish(site, plan, tables, report)
        for value in dict.fromkeys(old):
            drop_unused(model.graph, value)

    def _chosen(self, model: ir.Model, report: Report) -> list[tuple[Block, Attention]]:
        chosen, left = [], 0
        for block in anatomy_of(model).blocks:
            for attention in block.attentions:
                reason = skip_reason(attention)
                if reason is not None:
                    report.skip(reason)
                elif not selected(attention.query.name, self.include, self.exclude):
                    report.skip("excluded by name")
                    left += 1
                else:
                    chosen.append((block, attention))
        if chosen and left:
            report.skip("layers will differ in their heads: only ONNX can express that, no config.json", left)
        return chosen

    def _plan(self, site: HeadSite) -> HeadPlan:
        plan = plan_resampling if self.method == "resample" else plan_heads
        return plan(site.sizes, self.request.wanted(site.sizes), site.block.title)

    def _planes(
        self,
        model: ir.Model,
        calibration: Calibration,
        sites: Sequence[HeadSite],
        plans: Mapping[ir.Node, HeadPlan],
    ) -> dict[ir.Value, Indices]:
        """By table of cosines, the planes that stay: one choice for all that read it."""
        narrowed = [s for s in sites if s.attention.rotary is not None and plans[s.attention.node].narrows]
        if not narrowed:
            return {}
        seen = {}
        if self.needs_samples:
            products = [product for site in narrowed for product in (site.query, site.key)]
            widths = {str(product.output.name): product.features[1] for product in products}
            seen = {name: ChannelStatistics(width, name) for name, width in widths.items()}
            calibration.observe(model, {name: [statistics] for name, statistics in seen.items()})
        energies: dict[ir.Value, Doubles] = {}
        for site in narrowed:
            squares = []
            weights = site.read()
            for product, weight in ((site.query, weights.query), (site.key, weights.key)):
                statistics = seen.get(str(product.output.name))
                mean = np.square(weight).sum(axis=0)
                if statistics is not None:
                    mean = statistics.mean_squares().astype(np.float64)
                squares.append(mean.reshape(weight.shape[1:]))
            assert site.attention.rotary is not None
            table = site.attention.rotary[0]
            added = plane_energies(squares[0], squares[1], interleaved=site.interleaved)
            energies[table] = energies.get(table, 0.0) + added
        size = plans[narrowed[0].attention.node].after[2]
        return {table: strongest_planes(energy, size // 2) for table, energy in energies.items()}

    def _dimensions(self, site: HeadSite, planes: Mapping[ir.Value, Indices]) -> Indices | None:
        rotary = site.attention.rotary
        if rotary is None or rotary[0] not in planes:
            return None
        return kept_dimensions(planes[rotary[0]], site.sizes[2], interleaved=site.interleaved)

    def _walk(
        self,
        model: ir.Model,
        calibration: Calibration,
        sites: Sequence[HeadSite],
        plans: Mapping[ir.Node, HeadPlan],
        planes: Mapping[ir.Value, Indices],
        tables: Mapping[ir.Value, Tables],
        report: Report,
    ) -> None:
        options = (self.request, self.method, self.matrix, self.corrected, self.seed, self.refit, self.ridge)
        name = f"{self.name} {options} {self.first_tokens} {self.include} {self.exclude}"
        for step in calibration.walk(model, method=name):
            inside = set(step.segment.nodes)
            for number, site in enumerate(site for site in sites if site.attention.node in inside):
                plan, before = plans[site.attention.node], site.read()
                seen = HeadSamples(step, site, Target(calibration.memory_bytes))
                try:
                    if not step.known:
                        seen.look()
                    reduced = partial(self._reduced, seen, plan, self._dimensions(site, planes))
                    site.write(step.results(f"heads{number}", reduced))
                    self._finish(site, plan, tables, report)
                    refitted = step.results(f"refit{number}", partial(self._refitted, seen, plan, before))
                finally:
                    seen.target.close()
                site.write(refitted)
                report.measure(site.output.name, float(refitted["error"].numpy()[0]))

    def _reduced(self, seen: HeadSamples, plan: HeadPlan, dimensions: Indices | None) -> dict[str, Floats]:
        site, weights = seen.site, seen.site.read()
        if self.method == "resample":
            return pack_weights(site, self._resampled(weights, plan, dimensions))
        reduction = Reduction(
            plan,
            self.method,
            self.refit,
            self.ridge,
            site.biased,
            site.attention.rotary is not None,
            site.interleaved,
            dimensions,
            self._sink_share(site) if self.method != "slice" else 0.0,
        )
        return pack_weights(site, reduction(weights, Observed(seen.hidden, seen.states, seen.attended)))

    def _refitted(self, seen: HeadSamples, plan: HeadPlan, before: AttentionWeights) -> dict[str, Floats]:
        """The output fitted to what the attention makes by now, and what is lost."""
        after = replace(seen.site, sizes=plan.after)
        weights = after.read()
        normal = seen.regress(plan.after[0] * plan.after[2])
        if self.refit:
            share = self._sink_share(seen.site)
            fitted = mixed_sums(normal, weights, before, seen.hidden.augmented(), share) if share else normal
            weights = refit_output(weights, fitted, self.ridge, centred=after.biased)
        return pack_output(after, weights) | {"error": np.array([output_error(weights, normal)], np.float32)}

    def _sink_share(self, site: HeadSite) -> float:
        return self.first_tokens if site.causal else 0.0

    def _resampled(self, weights: AttentionWeights, plan: HeadPlan, dimensions: Indices | None) -> AttentionWeights:
        planes = None if dimensions is None else np.eye(weights.head_dim)[:, dimensions]
        if planes is None and not plan.narrows:
            planes = np.eye(weights.head_dim)
        matrices = matrices_for(plan, self.matrix, self.seed)
        return resample(weights, matrices, corrected=self.corrected, planes=planes)

    def _finish(self, site: HeadSite, plan: HeadPlan, tables: Mapping[ir.Value, Tables], report: Report) -> None:
        rotary = site.attention.rotary
        site.resize(plan.after, tables.get(rotary[0]) if rotary is not None else None)
        report.match(str(plan))

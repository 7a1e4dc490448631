"""prune-weights: set weights to zero where they matter least.

The graph stays as it is and so does its speed: no kernel here skips zeros. What is bought is the size of a compressed
download, see docs/passes/masks.md. Masks are found again in the result: `onnxpress masks FOLDER -o FILE`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import onnx_ir as ir

from onnxpress.arrays import Arrays, Doubles, Floats
from onnxpress.calibration.known_results import Result, digest_of
from onnxpress.calibration.walk import WalkStep
from onnxpress.errors import UnsupportedModelError, UsageError
from onnxpress.graph.anatomy import Segment
from onnxpress.graph.linear import Linear, read_linear, read_matrix, selected
from onnxpress.graph.report import Report
from onnxpress.optimizers.base import Context, Pass
from onnxpress.optimizers.fitting.blockwise import (
    ERROR,
    by_input,
    fit_blockwise,
    lacks_samples,
    require_tokens,
    second_moments,
)
from onnxpress.optimizers.pruning.mask_files import PackedMask, read_masks
from onnxpress.optimizers.pruning.masked_weights import maskable, put, put_mask, share_of_zeros
from onnxpress.optimizers.pruning.maths.masks import (
    Score,
    Threshold,
    choose_mask,
    growing,
    is_sparse,
    parse_pattern,
    scores,
)
from onnxpress.optimizers.pruning.maths.sparsegpt import refit_masked, sparsegpt
from onnxpress.optimizers.quantization.maths.gptq import relative_error

Method = Literal["magnitude", "l2", "ratio", "wanda", "sparsegpt"]
STEPS = 16
"""Steps of the refit after SparseGPT, unless the user says otherwise; not yet tuned on a real model."""


class PruneWeights(Pass):
    """Set the least important weights of the transformer's products to zero.

    magnitude    |w|
    l2           w²: differs for blocks, which count with the sum of their squares
    ratio        |w| relative to the means of its row and of its matrix, weighted by `strength`
    wanda        |w| times the loudness of its input, compared within each output
    sparsegpt    by what it costs when the weights that stay make up for it, which they then do
    """

    name = "prune-weights"
    exact = False
    needs_anatomy = True
    wanted_rows = 32
    wanted_length = 256

    def __init__(
        self,
        sparsity: float | None = None,
        pattern: str = "unstructured",
        method: Method = "magnitude",
        scope: Literal["layer", "global"] = "layer",
        strength: float = 1.0,
        rounds: int = 1,
        refit: int | None = None,
        damping: float = 0.03,
        masks: str | None = None,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        min_features: int = 32,
    ) -> None:
        """
        Args:
            sparsity: the share of weights that are zero afterwards, 0.5 if left out; N:M says it itself.
            pattern: `unstructured`; `N:M`, such as `2:4`: at most N of M consecutive inputs stay; `block:RxC`: blocks
                of R outputs and C inputs go as a whole.
            method: by what weights are ranked: `magnitude`; `wanda` and `ratio`, magnitude times that of the input;
                `sparsegpt`, by what each removal costs, the others making up for it.
            scope: `global` compares the weights of all products with each other; for unstructured patterns and methods
                that look at no samples.
            strength: λ of `ratio`: 0 compares with the mean of the matrix, 1 with that of the row.
            rounds: how many times weights are pruned, sparsity growing with the cube and statistics taken anew.
            refit: steps of a least squares fit of the weights that stay, to what the product computed on sample inputs;
                none: 16 for sparsegpt, 0 for others.
            damping: added to the second moments of inputs by SparseGPT and the fit, times their mean.
            masks: a file of masks to put on; the options above say nothing then.
            include: patterns of weight names to prune; none: all but the head, which only a pattern includes.
            exclude: patterns of weight names to leave alone.
            min_features: products with fewer inputs or outputs are left alone.
        """
        self.pattern = parse_pattern(pattern)
        implied = self.pattern.sparsity
        if sparsity is not None and not 0 <= sparsity < 1:
            raise ValueError(f"sparsity must be at least 0 and below 1, not {sparsity}")
        if implied is not None and sparsity is not None and abs(sparsity - implied) > 1e-9:
            raise ValueError(f"pattern {pattern} makes sparsity {implied:g}, not {sparsity:g}; leave it out")
        if scope == "global" and (pattern != "unstructured" or method in ("wanda", "sparsegpt")):
            raise ValueError("scope = global goes with pattern = unstructured and method = magnitude, l2 or ratio")
        if not 0 <= strength <= 1:
            raise ValueError(f"strength must lie between 0 and 1, not {strength}")
        if rounds < 1 or (rounds > 1 and implied is not None):
            raise ValueError(f"rounds must be at least 1, and 1 for a pattern such as {pattern} if that is N:M")
        if refit is not None and refit < 0:
            raise ValueError(f"refit must be at least 0, not {refit}")
        if not damping > 0:
            raise ValueError(f"damping must be above 0, not {damping}")
        self.sparsity = (0.5 if sparsity is None else sparsity) if implied is None else implied
        self.method: Method = method
        self.scope, self.strength, self.rounds, self.damping = scope, strength, rounds, damping
        self.refit = (STEPS if method == "sparsegpt" else 0) if refit is None else refit
        self.given = None if masks is None else read_masks(Path(masks))
        self.include, self.exclude = tuple(include), tuple(exclude)
        self.min_features = min_features

    @property
    def needs_samples(self) -> bool:
        return self.given is None and (self.method in ("wanda", "sparsegpt") or self.refit > 0)

    def apply(self, model: ir.Model, context: Context, report: Report) -> None:
        targets = self._targets(model, report)
        if self.given is not None:
            self._put_masks(model, targets, self.given, report)
            return
        if lacks_samples(self, model, context, report, len(targets)):
            return
        digests = {name: digest_of(linear.weight) for name, linear in targets.items()}
        for name, digest in digests.items():
            known = context.known.find(self.name, name, digest)
            if known is not None:
                put(targets.pop(name), known["weight"])
                report.match("pruned in another graph")
        originals = {name: linear.weight.const_value for name, linear in targets.items()}
        changed = set[str]()
        for number, sparsity in enumerate(growing(self.sparsity, self.rounds)):
            if self.needs_samples:
                changed |= self._by_samples(model, context, targets, originals, sparsity, number, report)
            else:
                changed |= self._by_weights(targets, sparsity)
        for name, linear in targets.items():
            if name not in changed:
                report.skip("as sparse already")
                continue
            assert linear.weight.const_value is not None
            context.known.add(self.name, name, digests[name], {"weight": linear.weight.const_value})
            report.match(f"{share_of_zeros(linear):.0%} zeros")

    def _targets(self, model: ir.Model, report: Report) -> dict[str, Linear]:
        """The products whose weights are to be pruned, by name; UsageError where the pattern does not divide one."""
        targets = maskable(model, report, self.include, self.exclude, self.min_features, once=self.refit > 0)
        for name, linear in targets.items():
            if self.given is None and (reason := self.pattern.obstacle(*linear.shape)):
                raise UsageError(
                    f"prune-weights: {name}: {reason}",
                    hint="choose another pattern, or leave the weight out with exclude",
                )
        return targets

    def _put_masks(
        self, model: ir.Model, targets: Mapping[str, Linear], masks: Mapping[str, PackedMask], report: Report
    ) -> None:
        for name, mask in masks.items():
            if not selected(name, self.include, self.exclude):
                continue
            if name not in targets:
                if name in model.graph.initializers:
                    raise UnsupportedModelError(f"the mask of {name} is for a weight that prune-weights leaves alone")
                report.skip("in the masks' file, but not in this graph")
                continue
            linear = targets[name]
            if put_mask(linear, mask):
                report.match(f"{share_of_zeros(linear):.0%} zeros")
            else:
                report.skip("as sparse already")

    def _by_weights(self, targets: Mapping[str, Linear], sparsity: float) -> set[str]:
        """Put masks on all targets by their weights alone; the names of those that this changed."""
        threshold = None
        if self.scope == "global":
            threshold = Threshold(lambda: (self._scores(linear) for linear in targets.values()), sparsity)
        changed = set()
        for name, linear in targets.items():
            importance = self._scores(linear)
            mask = choose_mask(importance, sparsity, self.pattern) if threshold is None else threshold.mask(importance)
            if put_mask(linear, PackedMask.pack(mask.T if linear.transposed else mask)):
                changed.add(name)
        return changed

    def _scores(self, linear: Linear) -> Floats:
        return scores(read_linear(linear), self._score, strength=self.strength)

    def _by_samples(
        self,
        model: ir.Model,
        context: Context,
        targets: Mapping[str, Linear],
        originals: Mapping[str, ir.TensorProtocol | None],
        sparsity: float,
        number: int,
        report: Report,
    ) -> set[str]:
        """Prune by what products read, each looked at after those before it were pruned; the names of those pruned."""
        require_tokens(context.calibration, self.name, 'method="magnitude"')
        groups, changed = by_input(targets.values()), set[str]()

        def stages(segment: Segment) -> list[list[Linear]]:
            return [[linear for linear in group if not self._is_done(linear, sparsity)] for group in groups(segment)]

        def put_weight(linear: Linear, result: Result) -> None:
            put(linear, result["weight"])
            changed.add(linear.name)

        fit_blockwise(
            model,
            context,
            report,
            fit=f"{self.name} {number}",
            options=(sparsity, self.pattern, self.method, self.strength, self.refit, self.damping, sorted(targets)),
            stages=stages,
            solve=partial(self._solve, originals=originals, sparsity=sparsity),
            put=put_weight,
            by_product=True,
            once=False,
        )
        return changed

    def _is_done(self, linear: Linear, sparsity: float) -> bool:
        return is_sparse(read_linear(linear), sparsity, self.pattern, per_output=self._per_output)

    @property
    def _score(self) -> Score:
        assert self.method != "sparsegpt", "it has none: its costs change while it runs"
        return self.method

    @property
    def _per_output(self) -> bool:
        return self.method == "wanda"

    def _solve(
        self,
        step: WalkStep,
        linears: Sequence[Linear],
        *,
        originals: Mapping[str, ir.TensorProtocol | None],
        sparsity: float,
    ) -> dict[str, Arrays]:
        """Pruned weights, as they are stored, and relative errors of products that read one activation."""
        moments = second_moments(step, linears)
        results: dict[str, Arrays] = {}
        for linear in linears:
            tensor = originals[linear.name]
            assert tensor is not None
            original = read_matrix(tensor, linear.name, transpose=linear.transposed)
            pruned = self._pruned(read_linear(linear), original, moments, sparsity)
            stored = np.ascontiguousarray(pruned.T if linear.transposed else pruned)
            results[linear.name] = {"weight": stored, ERROR: np.array([relative_error(original, pruned, moments)])}
        return results

    def _pruned(self, weight: Floats, original: Floats, gram: Doubles, sparsity: float) -> Floats:
        if self.method == "sparsegpt":
            pruned, mask = sparsegpt(weight, gram, sparsity, self.pattern, damping=self.damping)
        else:
            norms = np.sqrt(np.diagonal(gram)).astype(np.float32)
            importance = scores(weight, self._score, strength=self.strength, norms=norms)
            mask = choose_mask(importance, sparsity, self.pattern, per_output=self._per_output) & (weight != 0)
            pruned = np.where(mask, weight, np.float32(0))
        if not self.refit:
            return pruned
        return refit_masked(original, pruned, mask, gram, damping=self.damping, steps=self.refit)

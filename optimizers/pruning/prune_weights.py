"""prune-weights: set weights to zero where they matter least.

The graph stays as it is and so does its speed: no kernel here skips zeros. What is bought is the size of a compressed
download, see docs/passes/masks.md. Masks are found again in the result: `onnxpress masks FOLDER -o FILE`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from onnxpress.arrays import Floats
from onnxpress.calibration.calibration import NO_SAMPLES
from onnxpress.calibration.samples import token_count
from onnxpress.calibration.walk import Step
from onnxpress.errors import BadInputError, UnsupportedModelError, UsageError
from onnxpress.graph.linear import Linear, read_matrix, read_rows, selected
from onnxpress.graph.report import Report
from onnxpress.optimizers.calibrated_pass import CalibratedPass
from onnxpress.optimizers.fitting.statistics import Gram
from onnxpress.optimizers.pruning.mask_files import PackedMask, read_masks
from onnxpress.optimizers.pruning.masked_weights import maskable, put, put_mask, read, zeros
from onnxpress.optimizers.pruning.maths.masks import Score, Threshold, choose, growing, is_sparse, parse_pattern, scores
from onnxpress.optimizers.pruning.maths.sparsegpt import refit, sparsegpt
from onnxpress.optimizers.quantization.fit_blocks import FEWEST_TOKENS
from onnxpress.optimizers.quantization.maths.gptq import relative_error

Method = Literal["magnitude", "l2", "ratio", "wanda", "sparsegpt"]
STEPS = 16
"""Of the refit after SparseGPT, unless the user says otherwise; not yet tuned on a real model."""


class Pruned(NamedTuple):
    """What became of a weight."""

    digest: bytes
    """Of the weight before."""
    tensor: ir.TensorProtocol


class PruneWeights(CalibratedPass):
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
            method: see above.
            scope: `global` compares the weights of all products with each other; for unstructured patterns and methods
                that look at no samples.
            strength: λ of `ratio`: 0 compares with the mean of the matrix, 1 with that of the row.
            rounds: sparsity grows in so many, with the cube, statistics being taken anew in each.
            refit: steps of a least squares fit of the weights that stay, to what the product computed on sample inputs;
                none: 16 for sparsegpt, 0 for others.
            damping: of SparseGPT and the fit, times the mean energy of an input.
            masks: a file of masks to put on; the options above say nothing then.
            include, exclude: patterns of weight names; products with other weights are left alone. The head is left
                alone unless `include` fits it.
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
        self.known: dict[str, Pruned] = {}
        """By weight: one that several graphs have, as the two decoders of an encoder-decoder, is pruned once."""

    @property
    def needs_samples(self) -> bool:
        return self.given is None and (self.method in ("wanda", "sparsegpt") or self.refit > 0)

    def apply(self, model: ir.Model, report: Report) -> None:
        targets = self._targets(model, report)
        if self.given is not None:
            self._put_masks(model, targets, self.given, report)
            return
        if self.needs_samples and not self.calibration.fits(model):
            report.skip(NO_SAMPLES, len(targets))
            return
        before = {name: _Before(linear.weight.const_value, _digest(linear)) for name, linear in targets.items()}
        changed = set()
        for name in list(targets):
            known = self.known.get(name)
            if known is not None and known.digest == before[name].digest:
                put(targets.pop(name), known.tensor)
                report.match("pruned in another graph")
        for number, sparsity in enumerate(growing(self.sparsity, self.rounds)):
            if self.needs_samples:
                changed |= self._by_samples(model, targets, before, sparsity, number, report)
            else:
                changed |= self._by_weights(targets, sparsity)
        for name, linear in targets.items():
            if name not in changed:
                report.skip("as sparse already")
                continue
            assert linear.weight.const_value is not None
            self.known[name] = Pruned(before[name].digest, linear.weight.const_value)
            report.match(f"{zeros(linear):.0%} zeros")

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
                report.match(f"{zeros(linear):.0%} zeros")
            else:
                report.skip("as sparse already")

    def _by_weights(self, targets: Mapping[str, Linear], sparsity: float) -> set[str]:
        """Put masks on all targets by their weights alone; the names of those that this changed."""
        threshold = None
        if self.scope == "global":
            threshold = Threshold(lambda: (self._scores(linear) for linear in targets.values()), sparsity)
        changed = set()
        for name, linear in targets.items():
            found = self._scores(linear)
            mask = choose(found, sparsity, self.pattern) if threshold is None else threshold.mask(found)
            if put_mask(linear, PackedMask.pack(mask.T if linear.transposed else mask)):
                changed.add(name)
        return changed

    def _scores(self, linear: Linear) -> Floats:
        return scores(read(linear), self._score, strength=self.strength)

    def _by_samples(
        self,
        model: ir.Model,
        targets: Mapping[str, Linear],
        before: Mapping[str, _Before],
        sparsity: float,
        number: int,
        report: Report,
    ) -> set[str]:
        """The same by what products read, each looked at after those before it were pruned."""
        tokens = token_count(self.calibration.samples)
        if 0 < tokens < FEWEST_TOKENS:
            raise BadInputError(
                f"prune-weights has {tokens} tokens to calibrate with; it needs at least {FEWEST_TOKENS}",
                hint='give a longer text with --calibration, or choose method="magnitude", which needs none',
            )
        options = (sparsity, self.pattern, self.method, self.strength, self.refit, self.damping, sorted(targets))
        waiting, changed = dict(targets), set()
        for step in self.calibration.walk(model, method=f"prune-weights {number} {options!r}", by_product=True):
            for place, linears in enumerate(_stages(step, waiting)):
                fresh = [linear for linear in linears if not self._is_done(linear, sparsity)]
                found = step.results(str(place), partial(self._solve, step, fresh, before, sparsity))
                for linear in fresh:
                    put(linear, found[f"{linear.name}#weight"])
                    report.measure(linear.name, float(found[f"{linear.name}#error"].numpy()[0]))
                    changed.add(linear.name)
                for linear in linears:
                    waiting.pop(linear.name, None)
        return changed

    def _is_done(self, linear: Linear, sparsity: float) -> bool:
        return is_sparse(read(linear), sparsity, self.pattern, per_output=self._per_output)

    @property
    def _score(self) -> Score:
        assert self.method != "sparsegpt", "it has none: its costs change while it runs"
        return self.method

    @property
    def _per_output(self) -> bool:
        return self.method == "wanda"

    def _solve(
        self, step: Step, linears: Sequence[Linear], before: Mapping[str, _Before], sparsity: float
    ) -> dict[str, NDArray[Any]]:
        """Pruned weights and relative errors of products that read one activation: `weight#weight`, `weight#error`."""
        if not linears:
            return {}
        activation = str(linears[0].activation.name)
        gram = Gram(linears[0].shape[0], activation)
        step.observe({activation: [gram]})
        moments = gram.matrix()
        arrays: dict[str, NDArray[Any]] = {}
        for linear in linears:
            original = read_matrix(before[linear.name].tensor, linear.name, transpose=linear.transposed)
            pruned = self._pruned(read(linear), original, moments, sparsity)
            arrays[f"{linear.name}#weight"] = np.ascontiguousarray(pruned.T if linear.transposed else pruned)
            arrays[f"{linear.name}#error"] = np.array([relative_error(original, pruned, moments)])
        return arrays

    def _pruned(self, weight: Floats, original: Floats, gram: NDArray[np.float64], sparsity: float) -> Floats:
        if self.method == "sparsegpt":
            pruned, mask = sparsegpt(weight, gram, sparsity, self.pattern, damping=self.damping)
        else:
            norms = np.sqrt(np.diagonal(gram)).astype(np.float32)
            found = scores(weight, self._score, strength=self.strength, norms=norms)
            mask = choose(found, sparsity, self.pattern, per_output=self._per_output) & (weight != 0)
            pruned = np.where(mask, weight, np.float32(0))
        if not self.refit:
            return pruned
        return refit(original, pruned, mask, gram, damping=self.damping, steps=self.refit)


class _Before(NamedTuple):
    """A weight before the first round."""

    tensor: Any
    digest: bytes


def _stages(step: Step, waiting: Mapping[str, Linear]) -> list[list[Linear]]:
    """Weights that are waiting and read one activation of a segment, in the order in which they run."""
    stages: dict[ir.Value, list[Linear]] = {}
    for linear in waiting.values():
        if linear.node in step.segment.nodes:
            stages.setdefault(linear.activation, []).append(linear)
    return list(stages.values())


def _digest(linear: Linear) -> bytes:
    return hashlib.blake2b(read_rows(linear).view(np.uint8).data, digest_size=16).digest()

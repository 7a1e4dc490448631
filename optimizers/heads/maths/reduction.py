"""One attention with fewer, or smaller, heads: the methods of reduce-heads put together, from weights and moments."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from onnxpress.arrays import Doubles, Indices
from onnxpress.optimizers.fitting.moments import Moments
from onnxpress.optimizers.fitting.ridge import penalties
from onnxpress.optimizers.heads.maths.attention_sinks import mixed_moments
from onnxpress.optimizers.heads.maths.attention_weights import AttentionWeights
from onnxpress.optimizers.heads.maths.head_dim import chosen_dimensions, score_bases, value_bases
from onnxpress.optimizers.heads.maths.kv_merge import merge
from onnxpress.optimizers.heads.maths.output_refit import OutputSums
from onnxpress.optimizers.heads.maths.request import HeadPlan
from onnxpress.optimizers.heads.maths.selection import eliminate_heads, head_blocks, loudest_heads, output_norms
from onnxpress.optimizers.heads.maths.value_regression import cluster_sums, regress_values, successors

Method = Literal["least-squares", "regress", "slice"]
VALUE_RIDGE = 0.1
"""The penalty in the regression of values, which has hidden · heads unknowns for each output."""


@dataclass(frozen=True)
class Attended:
    """Sums of what the heads attend to, see `value_regression`: inner products of all, sums of those kept."""

    products: Doubles
    sums: OutputSums


@dataclass(frozen=True)
class Observed:
    """Moments of one attention on the samples."""

    hidden: Moments
    """Moments of x."""
    states: Moments
    """Moments of z, which the output product reads, [heads · head_dim]."""
    attended: Callable[[Indices], Attended]
    """Looks again, for method regress."""


@dataclass(frozen=True)
class Reduction:
    """How to get from `plan.before` to `plan.after`."""

    plan: HeadPlan
    method: Method
    refit: bool
    ridge: float
    centred: bool
    """Whether the output has a bias, which takes up what is constant."""
    rotary: bool = False
    interleaved: bool = False
    kept_dimensions: Indices | None = None
    """Dimensions of queries and keys, where positions are rotary and heads become smaller."""
    sink_share: float = 0.0
    """The share of the moments that tokens have which attend to nothing but themselves, see `attention_sinks`."""

    def __call__(self, weights: AttentionWeights, seen: Observed) -> AttentionWeights:
        """The reduced weights; a refit has the last word on the output."""
        states = seen.states.augmented()
        if self.sink_share:
            states = mixed_moments(states, weights, seen.hidden.augmented(), self.sink_share)
        second, mean = states[:-1, :-1], states[-1, :-1]
        gram = second - self.centred * np.outer(mean, mean)
        reduced, kept = self._drop(weights, gram, np.diagonal(second))
        if self.method == "regress" and self.plan.drops:
            return self._narrow_scores(self._regress(weights, reduced, kept, seen), seen)
        if self.plan.merges:
            keys, values = (_moments(weight, seen.hidden.augmented()) for weight in (reduced.key, reduced.value))
            reduced = merge(reduced, keys, values, self.plan.after[1], rotary=self.rotary, interleaved=self.interleaved)
        if self.plan.narrows:
            reduced = self._narrow_scores(self._narrow_values(reduced, gram, kept, seen), seen)
        return reduced

    def _drop(self, weights: AttentionWeights, gram: Doubles, raw: Doubles) -> tuple[AttentionWeights, Indices]:
        if not self.plan.drops:
            return weights, np.arange(weights.heads)
        if self.method == "slice":
            norms = output_norms(gram, weights.output)
            kept = loudest_heads(norms, weights.kv_heads, self.plan.dropped)
            return weights.keep(kept), kept
        penalty = penalties(gram, self.ridge, raw)
        kept, output = eliminate_heads(gram, weights.output, weights.kv_heads, self.plan.dropped, penalty)
        found = weights.keep(kept)
        return (replace(found, output=output) if self.refit else found), kept

    def _regress(
        self, weights: AttentionWeights, reduced: AttentionWeights, kept: Indices, seen: Observed
    ) -> AttentionWeights:
        attended = seen.attended(kept)
        prior = cluster_sums(weights, kept, successors(attended.products, kept))
        value, output = regress_values(attended.sums, prior, reduced.kv_heads, self.plan.after[2], VALUE_RIDGE)
        padded = np.concatenate([value, np.zeros((1, *value.shape[1:]))])
        return replace(reduced, value=padded, output=output)

    def _narrow_values(
        self, weights: AttentionWeights, gram: Doubles, kept: Indices, seen: Observed
    ) -> AttentionWeights:
        blocks = head_blocks(gram, self.plan.before[0])[kept]
        if self.plan.merges:  # nothing was seen of them: their values before attention mixes them
            blocks = np.repeat(
                _squares(weights.value, seen.hidden.augmented(), centred=self.centred), weights.group, axis=0
            )
        size = self.plan.after[2]
        if self.method == "slice":
            loudness = np.einsum("hdd,hdo->hd", blocks, weights.output**2)
            inward = chosen_dimensions(loudness.reshape(weights.kv_heads, weights.group, -1).sum(axis=1), size)
            outward = inward.transpose(0, 2, 1)
        else:
            inward, outward = value_bases(blocks, weights.output, weights.kv_heads, size)
        return weights.map_values(inward, outward)

    def _narrow_scores(self, weights: AttentionWeights, seen: Observed) -> AttentionWeights:
        if not self.plan.narrows:
            return weights
        if self.kept_dimensions is not None:
            return replace(
                weights, query=weights.query[..., self.kept_dimensions], key=weights.key[..., self.kept_dimensions]
            )
        queries = _squares(weights.query, seen.hidden.augmented(), centred=False)
        keys = _squares(weights.key, seen.hidden.augmented(), centred=True)
        if self.method == "slice":
            shared = queries.reshape(weights.kv_heads, weights.group, *queries.shape[1:]).sum(axis=1)
            energy = np.einsum("gdd->gd", shared) * np.einsum("gdd->gd", keys)
            maps = chosen_dimensions(energy, self.plan.after[2])
            return weights.map_scores(maps, maps)
        return weights.map_scores(*score_bases(queries, keys, weights.kv_heads, self.plan.after[2]))


def _moments(weight: Doubles, hidden: Doubles) -> Doubles:
    """E[x_g x_hᵀ] of what heads compute, [heads, head_dim, heads, head_dim], from weights [hidden + 1, heads, …]."""
    flat = weight.reshape(len(weight), -1)
    moments: Doubles = (flat.T @ hidden @ flat).reshape(weight.shape[1:] * 2)
    return moments


def _squares(weight: Doubles, hidden: Doubles, *, centred: bool) -> Doubles:
    """E[x_h x_hᵀ] of each head, or its covariance, [heads, head_dim, head_dim]."""
    moments = hidden - np.outer(hidden[-1], hidden[-1]) * centred
    blocks: Doubles = np.einsum("ihd,ihe->hde", weight, np.einsum("ij,jhe->ihe", moments, weight))
    return blocks

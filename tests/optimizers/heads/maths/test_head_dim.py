"""Smaller heads: exact where ranks allow, invertible maps change nothing, never worse than picking dimensions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxpress.optimizers.heads.maths.attention_weights import AttentionWeights
from onnxpress.optimizers.heads.maths.head_dim import chosen_dimensions, roots, score_bases, value_bases
from onnxpress.optimizers.heads.maths.selection import head_blocks

Function = Callable[..., Any]


def test_an_invertible_map_of_values_changes_nothing(
    rng: np.random.Generator, random_weights: Function, attend: Function
) -> None:
    weights = random_weights(rng, 12, 4, 2, 6)
    maps = rng.standard_normal((2, 6, 6)) + 3 * np.eye(6)
    x = rng.standard_normal((20, 12))
    changed = weights.map_values(maps, np.linalg.inv(maps))
    np.testing.assert_allclose(attend(changed, x), attend(weights, x), atol=1e-9)
    changed = weights.map_scores(maps, np.linalg.inv(maps).transpose(0, 2, 1))
    np.testing.assert_allclose(attend(changed, x), attend(weights, x), atol=1e-9)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), rank=st.integers(1, 4), group=st.integers(1, 3), side=st.booleans())
def test_values_of_low_rank_lose_nothing(
    seed: int, rank: int, group: int, side: bool, random_weights: Function, states: Function, attend: Function
) -> None:
    """Either the values of a group lie in `rank` directions, or all outputs of the group read so many of them."""
    rng = np.random.default_rng(seed)
    weights = random_weights(rng, 10, 2 * group, 2, 6)
    thin = np.linalg.qr(rng.standard_normal((2, 6, rank)))[0]
    projection = thin @ thin.transpose(0, 2, 1)
    eye = np.repeat(np.eye(6)[None], 2, axis=0)
    weights = weights.map_values(*((projection, eye) if side else (eye, projection)))
    x = rng.standard_normal((60, 10))
    z = states(weights, x, 0.5)
    bases = value_bases(head_blocks(z.T @ z / 60, 2 * group), weights.output, 2, rank)
    found = weights.map_values(*bases)
    assert found.sizes == (2 * group, 2, rank)
    np.testing.assert_allclose(attend(found, x), attend(weights, x), atol=1e-6)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), rank=st.integers(1, 4), group=st.integers(1, 3), side=st.booleans())
def test_scores_of_low_rank_lose_nothing(
    seed: int, rank: int, group: int, side: bool, random_weights: Function, attend: Function
) -> None:
    """With biases: that of keys does not count, that of queries is a row of its weight."""
    rng = np.random.default_rng(seed)
    weights = random_weights(rng, 10, 2 * group, 2, 6)
    thin = np.linalg.qr(rng.standard_normal((2, 6, rank)))[0]
    projection = thin @ thin.transpose(0, 2, 1)
    eye = np.repeat(np.eye(6)[None], 2, axis=0)
    weights = weights.map_scores(*((projection, eye) if side else (eye, projection)))
    x = rng.standard_normal((60, 10))
    inputs = np.column_stack([x, np.ones(60)])
    moments = inputs.T @ inputs / 60
    centred = moments - np.outer(moments[-1], moments[-1])
    queries, keys = (
        np.einsum("ihd,ij,jhe->hde", weight, by, weight)
        for weight, by in ((weights.query, moments), (weights.key, centred))
    )
    found = weights.map_scores(*score_bases(queries, keys, 2, rank))
    np.testing.assert_allclose(attend(found, x), attend(weights, x), atol=1e-6)


def test_scores_are_cut_as_the_decomposition_for_weights_says(
    rng: np.random.Generator, random_weights: Function
) -> None:
    """C^½ Wq Wkᵀ C^½, for one head without biases and inputs without a mean: the same best approximation."""
    weights = random_weights(rng, 8, 1, 1, 6, bias=False)
    x = rng.standard_normal((400, 8)) @ rng.standard_normal((8, 8))
    moments = x.T @ x / 400
    query, key = weights.query[:-1, 0], weights.key[:-1, 0]
    root, inverse = roots(moments)
    left, values, right = np.linalg.svd(root @ query @ key.T @ root)
    expected = inverse @ (left[:, :3] * values[:3]) @ right[:3] @ inverse
    queries, keys = ((weight.T @ moments @ weight)[None] for weight in (query, key))
    maps = score_bases(queries, keys, 1, 3)
    np.testing.assert_allclose(query @ maps[0][0] @ maps[1][0].T @ key.T, expected, atol=1e-6)


def test_a_basis_loses_less_than_dimensions(
    rng: np.random.Generator, random_weights: Function, states: Function, attend: Function
) -> None:
    weights = random_weights(rng, 16, 4, 4, 8)
    x = rng.standard_normal((300, 16))
    z = states(weights, x, 0.5)
    blocks = head_blocks(z.T @ z / 300, 4)
    energy = np.einsum("hdd,hdo->hd", blocks, weights.output**2)
    selection = chosen_dimensions(energy, 3)
    assert selection.sum(axis=1).tolist() == [[1, 1, 1]] * 4
    sliced = weights.map_values(selection, selection.transpose(0, 2, 1))
    based = weights.map_values(*value_bases(blocks, weights.output, 4, 3))
    expected = attend(weights, x)
    errors = [float(np.square(attend(one, x) - expected).sum()) for one in (based, sliced)]
    assert errors[0] < errors[1]


def test_nothing_is_known_of_silent_heads(rng: np.random.Generator, random_weights: Function) -> None:
    weights = random_weights(rng, 4, 2, 2, 4)
    inward, outward = value_bases(np.zeros((2, 4, 4)), weights.output, 2, 2)
    assert isinstance(weights.map_values(inward, outward), AttentionWeights)
    assert np.isfinite(inward).all()
    assert np.isfinite(outward).all()

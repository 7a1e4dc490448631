"""Merging key/value heads: exact where they are the same up to what may be turned."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from onnxpress.optimizers.heads.maths.attention_weights import AttentionWeights
from onnxpress.optimizers.heads.maths.kv_merge import merge, turn_heads, turn_planes
from onnxpress.optimizers.heads.maths.rotary_planes import (
    kept_dimensions,
    plane_dimensions,
    plane_energies,
    strongest_planes,
)

Function = Callable[..., Any]


FREQUENCIES = 0.7 ** np.arange(3)


def moments(weight: np.ndarray, inputs: np.ndarray) -> np.ndarray:
    computed = np.einsum("ti,ihd->thd", inputs, weight)
    found: np.ndarray = np.einsum("tgd,the->gdhe", computed, computed) / len(inputs)
    return found


@pytest.mark.parametrize("rotary", [None, (FREQUENCIES, False), (FREQUENCIES, True)])
def test_turned_copies_merge_exactly(
    rng: np.random.Generator, rotary: tuple[np.ndarray, bool] | None, random_weights: Function, attend: Function
) -> None:
    """Heads 0 and 2, 1 and 3 share what they compute in other bases; queries are their own."""
    pairs = random_weights(rng, 9, 2, 2, 6)
    order = [0, 1, 0, 1]
    weights = AttentionWeights(
        rng.standard_normal((10, 4, 6)) / 3, pairs.key[:, order], pairs.value[:, order],
        rng.standard_normal((4, 6, 9)), pairs.offset,
    )  # fmt: skip
    maps = np.repeat(np.eye(6)[None], 4, axis=0)
    maps[2:] = np.linalg.qr(rng.standard_normal((2, 6, 6)))[0]
    weights = weights.map_values(maps, maps.transpose(0, 2, 1))
    if rotary is not None:
        maps = np.repeat(np.eye(6)[None], 4, axis=0)
        for head in (2, 3):
            for first, second in plane_dimensions(6, interleaved=rotary[1]):
                angle, scale = rng.uniform(0, 6), rng.uniform(0.5, 2)
                cos, sin = scale * np.cos(angle), scale * np.sin(angle)
                maps[head][np.ix_([first, second], [first, second])] = [[cos, sin], [-sin, cos]]
    weights = weights.map_scores(np.linalg.inv(maps).transpose(0, 2, 1), maps)
    x = rng.standard_normal((50, 9))
    inputs = np.column_stack([x, np.ones(50)])
    keys, values = (moments(weight, inputs) for weight in (weights.key, weights.value))
    found = merge(weights, keys, values, 2, rotary=rotary is not None, interleaved=rotary is not None and rotary[1])
    assert found.sizes == (4, 2, 6)
    np.testing.assert_allclose(attend(found, x, rotary=rotary), attend(weights, x, rotary=rotary), atol=1e-8)


def test_maps_are_legal(rng: np.random.Generator, rotate: Function) -> None:
    x = rng.standard_normal((30, 3, 6))
    products = np.einsum("tgd,the->gdhe", x, x)
    for matrix in turn_heads(products, [0, 1, 2]):
        np.testing.assert_allclose(matrix @ matrix.T, np.eye(6), atol=1e-12)
    maps, undo = turn_planes(products, [0, 1, 2], interleaved=False)
    for one, other in zip(maps, undo, strict=True):
        np.testing.assert_allclose(one @ other.T, np.eye(6), atol=1e-12)
        turned = rotate(x[:, :1].transpose(1, 0, 2) @ one, FREQUENCIES, False)
        np.testing.assert_allclose(turned, rotate(x[:, :1].transpose(1, 0, 2), FREQUENCIES, False) @ one, atol=1e-12)


@pytest.mark.parametrize("interleaved", [False, True])
def test_silent_planes_are_dropped_and_scores_stay(
    rng: np.random.Generator, interleaved: bool, random_weights: Function, attend: Function
) -> None:
    weights = random_weights(rng, 8, 4, 2, 6)
    silent = plane_dimensions(6, interleaved=interleaved)[1]
    weights.query[..., silent] = 0
    squares = [np.square(weight).sum(axis=0) for weight in (weights.query, weights.key)]
    planes = strongest_planes(plane_energies(*squares, interleaved=interleaved), 2)
    assert planes.tolist() == [0, 2]
    kept = kept_dimensions(planes, 6, interleaved=interleaved)
    x = rng.standard_normal((12, 8))
    found = AttentionWeights(
        weights.query[..., kept], weights.key[..., kept], weights.value, weights.output, weights.offset
    )
    expected = attend(weights, x, rotary=(FREQUENCIES, interleaved))
    np.testing.assert_allclose(attend(found, x, rotary=(FREQUENCIES[planes], interleaved)), expected, atol=1e-12)

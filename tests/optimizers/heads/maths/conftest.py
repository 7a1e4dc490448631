"""Attention in numpy, float64, written plainly: what the reduced one is compared with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from onnxpress.arrays import Doubles
from onnxpress.optimizers.heads.maths.attention_weights import AttentionWeights


def make_weights(
    rng: np.random.Generator, hidden: int, heads: int, kv_heads: int, head_dim: int, *, bias: bool = True
) -> AttentionWeights:
    query, key, value = (
        rng.standard_normal((hidden + 1, count, head_dim)) / np.sqrt(hidden) for count in (heads, kv_heads, kv_heads)
    )
    for weight in (query, key, value):
        weight[-1] *= bias
    output = rng.standard_normal((heads, head_dim, hidden)) / np.sqrt(heads * head_dim)
    return AttentionWeights(query, key, value, output, rng.standard_normal(hidden) * bias)


def compute_states(
    weights: AttentionWeights, x: Doubles, scale: float, rotary: tuple[Doubles, bool] | None = None
) -> Doubles:
    """z of every token, [tokens, heads · head_dim], for one text x [tokens, hidden]; causal.

    Args:
        rotary: frequencies [planes], and whether planes are of neighbouring dimensions.
    """
    inputs = np.column_stack([x, np.ones(len(x))])
    query, key, value = (
        np.einsum("ti,ihd->htd", inputs, weight) for weight in (weights.query, weights.key, weights.value)
    )
    if rotary is not None:
        query, key = apply_rotation(query, *rotary), apply_rotation(key, *rotary)
    key, value = (np.repeat(one, weights.group, axis=0) for one in (key, value))
    scores = np.einsum("hsd,htd->hst", query, key) * scale
    scores[:, np.triu(np.ones(scores.shape[1:], bool), 1)] = -np.inf
    shares: NDArray[Any] = np.exp(scores - scores.max(axis=2, keepdims=True))
    found: Doubles = (shares / shares.sum(axis=2, keepdims=True)) @ value
    return found.transpose(1, 0, 2).reshape(len(x), -1)


def apply_rotation(x: Doubles, frequencies: Doubles, interleaved: bool) -> Doubles:
    angles = np.arange(x.shape[1])[:, None] * frequencies
    cos, sin = np.cos(angles), np.sin(angles)
    half = x.shape[2] // 2
    first, second = (x[..., ::2], x[..., 1::2]) if interleaved else (x[..., :half], x[..., half:])
    turned = (first * cos - second * sin, second * cos + first * sin)
    if interleaved:
        return np.stack(turned, axis=-1).reshape(x.shape)
    return np.concatenate(turned, axis=-1)


def compute_output(
    weights: AttentionWeights, x: Doubles, scale: float = 0.5, rotary: tuple[Doubles, bool] | None = None
) -> Doubles:
    """y, [tokens, hidden]"""
    z = compute_states(weights, x, scale, rotary)
    result: Doubles = z @ weights.output.reshape(z.shape[1], -1) + weights.offset
    return result


@pytest.fixture(scope="session")
def random_weights() -> Callable[..., Any]:
    return make_weights


@pytest.fixture(scope="session")
def states() -> Callable[..., Any]:
    return compute_states


@pytest.fixture(scope="session")
def rotate() -> Callable[..., Any]:
    return apply_rotation


@pytest.fixture(scope="session")
def attend() -> Callable[..., Any]:
    return compute_output

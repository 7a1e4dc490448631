"""The founding formula: against its own words, and exact for equal heads once one side sums."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from onnxpress.optimizers.heads.maths.attention_weights import AttentionWeights
from onnxpress.optimizers.heads.maths.resample import (
    Resampling,
    average_matrix,
    normalized,
    random_matrix,
    resample,
    summing,
)

Function = Callable[..., Any]


def test_the_formula_as_it_was_written_down(rng: np.random.Generator, random_weights: Function) -> None:
    """View as [hidden, heads, head_dim], multiply, swap axes, multiply: each weight by itself, wo transposed."""
    weights = random_weights(rng, 6, 8, 8, 4)
    mixture = random_matrix(8, 2, rng)
    by = Resampling(mixture, mixture, random_matrix(4, 2, rng))
    found = resample(weights, by, corrected=False)

    def formula(matrix: np.ndarray) -> np.ndarray:
        mixed = (matrix @ by.head_dim).transpose(0, 2, 1) @ by.heads
        result: np.ndarray = mixed.transpose(0, 2, 1)
        return result

    for name in ("query", "key", "value"):
        np.testing.assert_allclose(getattr(found, name), formula(getattr(weights, name)), atol=1e-12)
    transposed = weights.output.reshape(32, 6).T.reshape(6, 8, 4)
    np.testing.assert_allclose(found.output, formula(transposed).reshape(6, 4).T.reshape(2, 2, 6), atol=1e-12)


@pytest.mark.parametrize("kind", ["average", "random"])
@pytest.mark.parametrize(("heads", "head_dim", "new"), [(32, 8, (8, 2)), (128, 4, (8, 4)), (6, 6, (4, 5))])
def test_equal_heads_and_dimensions_merge_exactly(
    rng: np.random.Generator,
    kind: str,
    heads: int,
    head_dim: int,
    new: tuple[int, int],
    random_weights: Function,
    attend: Function,
) -> None:
    one = random_weights(rng, 6, 1, 1, 1)
    copies = [np.tile(weight, (1, heads, head_dim)) for weight in (one.query, one.key, one.value)]
    weights = AttentionWeights(*copies, rng.standard_normal((heads, head_dim, 6)), one.offset)
    matrices = [
        random_matrix(size, count, rng) if kind == "random" else average_matrix(size, count)
        for size, count in zip((heads, head_dim), new, strict=True)
    ]
    by = Resampling(matrices[0], matrices[0], matrices[1])
    x = rng.standard_normal((9, 6))
    found = resample(weights, by)
    assert found.sizes == (new[0], new[0], new[1])
    np.testing.assert_allclose(attend(found, x), attend(weights, x), atol=1e-9)
    literal = resample(weights, by, corrected=False)
    assert np.abs(attend(literal, x) - attend(weights, x)).max() > 0.1


def test_matrices(rng: np.random.Generator) -> None:
    np.testing.assert_allclose(average_matrix(4, 2), [[0.5, 0], [0.5, 0], [0, 0.5], [0, 0.5]])
    np.testing.assert_allclose(average_matrix(3, 2), [[2 / 3, 0], [1 / 3, 1 / 3], [0, 2 / 3]])
    np.testing.assert_allclose(random_matrix(7, 3, rng).sum(axis=0), 1)
    np.testing.assert_allclose(summing(random_matrix(7, 3, rng)).sum(axis=1), 1)
    with pytest.raises(ValueError, match="sum to zero"):
        normalized(np.array([[1.0], [-1.0]]))

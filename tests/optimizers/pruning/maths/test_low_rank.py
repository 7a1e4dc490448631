"""Two factors for one matrix: exact where the rank is, least error on the inputs otherwise, ranks within a budget."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from onnxpress.optimizers.pruning.maths.low_rank import allocate, break_even, count_parameters, factors, spectrum_of

SEEDS = st.integers(0, 2**32 - 1)
SIZES = st.integers(2, 12)


@given(SEEDS, SIZES, SIZES, st.booleans(), st.data())
def test_a_matrix_of_exact_rank_is_reproduced(
    seed: int, rows: int, columns: int, seen: bool, data: st.DataObject
) -> None:
    rng = np.random.default_rng(seed)
    rank = data.draw(st.integers(1, min(rows, columns)))
    weight = rng.standard_normal((rows, rank)) @ rng.standard_normal((rank, columns))
    x = rng.standard_normal((3, rows))  # fewer samples than directions, as a rule
    spectrum = spectrum_of(weight, x.T @ x / 3 if seen else None)
    a, b = factors(weight, spectrum.directions, rank)
    assert (a.shape, b.shape) == ((rows, rank), (rank, columns))
    np.testing.assert_allclose(a @ b, weight, atol=1e-6 * np.abs(weight).max())


@given(SEEDS, SIZES, SIZES, st.data())
def test_nothing_loses_less_on_the_inputs(seed: int, rows: int, columns: int, data: st.DataObject) -> None:
    rng = np.random.default_rng(seed)
    rank = data.draw(st.integers(1, min(rows, columns)))
    weight = rng.standard_normal((rows, columns))
    x = rng.standard_normal((60, rows)) * rng.uniform(0.1, 5, rows)

    def loss(a: np.ndarray, b: np.ndarray) -> float:
        return float(np.square(x @ (weight - a @ b)).sum() / 60)

    spectrum = spectrum_of(weight, x.T @ x / 60)
    best = loss(*factors(weight, spectrum.directions, rank))
    scale = float(spectrum.energies.sum())
    assert best <= loss(*factors(weight, spectrum_of(weight, None).directions, rank)) + 1e-5 * scale
    np.testing.assert_allclose(best, spectrum.energies[rank:].sum(), atol=1e-5 * scale)


@given(SEEDS, st.integers(1, 6), st.floats(0.05, 1.2))
def test_ranks_stay_within_the_budget(seed: int, count: int, ratio: float) -> None:
    rng = np.random.default_rng(seed)
    shapes = [(int(rows), int(columns)) for rows, columns in rng.integers(4, 20, (count, 2))]
    energies = [np.sort(rng.random(min(shape)) ** 4)[::-1] for shape in shapes]
    budget = ratio * sum(rows * columns for rows, columns in shapes)
    ranks = allocate(energies, shapes, budget)
    least = sum(sum(shape) for shape in shapes)
    assert count_parameters(ranks, shapes) <= max(budget, least)
    for rank, shape in zip(ranks, shapes, strict=True):
        assert rank is None or 1 <= rank <= break_even(shape)


def test_more_ranks_go_where_energy_is_spread() -> None:
    flat, steep = np.ones(16), np.array([1.0, *[1e-6] * 15])
    ranks = allocate([flat, steep], [(16, 16)] * 2, 16 * 16 * 1.2)
    assert ranks == [None, 1]


def test_break_even() -> None:
    for shape in [(16, 16), (576, 1536), (3, 5)]:
        rank = break_even(shape)
        assert rank * sum(shape) < shape[0] * shape[1] <= (rank + 1) * sum(shape)


def test_fewer_tokens_than_features_with_a_massive_one() -> None:
    """As in a real model: a token a thousand times as large, and moments that no Cholesky factor exists of."""
    rng = np.random.default_rng(4)
    x = rng.standard_normal((40, 128))
    x[0] *= 3000
    weight = rng.standard_normal((128, 64)).astype(np.float32)
    spectrum = spectrum_of(weight, x.T @ x / len(x))
    assert np.isfinite(spectrum.energies).all()
    expected = np.square(np.linalg.svd(x @ weight / np.sqrt(len(x)), compute_uv=False))
    assert abs(spectrum.energies[0] / expected[0] - 1) < 1e-3  # the ridge is a millionth of the mean square

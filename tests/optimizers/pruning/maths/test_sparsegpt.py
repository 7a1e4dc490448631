"""SparseGPT: its updates never lose against its mask alone, and find again what is redundant."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from onnxpress.optimizers.pruning.maths.masks import Pattern, choose_mask, is_sparse, parse_pattern, scores
from onnxpress.optimizers.pruning.maths.sparsegpt import refit_masked, sparsegpt
from onnxpress.optimizers.quantization.maths.gptq import relative_error

Case = tuple[NDArray[np.float32], NDArray[np.float64]]


def case(seed: int, inputs: int, outputs: int, tokens: int) -> Case:
    """A weight and the moments of correlated inputs, some of them loud."""
    generator = np.random.default_rng(seed)
    x = generator.standard_normal((tokens, inputs)) @ generator.standard_normal((inputs, inputs))
    x *= np.exp(generator.normal(0, 1, inputs))
    return generator.standard_normal((inputs, outputs)).astype(np.float32), x.T @ x / tokens


@settings(max_examples=15, deadline=None)
@given(
    st.integers(0, 999),
    st.sampled_from([8, 40, 136, 280]),
    st.integers(1, 9),
    st.sampled_from(["unstructured", "2:4", "1:8", "block:1x4"]),
    st.floats(0, 0.95),
)
def test_the_count_is_exact_and_no_output_is_worse_than_its_mask_alone(
    seed: int, inputs: int, outputs: int, pattern: str, sparsity: float
) -> None:
    weight, gram = case(seed, inputs, outputs, 2 * inputs)
    shape = parse_pattern(pattern)
    pruned, mask = sparsegpt(weight, gram, sparsity, shape)
    assert not pruned[~mask].any()
    if not shape.group:
        size = shape.columns
        assert np.count_nonzero(~mask) == size * round(sparsity * (weight.size // size))
    assert is_sparse(pruned, sparsity, shape)
    better = refit_masked(weight, pruned, mask, gram, steps=8)
    assert not better[~mask].any()
    damped = gram + 0.03 * np.mean(np.diagonal(gram)) * np.eye(inputs)
    errors = [
        np.einsum("ij,ik,kj->j", e, damped, e)
        for e in (weight - better.astype(np.float64), weight - pruned, weight * ~mask)
    ]
    # Errors are compared in float32, in which they are off by some 1e-7 of the product's energy.
    slack = 1e-5 * np.einsum("ij,ik,kj->j", weight, damped, weight)
    assert (errors[0] <= np.minimum(errors[1], errors[2]) + slack).all()


def test_the_refit_is_the_least_squares_of_what_stays() -> None:
    """Against the normal equations of each output."""
    weight, gram = case(1, 24, 5, 100)
    mask = choose_mask(scores(weight, "magnitude"), 0.5, Pattern())
    found = refit_masked(weight, weight * mask, mask, gram, damping=0.1, steps=60)
    damped = gram + 0.1 * np.mean(np.diagonal(gram)) * np.eye(24)
    for output in range(5):
        stays = mask[:, output]
        best = np.linalg.solve(damped[np.ix_(stays, stays)], damped[stays] @ weight[:, output])
        np.testing.assert_allclose(found[stays, output], best, rtol=2e-3, atol=2e-3)


def test_an_input_that_others_explain_is_removed_at_no_loss() -> None:
    """x_3 = 2 x_7 − x_11, and one weight in 16 may go: all of x_3's do, and the others take them over."""
    generator = np.random.default_rng(3)
    x = generator.standard_normal((400, 16))
    x[:, 3] = 2 * x[:, 7] - x[:, 11]
    weight = generator.standard_normal((16, 6)).astype(np.float32)
    gram = x.T @ x / len(x)
    pruned, mask = sparsegpt(weight, gram, 1 / 16, Pattern(), damping=1e-7)
    np.testing.assert_array_equal(mask.all(axis=1), np.arange(16) != 3)
    expected = weight.copy()
    expected[3], expected[7], expected[11] = 0, weight[7] + 2 * weight[3], weight[11] - weight[3]
    np.testing.assert_allclose(pruned, expected, atol=1e-4)
    assert relative_error(weight, pruned, gram) < 1e-8


def test_updates_beat_wanda_beats_magnitude() -> None:
    weight, gram = case(5, 160, 40, 640)
    norms = np.sqrt(np.diagonal(gram)).astype(np.float32)
    wanda = choose_mask(scores(weight, "wanda", norms=norms), 0.5, Pattern(), per_output=True)
    magnitude = choose_mask(scores(weight, "magnitude"), 0.5, Pattern())
    pruned, mask = sparsegpt(weight, gram, 0.5, Pattern())
    errors = [
        relative_error(weight, found, gram)
        for found in (refit_masked(weight, pruned, mask, gram), pruned, weight * wanda, weight * magnitude)
    ]
    assert errors == sorted(errors)
    assert errors[0] < 0.7 * errors[2]


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_pruning_twice_is_pruning_once(pattern: str) -> None:
    weight, gram = case(7, 256, 12, 300)
    once, _ = sparsegpt(weight, gram, 0.5, parse_pattern(pattern))
    twice, _ = sparsegpt(once, gram, 0.5, parse_pattern(pattern))
    np.testing.assert_array_equal(once, twice)


def test_zeros_stay_though_updates_pass_them() -> None:
    """As in the later rounds of a schedule."""
    weight, gram = case(9, 64, 12, 300)
    weight[::2] = 0
    pruned, mask = sparsegpt(weight, gram, 0.25, Pattern())
    assert not pruned[::2].any()
    assert not mask[::2].any()
    assert mask[1::2].all()
    assert not refit_masked(weight, pruned, mask, gram)[::2].any()


def test_what_does_not_fit() -> None:
    weight, gram = case(11, 6, 4, 40)
    with pytest.raises(ValueError, match="do not divide 6 inputs"):
        sparsegpt(weight, gram, 0.5, parse_pattern("2:4"))
    with pytest.raises(ValueError, match=r"gram must be \[6, 6\]"):
        sparsegpt(weight, gram[:5, :5], 0.5, Pattern())
    with pytest.raises(ValueError, match="semi-definite"):
        sparsegpt(weight, -gram, 0.5, Pattern())

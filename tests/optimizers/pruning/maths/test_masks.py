"""Masks: exactly as many zeros as asked for, in the places that the pattern allows, the lowest scores first."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from onnxpress.optimizers.pruning.maths.masks import (
    Pattern,
    Threshold,
    choose_mask,
    growing,
    importance_ratio,
    is_sparse,
    parse_pattern,
    scores,
)
from onnxpress.optimizers.quantization.maths.block_format import BlockFormat, ZeroPoints
from onnxpress.optimizers.quantization.maths.gptq import gptq
from onnxpress.optimizers.quantization.maths.least_squares import fit_least_squares

SIDES = st.integers(1, 24)
SPARSITIES = st.floats(0, 1, exclude_max=True)


def weights(seed: int, inputs: int, outputs: int) -> NDArray[np.float32]:
    """Some of them zero, some equal."""
    generator = np.random.default_rng(seed)
    return np.round(generator.standard_normal((inputs, outputs)) * 4).astype(np.float32)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 99), SIDES, SIDES, SPARSITIES)
def test_unstructured_masks_take_out_the_lowest_and_as_many_as_asked(
    seed: int, inputs: int, outputs: int, sparsity: float
) -> None:
    weight = weights(seed, inputs, outputs)
    mask = choose_mask(scores(weight, "magnitude"), sparsity, Pattern())
    assert np.count_nonzero(~mask) == round(sparsity * weight.size)
    kept, gone = np.abs(weight[mask]), np.abs(weight[~mask])
    assert not kept.size or not gone.size or gone.max() <= kept.min()


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 99), SIDES, SIDES, SPARSITIES)
def test_each_output_loses_as_many(seed: int, inputs: int, outputs: int, sparsity: float) -> None:
    mask = choose_mask(scores(weights(seed, inputs, outputs), "l2"), sparsity, Pattern(), per_output=True)
    np.testing.assert_array_equal((~mask).sum(axis=0), round(sparsity * inputs))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 99), st.integers(1, 6), SIDES, st.integers(2, 8), st.data())
def test_of_every_group_of_inputs_the_highest_stay(seed: int, groups: int, outputs: int, size: int, data: Any) -> None:
    kept = data.draw(st.integers(1, size - 1))
    weight = weights(seed, groups * size, outputs)
    mask = choose_mask(scores(weight, "magnitude"), 0.5, parse_pattern(f"{kept}:{size}"))
    for group in range(groups):
        for output in range(outputs):
            part = slice(group * size, (group + 1) * size)
            here, values = mask[part, output], np.abs(weight[part, output])
            assert here.sum() == kept
            assert values[~here].max() <= values[here].min()


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 99), st.integers(1, 6), st.integers(1, 6), st.integers(1, 4), st.integers(1, 4), SPARSITIES)
def test_blocks_go_as_a_whole(seed: int, down: int, across: int, columns: int, rows: int, sparsity: float) -> None:
    weight = weights(seed, down * columns, across * rows)
    mask = choose_mask(scores(weight, "l2"), sparsity, Pattern(rows=rows, columns=columns))
    kept, energy = [], []
    for i in range(down):
        for j in range(across):
            part = (slice(i * columns, (i + 1) * columns), slice(j * rows, (j + 1) * rows))
            assert mask[part].all() or not mask[part].any()
            kept.append(bool(mask[part].any()))
            energy.append(float(np.square(weight[part]).sum()))
    assert kept.count(False) == round(sparsity * down * across)
    lost = [one for one, stays in zip(energy, kept, strict=True) if not stays]
    assert not lost or len(lost) == len(energy) or max(lost) <= min(np.array(energy)[kept])


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 99), SIDES, SIDES, SPARSITIES, st.booleans())
def test_pruning_twice_is_pruning_once(seed: int, inputs: int, outputs: int, sparsity: float, each: bool) -> None:
    weight = weights(seed, inputs, outputs)
    for score in ("magnitude", "ratio", "wanda"):
        norms = np.zeros(inputs, np.float32)  # the worst case: a kept weight scores no more than a removed one
        once = weight * choose_mask(scores(weight, score, norms=norms), sparsity, Pattern(), per_output=each)
        assert is_sparse(once, sparsity, Pattern(), per_output=each)
        twice = once * choose_mask(scores(once, score, norms=norms), sparsity, Pattern(), per_output=each)
        np.testing.assert_array_equal(once, twice)


def test_equal_scores_go_from_the_first_input_on() -> None:
    mask = choose_mask(np.ones((3, 2), np.float32), 0.5, Pattern())
    np.testing.assert_array_equal(mask, [[False, False], [False, True], [True, True]])
    mask = choose_mask(np.ones((4, 1), np.float32), 0.5, parse_pattern("2:4"))
    np.testing.assert_array_equal(mask[:, 0], [False, False, True, True])


def test_a_block_counts_with_its_sum_or_with_its_squares() -> None:
    """One loud weight among zeros against two middling ones."""
    weight = np.array([[5, 3], [0, 3]], np.float32)
    block = Pattern(columns=2)
    np.testing.assert_array_equal(choose_mask(scores(weight, "magnitude"), 0.5, block)[0], [False, True])
    np.testing.assert_array_equal(choose_mask(scores(weight, "l2"), 0.5, block)[0], [True, False])


def test_what_lambda_does() -> None:
    """At 1 a row's loudness does not count, at 0 nothing else does, between them it counts less."""
    weight = np.array([[1, 30], [2, 10], [3, 20]], np.float32)  # the second output is ten times as loud
    np.testing.assert_allclose(importance_ratio(weight, 1.0), [[0.5, 1.5], [1, 0.5], [1.5, 1]])
    np.testing.assert_allclose(importance_ratio(weight, 0.0), weight / 11)
    np.testing.assert_allclose(importance_ratio(weight, 0.5)[0], [1 / 6.5, 30 / 15.5], rtol=1e-6)
    louder = importance_ratio(weight * np.array([1, 7], np.float32), 1.0)
    np.testing.assert_allclose(louder, importance_ratio(weight, 1.0), rtol=1e-6)
    assert not importance_ratio(np.zeros((2, 2), np.float32), 1.0).any()


def test_wanda_weighs_inputs_by_their_loudness() -> None:
    weight = np.array([[1, -4], [2, 3]], np.float32)
    found = scores(weight, "wanda", norms=np.array([10, 1], np.float32))
    np.testing.assert_array_equal(found, [[10, 40], [2, 3]])
    with pytest.raises(ValueError, match="norms of 2 inputs"):
        scores(weight, "wanda")


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 99), st.lists(st.tuples(SIDES, SIDES), min_size=1, max_size=5), SPARSITIES)
def test_the_cut_through_a_whole_model_is_exact(seed: int, shapes: list[tuple[int, int]], sparsity: float) -> None:
    arrays = [scores(weights(seed + n, *shape), "magnitude") for n, shape in enumerate(shapes)]
    threshold = Threshold(lambda: iter(arrays), sparsity)
    masks = [threshold.mask(array) for array in arrays]
    kept = np.concatenate([array[mask] for array, mask in zip(arrays, masks, strict=True)])
    gone = np.concatenate([array[~mask] for array, mask in zip(arrays, masks, strict=True)])
    assert gone.size == round(sparsity * (gone.size + kept.size))
    assert not kept.size or not gone.size or gone.max() <= kept.min()


def test_sparsity_grows_fast_first_and_ends_where_it_should() -> None:
    np.testing.assert_allclose(growing(0.8, 4), [0.4625, 0.7, 0.7875, 0.8])
    assert growing(0.3, 1) == [0.3]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("4:4", "fewer than all 4"),
        ("0:4", "at least 1"),
        ("block:0x4", "empty"),
        ("diagonal", "must be unstructured"),
        ("2:4 ", "must be"),
    ],
)
def test_unknown_patterns(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_pattern(text)


@pytest.mark.parametrize(("pattern", "message"), [("2:4", "do not divide 6 inputs"), ("block:4x3", "do not divide")])
def test_patterns_that_do_not_divide(pattern: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        choose_mask(np.ones((6, 6), np.float32), 0.5, parse_pattern(pattern))


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("zero_points", ["none", "integer", "float"])
def test_zeros_outlive_blocks_that_can_represent_them(bits: int, zero_points: ZeroPoints) -> None:
    """Symmetric codes and whole zero points do, whatever chose the grid; offsets in floating point do not."""
    weight = np.random.default_rng(bits).normal(0.3, 1, (128, 8)).astype(np.float32)
    weight *= choose_mask(scores(weight, "magnitude"), 0.5, parse_pattern("2:4"))
    blocks = fit_least_squares(weight, BlockFormat(bits, 32, zero_points))
    zeros = blocks.dequantize()[weight == 0]
    assert (not zeros.any()) is (zero_points != "float")


def test_gptq_brings_zeros_back() -> None:
    """Rounding that makes up for errors elsewhere has no reason to leave a weight at zero."""
    generator = np.random.default_rng(0)
    x = generator.standard_normal((256, 64)) @ generator.standard_normal((64, 64))
    weight = generator.standard_normal((64, 8)).astype(np.float32)
    weight *= choose_mask(scores(weight, "magnitude"), 0.5, Pattern())
    found = gptq(weight, x.T @ x / len(x), BlockFormat(4, 32)).blocks.dequantize()
    assert found[weight == 0].any()

"""Accumulators: what they report is that of all samples at once, in any order and however they are split."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from onnxpress.errors import BadInputError
from onnxpress.optimizers.fitting.statistics import AverageRange, ChannelStatistics, Gram
from onnxpress.optimizers.quantization.maths.histogram import Histogram

KINDS: dict[str, Callable[[], Any]] = {
    "gram": lambda: Gram(12, "layer.3"),
    "channels": lambda: ChannelStatistics(12, "layer.3"),
    "average": lambda: AverageRange("layer.3"),
    "histogram": lambda: Histogram("layer.3"),
}


def samples(seed: int = 0, count: int = 5) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [
        (rng.standard_normal((tokens, 12)) * 10.0**power).astype(np.float32)
        for tokens, power in zip(rng.integers(1, 3000, count), rng.permutation(count) - 2, strict=True)
    ]


def fed(make: Callable[[], Any], parts: list[np.ndarray]) -> Any:
    accumulator = make()
    for index, part in enumerate(parts):
        accumulator.update(part, index)
    return accumulator


def test_gram_and_channels_against_all_at_once() -> None:
    parts = samples()
    x = np.concatenate(parts).astype(np.float64)
    np.testing.assert_allclose(fed(KINDS["gram"], parts).matrix(), x.T @ x / len(x), rtol=1e-4, atol=1e-5 * x.var())
    channels = fed(KINDS["channels"], parts)
    np.testing.assert_array_equal(channels.peaks(), np.abs(x).max(axis=0).astype(np.float32))
    np.testing.assert_allclose(channels.mean_magnitudes(), np.abs(x).mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(channels.mean_squares(), (x**2).mean(axis=0), rtol=1e-5)
    low, high = fed(KINDS["average"], parts).range()
    assert low == pytest.approx(np.mean([part.min() for part in parts]))
    assert high == pytest.approx(np.mean([part.max() for part in parts]))


@pytest.mark.parametrize("kind", KINDS)
def test_merging_is_seeing_all(kind: str) -> None:
    parts = samples(1)
    whole, left, right = (fed(KINDS[kind], some) for some in (parts, parts[:2], parts[2:]))
    left.merge(right)
    left.merge(KINDS[kind]())
    for name, value in vars(whole).items():
        np.testing.assert_allclose(vars(left)[name], value, rtol=1e-12) if name != "tensor" else None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_refused_by_name(kind: str, bad: float) -> None:
    accumulator = fed(KINDS[kind], samples(2, 2))
    x = np.ones((1500, 12), np.float32)
    x[1200, 7] = bad
    with pytest.raises(BadInputError, match=r"layer\.3 is not finite.* for sample text 17\.") as caught:
        accumulator.update(x, "text 17")
    assert caught.value.hint


@pytest.mark.parametrize(
    "look", [lambda: KINDS["gram"]().matrix(), lambda: KINDS["channels"]().peaks(), lambda: KINDS["average"]().range(),
             lambda: KINDS["histogram"]().symmetric()],
)  # fmt: skip
def test_nothing_seen_is_an_error(look: Callable[[], Any]) -> None:
    with pytest.raises(BadInputError, match=r"No sample reached layer\.3"):
        look()


VALUES = arrays.arrays(
    np.float32,
    st.integers(1, 40),
    elements=st.one_of(st.floats(-4, 4, width=32), st.floats(-(2.0**60), 2.0**60, width=32), st.just(0.0)),
)


@given(st.lists(VALUES, min_size=1, max_size=5), st.integers(16, 200), st.randoms())
@settings(max_examples=200, deadline=None)
def test_a_histogram_does_not_depend_on_the_order(parts: list[np.ndarray], bins: int, random: Any) -> None:
    def collect(some: list[np.ndarray]) -> Histogram:
        histogram = Histogram("x", bins)
        for part in some:
            histogram.update(part, 0)
        return histogram

    first = collect(parts)
    shuffled = random.sample(parts, len(parts))
    cut = random.randint(0, len(parts))
    merged = collect(shuffled[:cut])
    merged.merge(collect(shuffled[cut:]))
    for other in (merged, collect(shuffled)):
        np.testing.assert_array_equal(other.counts, first.counts)
        np.testing.assert_array_equal(other.edges(), first.edges())
        assert (other.low, other.high) == (first.low, first.high)
    values, edges = np.concatenate(parts).astype(np.float64), first.edges()
    assert len(first.counts) <= bins
    expected = [((values >= low) & (values < high)).sum() for low, high in pairwise(edges)]
    np.testing.assert_array_equal(first.counts, expected)
    # As narrow as can be: half the width would not span the range, unless it is finer than float32.
    width = edges[1] - edges[0]
    finest = np.abs(values).max() * 2.0**-20
    assert width <= max(finest, 2.0**-100) or np.floor(2 * first.high / width) - np.floor(2 * first.low / width) >= bins


def test_symmetric_and_folded_forms_hold_the_same_counts() -> None:
    x = np.random.default_rng(3).standard_normal(5000).astype(np.float32) + 1
    histogram = fed(KINDS["histogram"], [x])
    for bins in (None, 512, 100):
        counts, edges = histogram.symmetric(bins)
        assert len(counts) % 2 == 0
        assert len(counts) <= (bins or np.inf)
        np.testing.assert_allclose(edges, -edges[::-1])
        np.testing.assert_array_equal(counts, np.histogram(x.astype(np.float64), edges)[0])
    counts, edges = histogram.magnitudes()
    # A bin holds its lower edge; mirrored it holds its upper one: no value of a continuous sample lies there.
    np.testing.assert_array_equal(counts, np.histogram(np.abs(x.astype(np.float64)), edges)[0])

"""compute-rotary: the same tables to the last bit or so, from their frequencies; and what is no such table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxpress.optimizers.fusion.compute_rotary import ComputeRotary, find_frequencies


def tables(frequencies: np.ndarray, positions: int, amplitude: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """As transformers makes them: products in float32, functions in float32."""
    angles = np.arange(positions, dtype=np.float32)[:, None] * frequencies.astype(np.float32)
    return np.float32(amplitude) * np.cos(angles), np.float32(amplitude) * np.sin(angles)


def rope(width: int = 32, base: float = 10_000.0) -> np.ndarray:
    return (1 / base ** (np.arange(0, width, 2) / width)).astype(np.float32)


@given(
    base=st.sampled_from([1e4, 1e5, 5e5, 1e6]),
    width=st.sampled_from([16, 64, 128]),
    positions=st.integers(2, 9000),
    amplitude=st.sampled_from([1.0, 1.19, 0.5]),
    scale=st.sampled_from([1.0, 0.125, 1 / 3]),
)
def test_frequencies_are_found_again(base: float, width: int, positions: int, amplitude: float, scale: float) -> None:
    frequencies = rope(width, base) * np.float32(scale)
    cos, sin = tables(frequencies, positions, amplitude)
    found = find_frequencies(cos, sin)
    assert found is not None
    again = tables(found.frequencies, positions, float(found.amplitude))
    np.testing.assert_allclose(again[0], cos, atol=2e-6 * amplitude)
    np.testing.assert_allclose(again[1], sin, atol=2e-6 * amplitude)


def test_what_is_no_table_of_angles(rng: np.random.Generator) -> None:
    cos, sin = tables(rope(), 100)
    assert find_frequencies(cos[1:], sin[1:]) is None  # begins elsewhere
    assert find_frequencies(np.concatenate([cos[:50], cos[:50]]), np.concatenate([sin[:50], sin[:50]])) is None
    assert find_frequencies(cos, sin + np.float32(1e-4)) is None
    assert find_frequencies(*rng.standard_normal((2, 100, 16)).astype(np.float32)) is None
    assert find_frequencies(np.full_like(cos, np.nan), sin) is None


GRAPH = """g (float[1, 2, S, 32] x, int64[1, S] positions, float[2048, 16] cos, float[2048, 16] sin)
    => (float[1, 2, S, 32] y) { y = com.microsoft.RotaryEmbedding(x, positions, cos, sin) }"""


@pytest.mark.parametrize("amplitude", [1.0, 1.5])
def test_golden(check: Callable[..., Any], graph: Callable[..., ir.Model], amplitude: float) -> None:
    cos, sin = tables(rope(), 2048, amplitude)
    feeds = {
        "x": np.random.default_rng(0).standard_normal((1, 2, 3, 32), dtype=np.float32),
        "positions": np.array([[0, 1000, 2047]]),
    }
    times = "" if amplitude == 1 else "\n {0} = Mul({1}, cos.amplitude)"
    found = check(ComputeRotary(), graph(GRAPH, cos=cos, sin=sin), feeds, tolerance=2e-5)
    assert found.listing.count("Mul") == (1 if not times else 3)
    assert "cos" not in found.model.graph.initializers
    assert sum(value.const_value.nbytes for value in found.model.graph.initializers.values()) < 200


def test_small_tables_stay(graph: Callable[..., ir.Model]) -> None:
    cos, sin = tables(rope(), 64)
    model = graph(GRAPH.replace("2048", "64"), cos=cos, sin=sin)
    result = ComputeRotary()(model)
    assert not result.report.matched
    assert result.report.skipped == {"small tables, or not float32": 1}

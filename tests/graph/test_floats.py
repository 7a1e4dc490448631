"""Formats of floating-point weights, against numpy's and ml_dtypes' own conversions."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxpress.errors import CorruptFileError, UnsupportedModelError
from onnxpress.graph.floats import BLOCK, is_finite, require_finite_weight, round_to_dtype, widen

FORMATS = [np.float16, ml_dtypes.bfloat16, np.float32, np.float64]


@pytest.mark.parametrize("dtype", FORMATS)
@given(data=st.data())
def test_finite_is_what_numpy_says_of_any_bits(dtype: Any, data: st.DataObject) -> None:
    size = np.dtype(dtype).itemsize
    raw = data.draw(st.binary(min_size=0, max_size=4 * size).filter(lambda raw: len(raw) % size == 0))
    values = np.frombuffer(raw, dtype)
    with np.errstate(invalid="ignore"):
        assert is_finite(values) == bool(np.isfinite(values.astype(np.float64)).all())


@pytest.mark.parametrize("dtype", [*FORMATS, ml_dtypes.float8_e5m2])
@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf])
def test_not_finite_is_found_anywhere_and_counted(dtype: Any, value: float) -> None:
    array = np.full((5, 7), -1, dtype)
    assert require_finite_weight(array, "w") is array
    array[4, 6] = value
    for view in (array, array.T, array[:, 5:]):
        with pytest.raises(CorruptFileError, match=f"weight w holds NaN or infinity .1 of {view.size} values"):
            require_finite_weight(view, "w")


def test_integers_are_always_finite() -> None:
    assert is_finite(np.array([2**31 - 1, -1], np.int32))
    assert is_finite(np.array([True]))


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("shape", [(), (3,), (2, 3, 4), (BLOCK + 3, 5), (7, 2 * BLOCK + 1), (0, 4)])
def test_widening_is_exact_in_any_layout(dtype: Any, shape: tuple[int, ...]) -> None:
    values = np.random.default_rng(0).standard_normal(shape).astype(dtype)
    for view in (values, values.T, values[..., 1:] if shape else values):
        wide = widen(view)
        assert wide.dtype == np.float32
        assert wide.flags.c_contiguous
        np.testing.assert_array_equal(wide, view.astype(np.float32))


def test_widening_keeps_every_bfloat16() -> None:
    values = np.arange(2**16, dtype=np.uint16).view(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(widen(values).view(np.uint32) >> 16, np.arange(2**16))


@pytest.mark.parametrize("values", [[1.0, 65504.0, -65519.0], [1e-9, 0.0, -0.0]])
def test_narrowing_rounds_as_numpy_does(values: list[float]) -> None:
    """65519 is the last number that rounds to 65504 rather than to infinity."""
    array = np.array(values, np.float32)
    np.testing.assert_array_equal(round_to_dtype(array, np.float16, "w"), array.astype(np.float16))
    np.testing.assert_array_equal(round_to_dtype(array, ml_dtypes.bfloat16, "w"), array.astype(ml_dtypes.bfloat16))


@pytest.mark.parametrize(
    ("value", "source", "target"),
    [
        (65520.0, np.float32, np.float16),
        (-1e30, ml_dtypes.bfloat16, np.float16),
        (3.4e38, np.float32, ml_dtypes.bfloat16),
        (1e300, np.float64, np.float32),
    ],
)
def test_narrowing_never_makes_infinity(value: float, source: Any, target: Any) -> None:
    with pytest.raises(UnsupportedModelError, match="Weight 'w' does not fit into"):
        round_to_dtype(np.array([1.0, value]).astype(source), target, "w")

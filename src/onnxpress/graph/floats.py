"""Floating-point weights between formats: widened exactly, narrowed with a check, refused where they are not finite.

bfloat16 is the upper half of a float32 (https://en.wikipedia.org/wiki/Bfloat16_floating-point_format), so that widening
is moving bytes; IEEE 754 binary16 is left to numpy.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from onnxpress.arrays import Array
from onnxpress.errors import CorruptFileError, UnsupportedModelError

_EXPONENTS: dict[Any, int] = {
    np.dtype(np.float16): 0x7C00,
    np.dtype(ml_dtypes.bfloat16): 0x7F80,
    np.dtype(np.float32): 0x7F80_0000,
    np.dtype(np.float64): 0x7FF0_0000_0000_0000,
}
"""All bits of the exponent, which only infinities and NaNs have set."""
BLOCK = 256
"""Rows of a matrix that are transposed together: their part of a column fits into a page and into the caches."""


def is_finite(values: Array) -> bool:
    """Whether no element is NaN or infinite; integers always are finite.

    In order of their bits, all that is not finite lies above what is: positive among signed integers, negative among
    unsigned ones. So two maxima tell, at the speed of memory and without a temporary array.
    """
    exponent = _EXPONENTS.get(values.dtype)
    if exponent is None:
        return bool(np.isfinite(values.astype(np.float32)).all()) if values.dtype.kind in "fV" else True
    if values.size == 0:
        return True
    bits = 8 * values.dtype.itemsize
    positive = int(values.view(f"i{bits // 8}").max()) < exponent
    return positive and int(values.view(f"u{bits // 8}").max()) < exponent | 1 << bits - 1


def require_finite_weight(values: Array, name: str | None) -> Array:
    """`values`, unless there is NaN or infinity among them: then CorruptFileError, naming the weight."""
    if not is_finite(values):
        wide = values.astype(np.float32) if values.dtype.kind == "V" else values
        bad = int(values.size - np.count_nonzero(np.isfinite(wide)))
        raise CorruptFileError(
            f"weight {name} holds NaN or infinity ({bad} of {values.size} values read)",
            hint="the checkpoint is damaged or its training diverged; a graph made from it would answer NaN",
        )
    return values


def widen(values: Array) -> NDArray[np.float32]:
    """Floats of any format as float32, in C order; `values` may be a transposed view, which is copied in blocks.

    Exact but for float64, which is rounded.
    """
    if values.dtype == ml_dtypes.bfloat16:
        halves = np.zeros((*values.shape, 2), "<u2")
        copy_blocks(halves[..., 1], values.view("<u2"))
        return halves.view("<f4").reshape(values.shape)
    if not values.flags.c_contiguous:
        copy = np.empty(values.shape, f"u{values.dtype.itemsize}")
        copy_blocks(copy, values.view(copy.dtype))
        values = copy.view(values.dtype)
    return values.astype(np.float32, copy=False)


def copy_blocks(target: Array, source: Array) -> None:
    """`target[...] = source`, a block of columns at a time where `source` is a transposed view."""
    if source.ndim != 2 or source.strides[0] >= source.strides[1]:
        target[...] = source
        return
    for start in range(0, source.shape[1], BLOCK):
        target[:, start : start + BLOCK] = source[:, start : start + BLOCK]


def round_to_dtype(values: Array, dtype: Any, name: str | None) -> Array:
    """Floats rounded to a narrower format; what is too small becomes zero.

    Raises UnsupportedModelError, naming the weight, where a finite number would become infinite.
    """
    with np.errstate(over="ignore", under="ignore"):
        result = values.astype(np.float32, copy=False).astype(dtype)
    if not is_finite(result):
        overflow = np.isinf(result.astype(np.float32)) & np.isfinite(values.astype(np.float64))
        if overflow.any():
            worst = float(np.abs(values[overflow].astype(np.float64)).max())
            raise UnsupportedModelError(
                f"Weight {name!r} does not fit into {np.dtype(dtype)}: {worst:g} is beyond its largest number.",
                hint="leave it in float32, or choose another format",
            )
    return result

"""Rotations that spread outliers over channels, so that one step size suits all of them (QuaRot, Ashkboos et al. 2024).

    x · W = (x H) · (Hᵀ W),   H orthogonal

With H a Hadamard matrix of size n, a channel of magnitude a becomes n channels of a / √n: what sets the range of a row
shrinks, what has to be told apart in it does not.
"""

from __future__ import annotations

import numpy as np

from onnxpress.arrays import Floats


def hadamard(size: int) -> Floats:
    """[size, size], orthogonal and symmetric, Sylvester's order; ValueError unless `size` is a power of two."""
    if size < 1 or size & (size - 1):
        raise ValueError(f"the size of a rotation must be a power of two, not {size}")
    matrix = np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return np.asarray(matrix / np.sqrt(size), dtype=np.float32)


def rotate_channels(values: Floats, rotation: Floats) -> Floats:
    """Rotate each run of neighbouring channels along the last axis, whose length the rotation's size divides."""
    return np.asarray((values.reshape(-1, len(rotation)) @ rotation).reshape(values.shape), dtype=np.float32)

"""Names of array types in signatures, defined once. Shapes stand in the docstrings of what takes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = NDArray[Any]
Floats: TypeAlias = NDArray[np.float32]
"""Weights, activations, logits."""
Doubles: TypeAlias = NDArray[np.float64]
"""What is summed up, decomposed or solved."""
AnyFloats: TypeAlias = NDArray[np.floating]
"""Either of the two, where a function takes both."""
Ids: TypeAlias = NDArray[np.int64]
"""Token ids, masks and positions, as graphs take them."""
Indices: TypeAlias = NDArray[np.int64]
"""Places in an array: rows, channels, heads."""
Integers: TypeAlias = NDArray[np.int64]
"""Whole numbers to compute with."""
Codes: TypeAlias = NDArray[np.uint8]
"""Quantized values, one a byte."""
Booleans: TypeAlias = NDArray[np.bool_]
"""Masks of weights: what is kept."""
Feeds: TypeAlias = Mapping[str, Array]
"""Inputs of a graph by name."""
Arrays: TypeAlias = Mapping[str, Array]
"""Arrays by name: what is fitted for a weight, what a run computes."""

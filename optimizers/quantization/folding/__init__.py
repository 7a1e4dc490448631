"""Places where a scale for each channel can be folded into the weights before and behind it.

Imports `graph`.
"""

from __future__ import annotations

from onnxpress.optimizers.quantization.folding.site import FREE, FoldingSite, Kind
from onnxpress.optimizers.quantization.folding.tracer import find_folding_sites

__all__ = ["FREE", "FoldingSite", "Kind", "find_folding_sites"]

"""Channels that can be rescaled for nothing, see `tracer`: what SmoothQuant, AWQ and equalization work on."""

from __future__ import annotations

from onnxpress.optimizers.quantization.folding.site import FREE, FoldingSite, Kind, read_weight
from onnxpress.optimizers.quantization.folding.tracer import find_sites

__all__ = ["FREE", "FoldingSite", "Kind", "find_sites", "read_weight"]

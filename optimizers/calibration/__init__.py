"""Calibration: what activations look like, found one transformer block at a time in bounded memory."""

from __future__ import annotations

from onnxpress.optimizers.calibration.calibrated_pass import NO_SAMPLES, CalibratedPass, Calibration
from onnxpress.optimizers.calibration.samples import Feeds, check_samples, token_count
from onnxpress.optimizers.calibration.walk import Accumulator, Step, Walk

__all__ = [
    "NO_SAMPLES",
    "Accumulator",
    "CalibratedPass",
    "Calibration",
    "Feeds",
    "Step",
    "Walk",
    "check_samples",
    "token_count",
]

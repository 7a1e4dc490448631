"""Passes that look at activations, and what the driver gives them for it."""

from __future__ import annotations

from typing import ClassVar

import onnx_ir as ir

from onnxpress.calibration.calibration import Calibration
from onnxpress.optimizers.base import Pass


class CalibratedPass(Pass):
    """A pass that looks at activations; the driver sets `calibration` before it runs it on a graph, and `reference`
    where the pass says `needs_reference`."""

    calibration: Calibration = Calibration()
    needs_reference: ClassVar[bool] = False
    reference: ir.Model | None = None
    """The same graph before any pass: what quality is measured against. Its weights are lazy; it must not be edited."""
    wanted_rows: ClassVar[int] = 4
    wanted_length: ClassVar[int] = 64
    """Rows, and tokens in each, that do for this pass where the user does not say how many to take."""

    @property
    def needs_samples(self) -> bool:
        """Whether this pass, with its options, looks at activations at all."""
        return True

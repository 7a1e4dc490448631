"""Codes of weights in blocks, fitted to what the products read: the calibrated methods of quantize-blocks.

Products that read one activation are fitted together and put in place before the next activation is looked at, so that
each product makes up for what the ones before it lost, within its layer and across layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import numpy as np

from onnxpress.arrays import Arrays, Doubles, Floats
from onnxpress.calibration.walk import WalkStep
from onnxpress.graph.linear import Linear, read_rows
from onnxpress.optimizers.fitting.blockwise import ERROR, second_moments
from onnxpress.optimizers.quantization.maths.block_format import BlockFormat, QuantizedBlocks
from onnxpress.optimizers.quantization.maths.gptq import gptq, relative_error
from onnxpress.optimizers.quantization.maths.least_squares import fit_least_squares

CalibratedMethod = Literal["gptq", "importance"]
CALIBRATED: tuple[CalibratedMethod, ...] = get_args(CalibratedMethod)
OPERAND = "operand"
"""Begins the names of a result's parts that are MatMulNBits' constants, in their order."""


def fit_blocks(
    step: WalkStep, linears: Sequence[Linear], *, formats: Mapping[str, BlockFormat], method: CalibratedMethod
) -> dict[str, Arrays]:
    """Compute operands and relative errors of products that read one activation, by weight.

    Args:
        formats: by weight.
    """
    moments = second_moments(step, linears)
    results: dict[str, Arrays] = {}
    for linear in linears:
        blocks, error = _blocks(read_rows(linear).T, moments, formats[linear.name], method)
        operands = {f"{OPERAND}{index}": operand for index, operand in enumerate(blocks.matmul_nbits())}
        results[linear.name] = {**operands, ERROR: np.array([error])}
    return results


def _blocks(
    weight: Floats, moments: Doubles, format: BlockFormat, method: CalibratedMethod
) -> tuple[QuantizedBlocks, float]:
    """Codes and the relative error of the product."""
    if method == "gptq":
        found = gptq(weight, moments, format)
        return found.blocks, found.error
    blocks = fit_least_squares(weight, format, np.diagonal(moments).astype(np.float32))
    return blocks, relative_error(weight, blocks.dequantize(), moments)

"""Codes of weights in blocks, fitted to what the products read: the calibrated methods of quantize-blocks.

A block of the transformer at a time, its products in the order in which they run: those that read one activation are
fitted together, put in place, and only then is the next activation looked at. So each product makes up for what the
ones before it lost, within its layer and across layers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from onnxpress.calibration.calibration import Calibration
from onnxpress.calibration.samples import token_count
from onnxpress.calibration.walk import Step
from onnxpress.errors import BadInputError
from onnxpress.graph.linear import Linear, find_linears, read_rows
from onnxpress.graph.report import Report
from onnxpress.optimizers.fitting.statistics import Gram
from onnxpress.optimizers.quantization.maths.block_format import BlockFormat, Blocks
from onnxpress.optimizers.quantization.maths.gptq import gptq, relative_error
from onnxpress.optimizers.quantization.maths.least_squares import fit_least_squares

CalibratedMethod = Literal["gptq", "importance"]
CALIBRATED: tuple[CalibratedMethod, ...] = get_args(CalibratedMethod)
FEWEST_TOKENS = 256
"""Fewer say next to nothing about the correlations of hundreds of channels."""

Operands = Sequence[ir.TensorProtocol]


class Fitted(NamedTuple):
    """What was found for a weight."""

    digest: bytes
    """Of the float weight."""
    operands: Operands


def fit_blocks(
    model: ir.Model,
    formats: Mapping[str, BlockFormat],
    method: CalibratedMethod,
    calibration: Calibration,
    report: Report,
    known: dict[str, Fitted],
) -> Iterator[tuple[Linear, Operands]]:
    """Yield every product whose weight `formats` names, with its operands; the caller puts them into the graph at once.

    Args:
        known: what was fitted already, by weight, and is added to: a weight that serves several products, or several
            graphs, as those of an encoder-decoder's two decoders do, is fitted once and stays the same in all.

    Raises:
        BadInputError: too few tokens, or an activation that is not finite.
    """
    tokens = token_count(calibration.samples)
    if 0 < tokens < FEWEST_TOKENS:
        raise BadInputError(
            f"{method} has {tokens} tokens to calibrate with; it needs at least {FEWEST_TOKENS}",
            hint="give a longer text with --calibration, or choose method = least-squares, which needs none",
        )
    name = f"quantize-blocks {method} {sorted((key, repr(value)) for key, value in formats.items())}"
    for step in calibration.walk(model, method=name, by_product=True):
        for number, linears in enumerate(_stages(step, formats)):
            digests = {linear.name: _digest(linear) for linear in linears}
            fresh = [one for one in linears if one.name not in known or known[one.name].digest != digests[one.name]]
            found = step.results(str(number), partial(_solve, step, fresh, formats, method))
            for linear in fresh:
                keys = sorted(key for key in found if key.startswith(f"{linear.name}#operand"))
                known[linear.name] = Fitted(digests[linear.name], [found[key] for key in keys])
                report.measure(linear.name, float(found[f"{linear.name}#error"].numpy()[0]))
            for linear in linears:
                yield linear, known[linear.name].operands


def _digest(linear: Linear) -> bytes:
    return hashlib.blake2b(np.ascontiguousarray(read_rows(linear)).view(np.uint8).data, digest_size=16).digest()


def _stages(step: Step, formats: Mapping[str, BlockFormat]) -> list[list[Linear]]:
    """Products of one segment that read the same activation, in the order in which they run."""
    stages: dict[ir.Value, list[Linear]] = {}
    for linear in find_linears(step.segment.nodes):
        if linear.name in formats:
            stages.setdefault(linear.activation, []).append(linear)
    return list(stages.values())


def _solve(
    step: Step, linears: Sequence[Linear], formats: Mapping[str, BlockFormat], method: CalibratedMethod
) -> dict[str, NDArray[Any]]:
    """Operands and relative errors of products that read one activation, by `weight#operand0`, `weight#error`."""
    if not linears:
        return {}
    activation, features = str(linears[0].activation.name), linears[0].shape[0]
    gram = Gram(features, activation)
    step.observe({activation: [gram]})
    moments = gram.matrix()
    arrays: dict[str, NDArray[Any]] = {}
    for linear in linears:
        weight, format = read_rows(linear).T, formats[linear.name]
        blocks, error = _blocks(weight, moments, format, method)
        for index, operand in enumerate(blocks.matmul_nbits()):
            arrays[f"{linear.name}#operand{index}"] = operand
        arrays[f"{linear.name}#error"] = np.array([error])
    return arrays


def _blocks(
    weight: NDArray[np.float32], moments: NDArray[np.float64], format: BlockFormat, method: CalibratedMethod
) -> tuple[Blocks, float]:
    """Codes and the relative error of the product."""
    if method == "gptq":
        found = gptq(weight, moments, format)
        return found.blocks, found.error
    blocks = fit_least_squares(weight, format, np.diagonal(moments).astype(np.float32))
    return blocks, relative_error(weight, blocks.dequantize(), moments)

"""Apply passes to a graph and save it beside copies of the source's configs: SOURCE TARGET ROWS LENGTH PASSES [TEXT].

PASSES is JSON, a list of names with options; TEXT is what to calibrate on. ROWS and LENGTH 0: as many samples as each
pass wants. The pass called `perturb` moves every weight by up to half a step of a 4-bit grid (blocks of 32): what was
once 4-bit lies on no grid any more. `round` (bits, include) puts weights on the grid of quantize-blocks in blocks of 32
and leaves them float32, so that what is done to codes afterwards can be studied.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxpress.calibration.calibration import Calibration
from onnxpress.calibration.data import CalibrationData
from onnxpress.graph.io import load_graph, save_graph
from onnxpress.graph.linear import find_linears, read_rows, selected
from onnxpress.optimizers.base import Context
from onnxpress.optimizers.quantization.maths.block_format import BlockFormat
from onnxpress.optimizers.quantization.maths.least_squares import fit_least_squares
from onnxpress.optimizers.recipe import PassSpec


def perturb(model: ir.Model) -> None:
    generator = np.random.default_rng(0)
    for value in dict.fromkeys(linear.weight for linear in find_linears(model.graph)):
        assert value.const_value is not None
        weight = np.array(value.const_value.numpy(), np.float32)
        blocks = weight.reshape(-1, 32)
        steps = np.ptp(blocks, axis=1, keepdims=True) / 15
        blocks += steps * generator.uniform(-0.5, 0.5, blocks.shape).astype(np.float32)
        value.const_value = ir.tensor(weight, name=value.name)


def round_to_blocks(model: ir.Model, bits: int, include: Sequence[str]) -> None:
    for linear in find_linears(model.graph):
        if selected(linear.name, include, ()):
            weight = fit_least_squares(read_rows(linear).T, BlockFormat(bits, 32)).dequantize()
            stored = np.ascontiguousarray(weight.T if linear.transposed else weight)
            linear.weight.const_value = ir.tensor(stored, name=linear.weight.name)


def main() -> None:
    source, target, rows, length = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    graph = next(source.rglob("model.onnx"))
    model = load_graph(graph)
    text = sys.argv[6] if len(sys.argv) > 6 else None
    samples: dict[tuple[int, int], Any] = {}
    began = time.process_time()
    for name, options in json.loads(sys.argv[5]):
        if name == "perturb":
            perturb(model)
            continue
        if name == "round":
            round_to_blocks(model, **options)
            continue
        one = PassSpec(name, options).build()
        context = Context()
        if one.needs_samples:
            size = (rows or one.wanted_rows, length or one.wanted_length)
            samples[size] = samples.get(size) or CalibrationData(text).feeds(graph, *size)[""]
            context = Context(Calibration(samples[size]), load_graph(graph))
        one.run(model, context)
    seconds = time.process_time() - began
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for path in source.glob("*.json"):
        shutil.copy(path, target)
    (target / "onnx").mkdir()
    save_graph(model, target / "onnx" / "model.onnx", external_data="model.onnx_data")
    print(json.dumps({"cpu_s": seconds}))


if __name__ == "__main__":
    main()

"""onnxruntime's own quantizers on a float32 graph. usage: onnxruntime_quantize.py GRAPH FOLDER METHOD CALIBRATION

METHOD: a key of METHODS. CALIBRATION: a JSON file with lists of token ids, for the methods that look at activations.
Writes FOLDER/model.onnx and FOLDER/model.onnx_data. Runs in onnxpress's environment.

The tools take MatMul and Gather, so a head that reads the embedding transposed gets a weight of its own first.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_dynamic, quantize_static
from onnxruntime.quantization import matmul_nbits_quantizer as blocks

Feeds = dict[str, NDArray[Any]]
FLOAT = {"DefaultTensorType": onnx.TensorProto.FLOAT}  # the tools infer no types through contrib operators
BLOCK = 32


def untie_head(model: onnx.ModelProto) -> None:
    """FusedMatMul(x, W, transB) becomes MatMul(x, Wᵀ)."""
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "FusedMatMul" and node.input[1] in weights:
            name = f"{node.input[1]}.transposed"
            weight = numpy_helper.to_array(weights[node.input[1]])
            model.graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(weight.T), name))
            head = onnx.helper.make_node("MatMul", [node.input[0], name], list(node.output), node.name)
            node.CopyFrom(head)


class Reader(CalibrationDataReader):
    """Token ids as inputs of a graph; a decoder starts with an empty cache."""

    def __init__(self, model: onnx.ModelProto, samples: list[list[int]]) -> None:
        self.inputs = {value.name: value.type.tensor_type for value in model.graph.input}
        self.samples = samples
        self.rewind()

    def rewind(self) -> None:
        self.feeds = map(self._feed, self.samples)

    def get_next(self) -> Feeds | None:
        return next(self.feeds, None)

    def __iter__(self) -> Iterator[Feeds]:
        return map(self._feed, self.samples)

    def _feed(self, ids: list[int]) -> Feeds:
        values: Feeds = {
            "input_ids": np.array([ids]),
            "attention_mask": np.ones((1, len(ids)), np.int64),
            "position_ids": np.arange(len(ids))[None],
            "token_type_ids": np.zeros((1, len(ids)), np.int64),
        }
        for name, kind in self.inputs.items():
            if name.startswith("past_key_values."):
                heads, width = (kind.shape.dim[axis].dim_value for axis in (1, 3))
                values[name] = np.zeros((1, heads, 0, width), np.float32)
        return {name: values[name] for name in self.inputs}


def dynamic(model: onnx.ModelProto, samples: list[list[int]], weights: QuantType) -> onnx.ModelProto:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        quantize_dynamic(model, path, weight_type=weights, per_channel=True, extra_options=FLOAT)
        return onnx.load(path)


def static(model: onnx.ModelProto, samples: list[list[int]]) -> onnx.ModelProto:
    """QDQ around every MatMul and Gather: bytes of either sign as the tool recommends for x86, ranges by min-max."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        quantize_static(
            model,
            path,
            Reader(model, samples),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=["MatMul", "Gather"],
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            extra_options=FLOAT,
        )
        return onnx.load(path)


def nbits(
    model: onnx.ModelProto,
    samples: list[list[int]],
    bits: int = 4,
    symmetric: bool = False,
    algorithm: Callable[[list[list[int]], onnx.ModelProto], Any] | None = None,
) -> onnx.ModelProto:
    """MatMulNBits for products; the embedding in blocks of as many bits, which the default algorithm alone can do."""

    def run(types: tuple[str, ...], config: Any) -> None:
        tool = blocks.MatMulNBitsQuantizer(
            model, bits, BLOCK, symmetric, accuracy_level=4, op_types_to_quantize=types, algo_config=config
        )
        tool.process()
        model.CopyFrom(tool.model.model)

    if algorithm is None:
        run(("MatMul", "Gather"), None)
    else:
        run(("MatMul",), algorithm(samples, model))
        run(("Gather",), None)
    return model


def hqq(samples: list[list[int]], model: onnx.ModelProto) -> Any:
    return blocks.HQQWeightOnlyQuantConfig(BLOCK, 4)


def k_quant(samples: list[list[int]], model: onnx.ModelProto) -> Any:
    return blocks.KQuantWeightOnlyQuantConfig()


def gptq(samples: list[list[int]], model: onnx.ModelProto) -> Any:
    return blocks.GPTQWeightOnlyQuantConfig(Reader(model, samples))


METHODS: dict[str, Callable[[onnx.ModelProto, list[list[int]]], onnx.ModelProto]] = {
    "dynamic-u8": partial(dynamic, weights=QuantType.QUInt8),
    "dynamic-s8": partial(dynamic, weights=QuantType.QInt8),
    "static": static,
    "nbits-8": partial(nbits, bits=8),
    "nbits-4-symmetric": partial(nbits, symmetric=True),
    "nbits-4": nbits,
    "hqq": partial(nbits, algorithm=hqq),
    "k-quant": partial(nbits, algorithm=k_quant),
    "gptq": partial(nbits, algorithm=gptq),
}


def main() -> None:
    graph, folder, method, calibration = sys.argv[1:]
    model = onnx.load(graph)
    untie_head(model)
    model = METHODS[method](model, json.loads(Path(calibration).read_text(encoding="utf-8")))
    Path(folder).mkdir(parents=True, exist_ok=True)
    onnx.save(
        model,
        str(Path(folder) / "model.onnx"),
        save_as_external_data=True,
        location="model.onnx_data",
        size_threshold=1024,
    )


if __name__ == "__main__":
    main()

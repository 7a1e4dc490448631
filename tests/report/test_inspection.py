"""Inspection against counts made by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from onnxpress.optimizers.quantization.quantize_blocks import QuantizeBlocks
from onnxpress.report.inspection import WeightSize, inspect_graph

TEXT = """<ir_version: 10, opset_import: ["": 21, "com.microsoft": 1]>
g (int64[batch_size, sequence_length] input_ids, float[batch_size, 2, past_sequence_length, 8] past_key_values__0__key,
   float[batch_size, 2, past_sequence_length, 8] past_key_values__0__value,
   float[100, 64] model__embed_tokens__weight, float[64, 32] model__layers__0__q__weight,
   uint8[32, 1, 16] model__layers__0__up__weight, float[32] model__layers__0__up__scales,
   uint8[16, 16] model__layers__1__down__weight, uint8 zero, float[16] model__norm__weight)
=> (float[batch_size, sequence_length, 16] y)
<float[batch_size, sequence_length, 64] e, float[batch_size, sequence_length, 32] q> {
    e = Gather(model__embed_tokens__weight, input_ids)
    q = MatMul(e, model__layers__0__q__weight)
    u = com.microsoft.MatMulNBits<K=32, N=32, bits=4, block_size=32>(
        q, model__layers__0__up__weight, model__layers__0__up__scales)
    c, s, p = DynamicQuantizeLinear(u)
    d = MatMulInteger(c, model__layers__1__down__weight, p, zero)
    f = Cast<to=1>(d)
    y = Mul(f, model__norm__weight)
}"""


@pytest.fixture
def model() -> ir.Model:
    made = ir.from_onnx_text(TEXT)
    for value in list(made.graph.inputs):
        name = value.name.replace("__", ".")
        if name.startswith(("model.", "zero")):
            made.graph.inputs.remove(value)
            shape = tuple(value.shape)
            value.const_value = ir.LazyTensor(lambda: pytest.fail("computed"), value.dtype, ir.Shape(shape))
            value.name = name
            made.graph.register_initializer(value)
        value.name = name
    return made


def test_counts(model: ir.Model) -> None:
    found = inspect_graph(model)
    assert found.formats == {
        "fp32": WeightSize(100 * 64 + 64 * 32 + 16, 4 * (100 * 64 + 64 * 32 + 16)),
        "4-bit blocks of 32": WeightSize(32 * 32, 32 * 16 + 32 * 4),
        "int8 dynamic": WeightSize(256, 256 + 1),
    }
    assert found.total.bytes == sum(share.bytes for share in found.formats.values())
    assert [layer.name for layer in found.layers] == ["embedding", "layer 0", "layer 1", "other"]
    assert found.layers[1].formats["4-bit blocks of 32"].parameters == 1024
    assert found.operators["com.microsoft.MatMulNBits"] == 1
    assert found.inputs[0].shape == ("batch_size", "sequence_length")
    assert found.opsets == {"": 21, "com.microsoft": 1}


def test_memory(model: ir.Model) -> None:
    found = inspect_graph(model)
    assert found.kv_cache_bytes_per_token == 2 * 2 * 8 * 4
    memory = found.memory(context_length=100)
    assert memory.kv_cache == 100 * 128
    assert memory.activations == 100 * (64 + 32) * 4
    assert memory.total == memory.weights + memory.kv_cache + memory.activations


def test_tied_embeddings_count_once() -> None:
    text = """<ir_version: 10, opset_import: ["": 21]>
    g (int64[B, S] ids, float[100, 64] w) => (float[B, S, 100] y) {
        e = Gather(w, ids)
        t = Transpose(w)
        y = MatMul(e, t)
    }"""
    model = ir.from_onnx_text(text)
    value = model.graph.inputs.pop()
    value.const_value = ir.tensor(np.zeros((100, 64), np.float32))
    model.graph.register_initializer(value)
    (layer,) = inspect_graph(model).layers
    assert (layer.name, layer.total) == ("embedding and head", WeightSize(6400, 25600))


@pytest.mark.parametrize(("bits", "zero_points"), [(6, "none"), (4, "float"), (3, "float")])
def test_blocks_of_any_width_are_their_parameters(bits: int, zero_points: Any) -> None:
    """Codes in planes, scales and minima in units: each parameter is counted once, every byte somewhere."""
    text = """<ir_version: 10, opset_import: ["": 21]>
    g (float[B, 512] x, float[512, 48] w) => (float[B, 48] y) { y = MatMul(x, w) }"""
    model = ir.from_onnx_text(text)
    value = model.graph.inputs.pop()
    value.const_value = ir.tensor(np.random.default_rng(0).standard_normal((512, 48)).astype(np.float32))
    model.graph.register_initializer(value)
    QuantizeBlocks(bits, 32, zero_points, scale_type="int8", unit_size=256)(model)
    formats = inspect_graph(model).formats
    assert formats[f"{bits}-bit blocks of 32"].parameters == sum(one.parameters for one in formats.values()) == 512 * 48
    assert formats[f"{bits}-bit blocks of 32"].bytes >= 512 * 48 * bits // 8 + 48 * 16 + 48 * 2 * 2
    if zero_points == "float":
        assert formats["block offsets"].bytes == 48 * 16 + 48 * 2 * 2

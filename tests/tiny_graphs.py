"""Tiny random graphs: a llama-like decoder in two spellings that must agree, an encoder, an encoder-decoder."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper

VOCABULARY, WIDTH, HEADS, KV_HEADS, HEAD_DIM, LAYERS, POSITIONS = 64, 32, 4, 2, 8, 2, 256


def weights(seed: int = 0) -> dict[str, NDArray[np.float32]]:
    """Initializers of the decoder; the encoder uses some of them."""
    generator = np.random.default_rng(seed)

    def random(*shape: int, scale: float = 0.12) -> NDArray[np.float32]:
        return (generator.standard_normal(shape) * scale).astype(np.float32)

    result = {"embed": random(VOCABULARY, WIDTH, scale=1.0), "places": random(POSITIONS, WIDTH, scale=1.0)}
    for i in range(LAYERS):
        result |= {
            f"q{i}": random(WIDTH, HEADS * HEAD_DIM),
            f"k{i}": random(WIDTH, KV_HEADS * HEAD_DIM),
            f"v{i}": random(WIDTH, KV_HEADS * HEAD_DIM),
            f"o{i}": random(HEADS * HEAD_DIM, WIDTH),
            f"up{i}": random(WIDTH, 2 * WIDTH),
            f"down{i}": random(2 * WIDTH, WIDTH),
        }
    return result | {"head": random(WIDTH, VOCABULARY)}


PRELUDE = """
    one = Constant<value = int64 {1}>()
    zero = Constant<value = int64 {0}>()
    first_axis = Constant<value = int64[1] {1}>()
    unit = Constant<value = float {1.0}>()
    low = Constant<value = float {-10000.0}>()
    total = Shape<start = 1, end = 2>(attention_mask)
    length = Shape<start = 1, end = 2>(input_ids)
    start = Sub(total, length)
    counted = CumSum(attention_mask, one)
    minus = Sub(counted, one)
    clipped = Max(minus, zero)
    positions = Slice(clipped, start, total, first_axis)
    word = Gather(embed, input_ids)
    place = Gather(places, positions)
    h0 = Add(word, place)
    real = Cast<to = 1>(attention_mask)
    unreal = Sub(unit, real)
    penalty = Mul(unreal, low)
    middle = Constant<value = int64[2] {1, 2}>()
    penalty4 = Unsqueeze(penalty, middle)
"""

GQA = """
    a{i}, present_{i}_key, present_{i}_value = com.microsoft.GroupQueryAttention<num_heads = 4, kv_num_heads = 2>
        (qx{i}, kx{i}, vx{i}, past_{i}_key, past_{i}_value, seqlens, total32, none, none, none, bias)
"""

DENSE = """
    qs{i} = Reshape(qx{i}, query_shape)
    ks{i} = Reshape(kx{i}, key_shape)
    vs{i} = Reshape(vx{i}, key_shape)
    qt{i} = Transpose<perm = [0, 2, 1, 3]>(qs{i})
    kt{i} = Transpose<perm = [0, 2, 1, 3]>(ks{i})
    vt{i} = Transpose<perm = [0, 2, 1, 3]>(vs{i})
    present_{i}_key = Concat<axis = 2>(past_{i}_key, kt{i})
    present_{i}_value = Concat<axis = 2>(past_{i}_value, vt{i})
    kr{i} = Reshape(present_{i}_key, split_shape)
    vr{i} = Reshape(present_{i}_value, split_shape)
    qg{i} = Reshape(qt{i}, group_shape)
    kk{i} = Transpose<perm = [0, 1, 2, 4, 3]>(kr{i})
    dots{i} = MatMul(qg{i}, kk{i})
    scaled{i} = Mul(dots{i}, scale)
    masked{i} = Add(scaled{i}, bias5)
    p{i} = Softmax(masked{i})
    mixed{i} = MatMul(p{i}, vr{i})
    heads{i} = Reshape(mixed{i}, heads_shape)
    back{i} = Transpose<perm = [0, 2, 1, 3]>(heads{i})
    a{i} = Reshape(back{i}, flat_shape)
"""


def decoder_text(*, gqa: bool = True, last: bool = False) -> str:
    """ONNX text of the decoder; `gqa` False spells attention out with primitive operators."""
    pairs = [f"{i}_{x}" for i in range(LAYERS) for x in ("key", "value")]
    kv = [f"float[batch_size, 2, past_sequence_length, 8] past_{pair}" for pair in pairs]
    present = [f"float[batch_size, 2, total_sequence_length, 8] present_{pair}" for pair in pairs]
    body = PRELUDE
    if gqa:
        body += """
    one1 = Constant<value = int64[1] {1}>()
    batch = Shape<start = 0, end = 1>(input_ids)
    bias_shape = Concat<axis = 0>(batch, one1, length, total)
    bias = Expand(penalty4, bias_shape)
    last_index = Sub(total, one)
    last32 = Cast<to = 6>(last_index)
    seqlens = Expand(last32, batch)
    total_scalar = Squeeze(total)
    total32 = Cast<to = 6>(total_scalar)
"""
    else:
        body += """
    query_shape = Constant<value = int64[4] {0, 0, 4, 8}>()
    key_shape = Constant<value = int64[4] {0, 0, 2, 8}>()
    split_shape = Constant<value = int64[5] {0, 2, 1, -1, 8}>()
    group_shape = Constant<value = int64[5] {0, 2, 2, -1, 8}>()
    heads_shape = Constant<value = int64[4] {0, 4, -1, 8}>()
    flat_shape = Constant<value = int64[3] {0, 0, 32}>()
    scale = Constant<value = float {0.35355338}>()
    total_scalar = Squeeze(total)
    start_scalar = Squeeze(start)
    columns = Range(zero, total_scalar, one)
    rows = Range(start_scalar, total_scalar, one)
    column_axis = Unsqueeze(columns, zero)
    row_axis = Unsqueeze(rows, first_axis)
    future = Greater(column_axis, row_axis)
    future_float = Cast<to = 1>(future)
    infinite = Constant<value = float {-1000000.0}>()
    causal = Mul(future_float, infinite)
    bias4 = Add(penalty4, causal)
    bias5 = Unsqueeze(bias4, first_axis)
"""
    for i in range(LAYERS):
        n = i + 1
        body += f"""
    qx{i} = MatMul(h{i}, q{i})
    kx{i} = MatMul(h{i}, k{i})
    vx{i} = MatMul(h{i}, v{i})
{(GQA if gqa else DENSE).replace("{i}", str(i))}
    ox{i} = MatMul(a{i}, o{i})
    r{i} = Add(h{i}, ox{i})
    u{i} = MatMul(r{i}, up{i})
    t{i} = Tanh(u{i})
    d{i} = MatMul(t{i}, down{i})
    h{n} = Add(r{i}, d{i})
"""
    if last:
        body += """
    minus1 = Constant<value = int64[1] {-1}>()
    far = Constant<value = int64[1] {9223372036854775807}>()
    final = Slice(hN, minus1, far, first_axis)
    logits = MatMul(final, head)
""".replace("hN", f"h{LAYERS}")
    else:
        body += f"\n    logits = MatMul(h{LAYERS}, head)\n"
    mask = "int64[batch_size, total_sequence_length] attention_mask"
    inputs = ["int64[batch_size, sequence_length] input_ids", mask, *kv]
    outputs = [f"float[batch_size, {1 if last else 'sequence_length'}, 64] logits", *present]
    return f"""<ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1]>
decoder ({", ".join(inputs)}) => ({", ".join(outputs)}) {{
{body}
}}"""


def _real_name(name: str) -> str:
    """Undo what the text format cannot say: dots in names, and inputs left out."""
    name = re.sub(r"^past_(\d+)_", r"past_key_values.\1.", name)
    return "" if name == "none" else re.sub(r"^present_(\d+)_", r"present.\1.", name)


def save(text: str, path: Path, values: dict[str, NDArray[np.float32]]) -> Path:
    """Parse `text`, add those of `values` that it uses as initializers, check and save."""
    model = onnx.parser.parse_model(text)
    for node in model.graph.node:
        node.input[:] = [_real_name(name) for name in node.input]
        node.output[:] = [_real_name(name) for name in node.output]
    for value in (*model.graph.input, *model.graph.output):
        value.name = _real_name(value.name)
    used = {name for node in model.graph.node for name in node.input}
    model.graph.initializer.extend(numpy_helper.from_array(v, k) for k, v in values.items() if k in used)
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, path)
    return path


@pytest.fixture
def make_decoder(tmp_path: Path) -> Callable[..., Path]:
    """`make_decoder(gqa=..., last=..., noise=..., seed=...)` saves a decoder; `noise` perturbs its weights."""
    count = iter(range(1000))

    def make(*, gqa: bool = True, last: bool = False, noise: float = 0.0, seed: int = 0) -> Path:
        values, generator = weights(seed), np.random.default_rng(1)
        for value in values.values():
            value += (noise * generator.standard_normal(value.shape)).astype(np.float32)
        return save(decoder_text(gqa=gqa, last=last), tmp_path / f"decoder{next(count)}" / "model.onnx", values)

    return make


ENCODER = """<ir_version: 10, opset_import: ["" : 21]>
encoder (int64[batch_size, sequence_length] input_ids, int64[batch_size, sequence_length] attention_mask,
         int64[batch_size, sequence_length] token_type_ids)
    => (float[batch_size, sequence_length, 32] last_hidden_state) {
    unit = Constant<value = float {1.0}>()
    low = Constant<value = float {-10000.0}>()
    real = Cast<to = 1>(attention_mask)
    unreal = Sub(unit, real)
    penalty = Mul(unreal, low)
    middle = Constant<value = int64[1] {1}>()
    bias = Unsqueeze(penalty, middle)
    word = Gather(embed, input_ids)
    kind = Gather(places, token_type_ids)
    h = Add(word, kind)
    q = MatMul(h, q0)
    k = Transpose<perm = [0, 2, 1]>(h)
    dots = MatMul(q, k)
    masked = Add(dots, bias)
    p = Softmax(masked)
    mixed = MatMul(p, h)
    last_hidden_state = Add(h, mixed)
}"""


@pytest.fixture
def make_encoder(tmp_path: Path) -> Callable[..., Path]:
    """`make_encoder(noise=..., blind=...)`; `blind` ignores the mask, as a broken export would."""
    count = iter(range(1000))

    def make(*, noise: float = 0.0, blind: bool = False) -> Path:
        values, generator = weights(), np.random.default_rng(1)
        for value in values.values():
            value += (noise * generator.standard_normal(value.shape)).astype(np.float32)
        text = ENCODER.replace("-10000.0", "0.0") if blind else ENCODER
        return save(text, tmp_path / f"encoder{next(count)}" / "model.onnx", values)

    return make

"""Two decoders in one graph: each branch computes what its own graph does, and weights are there once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from onnxpress.errors import UnsupportedModelError
from onnxpress.graph.io import load_graph, save_graph, save_graphs
from onnxpress.graph.merged_decoder import merge_decoders, share_weights
from onnxpress.graph.tensors import FileTensor

WORDS, WIDTH = 40, 32
FIRST = """
<ir_version: 10, opset_import: ["" : 21]>
decoder (int64[batch_size, decoder_sequence_length] input_ids,
         float[batch_size, encoder_sequence_length, 32] encoder_hidden_states)
     => (float[batch_size, decoder_sequence_length, 40] logits,
         float[batch_size, 1, decoder_sequence_length, 32] "present.0.decoder.key",
         float[batch_size, 1, encoder_sequence_length, 32] "present.0.encoder.key")
{
    axis = Constant <value = int64[1] {1}> ()
    x = Gather (embedding, input_ids)
    keys = MatMul (encoder_hidden_states, cross)
    "present.0.decoder.key" = Unsqueeze (x, axis)
    "present.0.encoder.key" = Unsqueeze (keys, axis)
    mean = ReduceMean <keepdims = 1> (keys, axis)
    shifted = Add (x, mean)
    y = Mul (shifted, scale)
    logits = MatMul (y, head)
}
"""
LATER = """
<ir_version: 10, opset_import: ["" : 21]>
decoder (int64[batch_size, decoder_sequence_length] input_ids,
         float[batch_size, 1, past_decoder_sequence_length, 32] "past_key_values.0.decoder.key",
         float[batch_size, 1, encoder_sequence_length, 32] "past_key_values.0.encoder.key")
     => (float[batch_size, decoder_sequence_length, 40] logits,
         float[batch_size, 1, total, 32] "present.0.decoder.key")
{
    axis = Constant <value = int64[1] {1}> ()
    length = Constant <value = int64[1] {2}> ()
    x = Gather (embedding, input_ids)
    now = Unsqueeze (x, axis)
    "present.0.decoder.key" = Concat <axis = 2> ("past_key_values.0.decoder.key", now)
    own = ReduceSum <keepdims = 0> ("present.0.decoder.key", length)
    mean = ReduceMean <keepdims = 0> ("past_key_values.0.encoder.key", length)
    shift = Add (own, mean)
    shifted = Add (x, shift)
    y = Mul (shifted, scale)
    logits = MatMul (y, head)
}
"""
PASSED_ON = LATER.replace(
    '32] "present.0.decoder.key")\n', '32] "present.0.decoder.key", float[b, 1, s, 32] "present.0.encoder.key")\n'
).replace("    axis =", '    "present.0.encoder.key" = Identity ("past_key_values.0.encoder.key")\n    axis =', 1)

Weights = dict[str, np.ndarray[Any, Any]]


def random(*shape: int, seed: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


COMMON: Weights = {
    "embedding": random(WORDS, WIDTH, seed=0),
    "head": random(WIDTH, WORDS, seed=1),
    "scale": np.array(0.5, np.float32),
}
CROSS: Weights = {"cross": random(WIDTH, WIDTH, seed=2)}


def graph(text: str, weights: Weights) -> ir.Model:
    """A model whose undefined names are the weights."""
    model: ir.Model = ir.from_onnx_text(text, initializers=[ir.Tensor(w, name=name) for name, w in weights.items()])
    return model


def decoders(later: str = LATER, **changed: np.ndarray[Any, Any]) -> tuple[ir.Model, ir.Model]:
    return graph(FIRST, {**COMMON, **CROSS}), graph(later, {**COMMON, **changed})


def branch(model: ir.Model, name: str) -> ir.Graph:
    (node,) = model.graph
    return node.attributes[name].as_graph()


def run(model: ir.Model, path: Path, feeds: dict[str, Any]) -> dict[str, Any]:
    save_graph(model, path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    wanted = {node.name for node in session.get_inputs()}
    values = session.run(None, {name: value for name, value in feeds.items() if name in wanted})
    return dict(zip((node.name for node in session.get_outputs()), values, strict=True))


def feeds_of(past: int, encoder: int, cached: bool) -> dict[str, Any]:
    """Two rows; `past` tokens in the cache, `encoder` positions of the encoder in it."""
    return {
        "input_ids": np.array([[3, 5, 7], [4, 0, 39]])[:, : 1 if cached else 3],
        "encoder_hidden_states": random(2, 6, WIDTH, seed=3),
        "past_key_values.0.decoder.key": random(2, 1, past, WIDTH, seed=4),
        "past_key_values.0.encoder.key": random(2, 1, encoder, WIDTH, seed=5),
        "use_cache_branch": np.array([cached]),
    }


def test_each_branch_is_its_graph(tmp_path: Path) -> None:
    first, later = decoders()
    share_weights([first, later])
    merged = merge_decoders(first, later)
    for original, cached, feeds in (
        (first, False, feeds_of(0, 0, cached=False)),  # before there is a cache, clients feed one of length 0
        (later, True, feeds_of(2, 6, cached=True)),
    ):
        expected = run(original, tmp_path / "one.onnx", feeds)
        found = run(merged, tmp_path / "merged.onnx", feeds)
        assert list(found) == ["logits", "present.0.decoder.key", "present.0.encoder.key"]
        for name, value in expected.items():
            np.testing.assert_array_equal(found[name], value)
        if cached:
            assert found["present.0.encoder.key"].shape == (0, 1, 1, WIDTH)


def test_what_clients_look_for() -> None:
    merged = merge_decoders(*decoders())
    shapes = {value.name: [str(size) for size in value.shape or ()] for value in merged.graph.inputs}
    assert shapes == {
        "input_ids": ["batch_size", "decoder_sequence_length"],
        "encoder_hidden_states": ["batch_size", "encoder_sequence_length", "32"],
        "past_key_values.0.decoder.key": ["batch_size", "1", "past_decoder_sequence_length", "32"],
        "past_key_values.0.encoder.key": ["batch_size", "1", "encoder_sequence_length_out", "32"],
        "use_cache_branch": ["1"],
    }


def test_a_fixed_length_of_the_encoder_may_be_zero_before_there_is_a_cache() -> None:
    first, later = (model.clone() for model in decoders())
    for value in [*first.graph.outputs, *later.graph.inputs]:
        if ".encoder." in str(value.name):
            value.shape = ir.Shape(["batch_size", 1, 1500, WIDTH])
    merged = merge_decoders(first, later)
    ports = [value for value in [*merged.graph.inputs, *merged.graph.outputs] if ".encoder." in str(value.name)]
    assert [str(value.shape[2]) for value in ports if value.shape] == ["encoder_sequence_length_out"] * 2


def test_the_given_graphs_stay_as_they_are() -> None:
    first, later = decoders()
    before = [ir.to_proto(model).SerializeToString() for model in (first, later)]
    merge_decoders(first, later)
    assert [ir.to_proto(model).SerializeToString() for model in (first, later)] == before


def test_equal_weights_become_one_initializer_outside() -> None:
    first, later = decoders()
    assert share_weights([first, later]) == 4 * (2 * WORDS * WIDTH + 1)
    assert share_weights([first, later]) == 0
    merged = merge_decoders(first, later)
    assert sorted(merged.graph.initializers) == ["cross", "embedding", "head"]
    assert list(branch(merged, "then_branch").initializers) == ["with_past/scale"]  # small: seen by shape inference
    assert list(branch(merged, "else_branch").initializers) == ["no_past/scale"]


def test_weights_that_differ_in_one_bit_stay_apart(tmp_path: Path) -> None:
    other = COMMON["head"].copy()
    other.view(np.uint32)[3, 4] ^= 1
    first, later = decoders(head=other)
    share_weights([first, later])
    merged = merge_decoders(first, later)
    assert sorted(merged.graph.initializers) == ["cross", "embedding", "head", "head_"]
    feeds = feeds_of(2, 6, cached=True)
    expected = run(later, tmp_path / "one.onnx", feeds)
    np.testing.assert_array_equal(run(merged, tmp_path / "merged.onnx", feeds)["logits"], expected["logits"])


def test_equal_bytes_of_another_shape_or_dtype_stay_apart() -> None:
    array = random(WIDTH, WIDTH, seed=6)
    tensors = [ir.Tensor(array), ir.Tensor(array.reshape(-1)), ir.Tensor(array.view(np.int32)), ir.Tensor(array.copy())]
    values = [
        ir.Value(name=f"w{i}", type=ir.TensorType(t.dtype), shape=t.shape, const_value=t) for i, t in enumerate(tensors)
    ]
    model = ir.Model(ir.Graph([], [], nodes=[], initializers=values, opset_imports={"": 21}), ir_version=10)
    assert share_weights([model]) == array.nbytes
    assert [tensors.index(value.const_value) for value in values] == [0, 1, 2, 0]  # type: ignore[arg-type]


def test_no_weight_is_read_by_merging() -> None:
    def read() -> ir.TensorProtocol:
        raise AssertionError("a weight was read")

    first, later = decoders()
    for model in (first, later):
        for value in model.graph.initializers.values():
            assert value.const_value is not None
            tensor = value.const_value
            value.const_value = ir.LazyTensor(read, tensor.dtype, ir.Shape(tensor.shape.numpy()))
    merge_decoders(first, later)


def test_one_file_of_weights_for_all_three(tmp_path: Path) -> None:
    first, later = decoders()
    share_weights([first, later])
    models = {"first": first, "later": later, "merged": merge_decoders(first, later)}
    save_graphs({tmp_path / f"{name}.onnx": model for name, model in models.items()}, external_data="merged.onnx_data")
    whole = sum(array.nbytes for array in (*COMMON.values(), *CROSS.values()))
    assert (tmp_path / "merged.onnx_data").stat().st_size < whole + 3 * 4096  # each begins on a page
    for name, model in models.items():
        loaded = load_graph(tmp_path / f"{name}.onnx")
        for key, value in model.graph.initializers.items():
            stored = loaded.graph.initializers[key].const_value
            assert stored is not None
            assert value.const_value is not None
            np.testing.assert_array_equal(stored.numpy(), value.const_value.numpy())
            assert value.const_value.nbytes <= 1024 or isinstance(stored, FileTensor)


def test_the_encoders_keys_passed_on_by_the_cached_decoder(tmp_path: Path) -> None:
    first, later = decoders(PASSED_ON)
    feeds = feeds_of(2, 6, cached=True)
    found = run(merge_decoders(first, later), tmp_path / "merged.onnx", feeds)
    np.testing.assert_array_equal(found["present.0.encoder.key"], feeds["past_key_values.0.encoder.key"])


def test_an_output_of_the_cached_decoder_alone_is_refused() -> None:
    first, later = decoders()
    later.graph.outputs[1].name = "present.0.decoder.value"
    with pytest.raises(UnsupportedModelError, match=r"present\.0\.decoder\.value"):
        merge_decoders(first, later)

"""Weights in half the bytes: what a file holds, what passes see, and when a Cast is left alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxpress.errors import CorruptFileError
from onnxpress.graph import storage
from onnxpress.graph.io import load_graph, save_graph
from onnxpress.graph.storage import StoredTensor
from onnxpress.graph.tensors import FileTensor

HEADER = '<ir_version: 10, opset_import: ["": 21]>\n'
TIED = """
g (int64[n] ids, bfloat16[9, 4] table, bfloat16[6, 4] up) => (float[n, 6] y, float[n, 9] logits) {
    wide = Cast<to = 1>(table)
    x = Gather(wide, ids)
    up32 = Cast<to = 1>(up)
    turned = Transpose<perm = [1, 0]>(up32)
    y = MatMul(x, turned)
    head = Transpose(wide)
    logits = MatMul(x, head)
}
"""


def model_of(text: str, dtype: Any = ml_dtypes.bfloat16, keep: tuple[str, ...] = ("ids", "x")) -> ir.Model:
    """A model from ONNX text; inputs other than `keep` become initializers of random numbers."""
    model = ir.from_onnx_text(HEADER + text)
    generator = np.random.default_rng(0)
    for value in list(model.graph.inputs):
        if value.name not in keep:
            assert value.shape is not None
            model.graph.inputs.remove(value)
            value.const_value = ir.tensor(generator.standard_normal(value.shape.numpy()).astype(dtype), name=value.name)
            model.graph.register_initializer(value)
    return model


def nodes(model: ir.Model) -> list[str]:
    return [f"{node.op_type}({', '.join(str(value and value.name) for value in node.inputs)})" for node in model.graph]


@pytest.fixture
def stored(tmp_path: Path) -> Callable[[ir.Model], Path]:
    def save(model: ir.Model) -> Path:
        path = tmp_path / "m.onnx"
        onnx.save(
            ir.to_proto(model), path, save_as_external_data=True, location="m.data", size_threshold=0
        )  # by another tool
        return path

    return save


def run(path: Path, **feeds: Any) -> list[Any]:
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, feeds)


def test_passes_see_float32_and_files_hold_the_bytes(tmp_path: Path, stored: Callable[[ir.Model], Path]) -> None:
    original = model_of(TIED)
    path = stored(original)
    model = load_graph(path)
    assert nodes(model) == ["Gather(table, ids)", "MatMul(x, up)", "Transpose(table)", "MatMul(x, head)"]
    up, table = (model.graph.initializers[name] for name in ("up", "table"))
    bits = {name: original.graph.initializers[name].const_value.numpy() for name in ("up", "table")}  # type: ignore[union-attr]
    for value, expected in ((up, bits["up"].T), (table, bits["table"])):
        assert value.dtype == ir.DataType.FLOAT
        assert isinstance(value.const_value, StoredTensor)
        np.testing.assert_array_equal(value.const_value.numpy(), expected.astype(np.float32))
        np.testing.assert_array_equal(value.const_value.rows(1, 3), expected[1:3].astype(np.float32))

    save_graph(model, tmp_path / "n.onnx", external_data="n.data")
    proto = onnx.load(tmp_path / "n.onnx")
    assert {t.name: (t.data_type, t.raw_data) for t in proto.graph.initializer} == {
        name: (onnx.TensorProto.BFLOAT16, array.tobytes()) for name, array in bits.items()
    }
    assert [node.op_type for node in proto.graph.node[:3]] == ["Cast", "Cast", "Transpose"]
    ids = np.array([3, 8, 0])
    for ours, theirs in zip(run(tmp_path / "n.onnx", ids=ids), run(path, ids=ids), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_saving_and_loading_again_changes_nothing(tmp_path: Path, stored: Callable[[ir.Model], Path]) -> None:
    save_graph(load_graph(stored(model_of(TIED))), tmp_path / "1.onnx")
    save_graph(load_graph(tmp_path / "1.onnx"), tmp_path / "2.onnx")
    assert (tmp_path / "2.onnx").read_bytes() == (tmp_path / "1.onnx").read_bytes()


def test_saving_leaves_the_graph_in_memory_alone(tmp_path: Path, stored: Callable[[ir.Model], Path]) -> None:
    model = load_graph(stored(model_of(TIED)))
    before = nodes(model)
    save_graph(model, tmp_path / "n.onnx")
    assert nodes(model) == before
    assert isinstance(model.graph.initializers["up"].const_value, StoredTensor)


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 40),
    transposed=st.booleans(),
    dtype=st.sampled_from([np.float16, ml_dtypes.bfloat16]),
)
def test_any_slab_of_any_shape(
    rows: int, columns: int, transposed: bool, dtype: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    values = np.random.default_rng(rows).standard_normal((rows, columns)).astype(dtype)
    path = tmp_path_factory.mktemp("weights") / "w"
    path.write_bytes(b"head" + values.tobytes())
    half = FileTensor(path, 4, ir.DataType.from_numpy(values.dtype), values.shape, finite=True)
    tensor = StoredTensor(half, transposed=transposed)
    expected = (values.T if transposed else values).astype(np.float32)
    np.testing.assert_array_equal(tensor.numpy(), expected)
    middle = len(expected) // 2
    slabs = [tensor.rows(0, middle), tensor.rows(middle, len(expected))]
    np.testing.assert_array_equal(np.concatenate(slabs), expected)


@pytest.mark.parametrize(
    ("why", "text"),
    [
        (
            "another node reads the bytes themselves",
            "g (int64[n] ids, bfloat16[9, 4] w) => (float[9, 4] y, bfloat16[n, 4] z) "
            "{ c = Cast<to = 1>(w) y = Identity(c) z = Gather(w, ids) }",
        ),
        ("the result is an output", "g (bfloat16[9, 4] w) => (float[9, 4] y) { y = Cast<to = 1>(w) }"),
        ("to another type", "g (bfloat16[9, 4] w) => (float16[9, 4] y) { c = Cast<to = 10>(w) y = Identity(c) }"),
        ("anyone may feed it", "g (bfloat16[9, 4] x) => (float[9, 4] y) { c = Cast<to = 1>(x) y = Identity(c) }"),
        ("not a weight", "g (bfloat16[9, 4] x) => (float[9, 4] y) { a = Abs(x) c = Cast<to = 1>(a) y = Identity(c) }"),
    ],
)
def test_casts_that_are_left_alone(why: str, text: str) -> None:
    model = model_of(text)
    before = nodes(model)
    storage.decode_weights(model)
    assert nodes(model) == before, why
    storage.encode_weights(model)
    assert nodes(model) == before, why


def test_an_initializer_that_callers_may_override_is_left_alone() -> None:
    model = model_of("g (bfloat16[9, 4] w) => (float[9, 4] y) { c = Cast<to = 1>(w) y = Identity(c) }")
    model.graph.inputs.append(model.graph.initializers["w"])
    storage.decode_weights(model)
    assert nodes(model) == ["Cast(w)", "Identity(c)"]


@pytest.mark.parametrize("perm", ["<perm = [0, 1]>", ""])
def test_only_a_real_transpose_is_taken_in(perm: str) -> None:
    model = model_of(
        f"g (bfloat16[4, 4] w) => (float[4, 4] y) {{ c = Cast<to = 1>(w) t = Transpose{perm}(c) y = Identity(t) }}"
    )
    storage.decode_weights(model)
    assert nodes(model) == (["Transpose(w)", "Identity(t)"] if perm else ["Identity(w)"])


def test_float16_and_several_casts_of_one_weight() -> None:
    model = model_of(
        "g (float16[4, 4] w) => (float[4, 4] y) { a = Cast<to = 1>(w) b = Cast<to = 1>(w) y = Add(a, b) }",
        np.float16,
    )
    storage.decode_weights(model)
    assert nodes(model) == ["Add(w, w)"]
    storage.encode_weights(model)
    assert nodes(model) == ["Cast(w)", "Add(w/float32, w/float32)"]


def test_a_weight_cut_short_is_refused(stored: Callable[[ir.Model], Path]) -> None:
    path = stored(model_of(TIED))
    data = path.with_name("m.data")
    data.write_bytes(data.read_bytes()[:-2])
    with pytest.raises(CorruptFileError, match=r"m\.data has \d+ bytes"):
        load_graph(path)

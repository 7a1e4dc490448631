"""From a .gguf to an artifact with the recipe `as-stored`: every weight keeps its value."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from gguf import GGMLQuantizationType as Type

from onnxpress import pipeline
from onnxpress.artifact.folder import read_artifact
from onnxpress.errors import NothingMatchedError
from onnxpress.exporter.sources.source import Checkpoint, resolve_source
from onnxpress.optimizers.quantization.maths.block_format import unpack
from onnxpress.requests import Gates, Judging

from .tiny_gguf import decoder_metadata, decoder_shapes, random_tensors, write_gguf


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONNXPRESS_CACHE", str(tmp_path / "cache"))


def tensors() -> dict[str, np.ndarray]:
    return {name: 0.1 * values for name, values in random_tensors(decoder_shapes()).items()}


def numbers(value: ir.Value | None) -> np.ndarray:
    """What runtimes fold while they load the graph."""
    assert value is not None
    if value.const_value is not None:
        return value.const_value.numpy()
    node = value.producer()
    assert node is not None
    inputs = [numbers(one) for one in node.inputs]
    left = node.attributes.get_string("direction", "") == "LEFT"
    compute: dict[str, Callable[..., np.ndarray]] = {
        "Add": np.add, "BitShift": np.left_shift if left else np.right_shift, "BitwiseAnd": np.bitwise_and,
        "BitwiseOr": np.bitwise_or, "Cast": lambda array: array.astype(np.float32), "Mul": np.multiply,
        "Reshape": np.reshape, "Transpose": np.transpose,
    }  # fmt: skip
    return compute[node.op_type](*inputs)


@pytest.mark.parametrize(
    ("embedding", "query_key", "value", "width"),
    [(Type.Q8_0, Type.Q4_1, Type.Q4_1, 64), (Type.Q6_K, Type.Q4_K, Type.Q6_K, 256)],
)
def test_weights_are_those_of_the_file(
    tmp_path: Path, embedding: Type, query_key: Type, value: Type, width: int
) -> None:
    shapes = decoder_shapes(width=width, head_dim=width // 4, inner=width)
    types = {name: query_key for name, shape in shapes.items() if len(shape) == 2}
    types |= {name: value for name in types if "attn_v" in name} | {"token_embd.weight": embedding}
    metadata = decoder_metadata(embedding_length=width, feed_forward_length=width)
    metadata["rope.dimension_count"] = width // 4
    values = {name: 0.1 * array for name, array in random_tensors(shapes).items()}
    path = write_gguf(tmp_path / "tiny.gguf", "llama", metadata, values, types)
    result = pipeline.build(str(path), recipe="as-stored", output=tmp_path / "out", judging=Judging(benchmark=False))
    kept = next(step for step in result.steps if step.name == "keep-blocks")
    assert not kept.skipped
    assert result.manifest.metrics["kl"] < 0.01
    checkpoint = resolve_source(str(path))
    assert isinstance(checkpoint, Checkpoint)
    matrices = [source.numpy() for source in checkpoint.tensors.values() if len(source.shape) == 2]
    expected = [matrix + np.float32(0) for matrix in matrices]
    (graph,) = read_artifact(tmp_path / "out").graphs.values()
    found = 0
    for node in graph.graph:
        if node.op_type != "MatMulNBits":
            continue
        bits, size = node.attributes.get_int("bits"), node.attributes.get_int("block_size")
        codes, scales = (numbers(one) for one in node.inputs[1:3])
        rows = (unpack(codes, bits, size) - 2.0 ** (bits - 1)) * scales[..., None]
        offsets = f"{str(node.inputs[2].name).partition('.scales')[0]}.offsets"  # type: ignore[union-attr]
        products = [use.inputs[1] for use in graph.graph if use.op_type == "MatMul"]
        rows += next((numbers(one).T[..., None] for one in products if one is not None and one.name == offsets), 0)
        rows = rows.astype(np.float32).reshape(len(rows), -1) + np.float32(0)  # no negative zeros
        # Packed projections lie side by side: every row is one of the file's.
        originals = np.concatenate([weight for weight in expected if weight.shape[1] == rows.shape[1]])
        assert {row.tobytes() for row in rows} <= {row.tobytes() for row in originals}
        found += len(rows)
    assert found == sum(len(weight) for weight in expected)


def test_a_search_starts_from_the_codes_in_the_file(tmp_path: Path) -> None:
    """4 bits without a new loss are smaller than anything else within the limit."""
    shapes = decoder_shapes(width=64, head_dim=16, inner=64)
    types = {name: Type.Q4_1 for name, shape in shapes.items() if len(shape) == 2}
    metadata = decoder_metadata(embedding_length=64, feed_forward_length=64)
    values = {name: 0.1 * array for name, array in random_tensors(shapes).items()}
    path = write_gguf(tmp_path / "tiny.gguf", "llama", metadata, values, types)
    result = pipeline.build(
        str(path), judging=Judging(gates=Gates(max_loss=0.01), benchmark=False, threads=1), output=tmp_path / "out"
    )
    assert result.manifest.export["stored_bits"] == pytest.approx(5, abs=1)
    assert result.manifest.recipe is not None
    assert result.manifest.recipe["name"] == "budget-stored"
    (found,) = [step.matched for step in result.steps if step.name == "search"]
    assert found["as stored"] > sum(found.values()) / 2
    assert result.manifest.metrics["loss"] <= 0.01


def test_a_file_of_floats_has_nothing_to_keep(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", "llama", decoder_metadata(), tensors())
    with pytest.raises(NothingMatchedError, match="on no grid"):
        pipeline.build(str(path), recipe="as-stored", output=tmp_path / "out", judging=Judging(benchmark=False))
    assert not (tmp_path / "out").exists()

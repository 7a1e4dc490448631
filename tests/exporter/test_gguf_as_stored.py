"""From a .gguf to an artifact with the recipe `as-stored`: every weight keeps its value."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from onnxpress import pipeline
from onnxpress.artifact_folder import load
from onnxpress.errors import NothingMatchedError
from onnxpress.exporter.source import Checkpoint, resolve
from onnxpress.optimizers.quantization.block_format import unpack

from .tiny_gguf import decoder_metadata, decoder_shapes, random_tensors, write_gguf


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONNXPRESS_CACHE", str(tmp_path / "cache"))


def tensors() -> dict[str, np.ndarray]:
    return {name: 0.1 * values for name, values in random_tensors(decoder_shapes()).items()}


def test_weights_are_those_of_the_file(tmp_path: Path) -> None:
    shapes = decoder_shapes()
    types = {name: Type.Q8_0 if "embd" in name else Type.Q4_1 for name, shape in shapes.items() if len(shape) == 2}
    path = write_gguf(tmp_path / "tiny.gguf", "llama", decoder_metadata(), tensors(), types)
    result = pipeline.build(str(path), recipe="as-stored", output=tmp_path / "out", benchmark=False)
    kept = next(step for step in result.steps if step.name == "keep-blocks")
    assert not kept.skipped
    assert result.manifest.metrics["kl"] < 0.01
    checkpoint = resolve(str(path))
    assert isinstance(checkpoint, Checkpoint)
    expected = [
        checkpoint.tensors[name].numpy() for name, source in checkpoint.tensors.items() if len(source.shape) == 2
    ]
    (graph,) = load(tmp_path / "out").graphs.values()
    found = 0
    for node in graph.graph:
        if node.op_type != "MatMulNBits":
            continue
        bits, size = node.attributes.get_int("bits"), node.attributes.get_int("block_size")
        codes, scales = (value.const_value.numpy() for value in node.inputs[1:3])  # type: ignore[union-attr]
        values = (unpack(codes, bits, size) - 2.0 ** (bits - 1)) * scales[..., None]
        offsets = graph.graph.initializers.get(str(node.inputs[2].name).replace(".scales", ".offsets"))  # type: ignore[union-attr]
        if offsets is not None:
            values += offsets.const_value.numpy().T[..., None]  # type: ignore[union-attr]
        rows = values.astype(np.float32).reshape(len(values), -1)
        # Packed projections lie side by side: every row is one of the file's.
        originals = np.concatenate([weight for weight in expected if weight.shape[1] == rows.shape[1]])
        assert {row.tobytes() for row in rows} <= {row.tobytes() for row in originals}
        found += len(rows)
    assert found == sum(len(weight) for weight in expected)


def test_a_file_of_floats_has_nothing_to_keep(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", "llama", decoder_metadata(), tensors())
    with pytest.raises(NothingMatchedError, match="on no grid"):
        pipeline.build(str(path), recipe="as-stored", output=tmp_path / "out", benchmark=False)
    assert not (tmp_path / "out").exists()

"""Safetensors headers: read like the library, and every corruption is its own clear error."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors import safe_open
from safetensors.numpy import save_file

from onnxpress.errors import BadInputError, CorruptFileError, UnsupportedModelError
from onnxpress.exporter.sources.safetensors import read_safetensors
from onnxpress.graph.tensors import ArrayTensor


def write(path: Path, header: Any, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def entry(dtype: str = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@given(
    arrays=st.dictionaries(
        st.text("abc.", min_size=1, max_size=6),
        st.sampled_from([np.float32, np.float16, np.int64, np.uint8, np.bool_]).flatmap(
            lambda dtype: hnp.arrays(dtype, hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4))
        ),
        max_size=4,
    )
)
def test_reads_what_the_library_wrote(arrays: dict[str, np.ndarray], tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    save_file(arrays, path)
    tensors = read_safetensors(path)
    assert set(tensors) == set(arrays)
    for name, array in arrays.items():
        got = tensors[name].numpy()
        assert tensors[name].shape == got.shape == array.shape
        assert got.dtype == array.dtype
        np.testing.assert_array_equal(got, array)


def test_bfloat16_and_float8(tmp_path: Path) -> None:
    header = {"b": entry("BF16", (2,), (0, 4)), "f": entry("F8_E4M3", (3,), (4, 7))}
    tensors = read_safetensors(write(tmp_path / "x.safetensors", header, bytes(range(7))))
    assert tensors["b"].dtype == ir.DataType.BFLOAT16
    assert tensors["b"].numpy().dtype == ml_dtypes.bfloat16
    assert tensors["b"].numpy().tobytes() == bytes(range(4))
    assert tensors["f"].numpy().dtype == ml_dtypes.float8_e4m3fn


def test_reading_maps_and_does_not_write(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"x": np.arange(4, dtype=np.float32)}, path)
    array = read_safetensors(path)["x"].mapped()
    with pytest.raises(ValueError, match="read-only"):
        array[0] = 1


def test_file_cut_after_opening(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"x": np.arange(40_000, dtype=np.float32)}, path)
    tensor = read_safetensors(path)["x"]
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CorruptFileError, match="cannot read"):
        tensor.mapped()
    with pytest.raises(CorruptFileError, match="ends inside tensor 'x'"):
        tensor.numpy()


CORRUPT: dict[str, tuple[Any, bytes, str]] = {
    "not-json": (b"{nope", b"", "damaged safetensors header"),
    "not-an-object": (b"[1]", b"", "not an object"),
    "deep-json": (b'{"a":' + b"[" * 100_000, b"", "damaged"),
    "twice": (
        b'{"a":' + json.dumps(entry()).encode() + b',"a":' + json.dumps(entry()).encode() + b"}",
        bytes(8),
        "twice",
    ),
    "no-offsets": ({"a": {"dtype": "F32", "shape": [2]}}, bytes(8), "damaged header entry for tensor a"),
    "negative-shape": ({"a": entry(shape=(-2,))}, bytes(8), "damaged header entry"),
    "float-shape": ({"a": entry(shape=(2.0,))}, bytes(8), "damaged header entry"),
    "huge-shape": ({"a": entry(shape=(2**62, 2**62))}, bytes(8), "needs .* bytes"),
    "wrong-shape": ({"a": entry(shape=(3,))}, bytes(8), r"shape \[3\] .* needs 12 bytes, its offsets give 8"),
    "truncated-data": ({"a": entry()}, bytes(5), "lies at 0..8, but the file holds 5"),
    "backwards": ({"a": entry(offsets=(8, 0))}, bytes(8), "lies at 8..0"),
    "overlap": ({"a": entry(), "b": entry()}, bytes(8), "overlap"),
    "hole": ({"a": entry(offsets=(4, 12))}, bytes(12), "hole"),
    "trailing": ({"a": entry()}, bytes(9), "1 bytes belong to no tensor"),
}


@pytest.mark.parametrize("case", CORRUPT)
def test_corruptions(case: str, tmp_path: Path) -> None:
    header, data, message = CORRUPT[case]
    with pytest.raises(CorruptFileError, match=message) as caught:
        read_safetensors(write(tmp_path / "model.safetensors", header, data))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"abc", struct.pack("<Q", 2**63) + b"{}", struct.pack("<Q", 10**9) + b"{}"])
def test_not_safetensors(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(CorruptFileError, match="not a safetensors file, or truncated"):
        read_safetensors(path)


def test_git_lfs_pointer_is_recognised(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 12\n")
    with pytest.raises(CorruptFileError) as caught:
        read_safetensors(path)
    assert caught.value.hint is not None
    assert "LFS" in caught.value.hint


def test_unknown_element_type(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="tensor a has element type F4"):
        read_safetensors(write(tmp_path / "x.safetensors", {"a": entry("F4", (16,))}, bytes(8)))


@given(position=st.integers(0, 400), value=st.integers(0, 255))
def test_any_changed_byte_is_read_or_refused(
    position: int, value: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("fuzz") / "model.safetensors"
    save_file({"a": np.ones((2, 3), np.float32), "b": np.ones(5, np.int64)}, path)
    data = bytearray(path.read_bytes())
    data[position % len(data)] = value
    path.write_bytes(data)
    try:
        for tensor in read_safetensors(path).values():
            tensor.numpy()
    except BadInputError as error:
        assert "\n" not in str(error).replace("\\n", "")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused_by_name(value: float, tmp_path: Path) -> None:
    array = np.ones((5, 7), np.float32)
    array[4, 6] = value
    save_file({"there": array}, tmp_path / "w.safetensors")
    for source in (ArrayTensor("there", array), read_safetensors(tmp_path / "w.safetensors")["there"]):
        with pytest.raises(CorruptFileError, match=r"weight here holds NaN or infinity \(1 of 35 values read\)"):
            source.checked("here").numpy()


def test_library_agrees_on_what_is_corrupt(tmp_path: Path) -> None:
    """Where we refuse, so does the safetensors library (element types aside)."""
    for case, (header, data, _) in CORRUPT.items():
        if case == "twice":
            continue
        path = write(tmp_path / f"{case}.safetensors", header, data)
        with pytest.raises(Exception, match=r".+"):  # noqa: SIM117
            with safe_open(path, "numpy") as file:
                list(file.keys())

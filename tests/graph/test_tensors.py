"""Lazy weights: read whole or by rows, checked where they are bound, and the same whichever class holds them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from onnxpress.errors import CorruptFileError
from onnxpress.graph.storage import WideTensor
from onnxpress.graph.tensors import (
    ArrayTensor,
    FileTensor,
    RowTensor,
    ViewTensor,
    WeightTensor,
    apply_to_rows,
    reads_rows,
    rows_of,
    slabs_of,
)

VALUES = np.arange(35, dtype=np.float32).reshape(7, 5)


def weights(folder: Path) -> dict[str, WeightTensor]:
    """The same matrix in every class."""
    path = folder / "weights.bin"
    path.write_bytes(bytes(12) + VALUES.tobytes())
    return {
        "computed": WeightTensor(lambda: VALUES, ir.DataType.FLOAT, VALUES.shape),
        "rows": RowTensor(lambda start, stop: VALUES[start:stop], ir.DataType.FLOAT, VALUES.shape),
        "file": FileTensor(path, 12, ir.DataType.FLOAT, VALUES.shape),
        "array": ArrayTensor("array", VALUES),
        "view": ViewTensor(ir.tensor(VALUES.reshape(-1)), VALUES.shape),
        "wide": WideTensor(FileTensor(path, 12, ir.DataType.FLOAT, VALUES.shape)),
    }


def test_every_class_holds_the_same_values(tmp_path: Path) -> None:
    for name, weight in weights(tmp_path).items():
        np.testing.assert_array_equal(weight.numpy(), VALUES, err_msg=name)
        assert weight.tobytes() == VALUES.tobytes()
        assert (weight.size, weight.nbytes, weight.stored_bytes) == (35, 140, 140)
        for start, stop in ((0, 7), (2, 5), (3, 3)):
            np.testing.assert_array_equal(rows_of(weight)(start, stop), VALUES[start:stop], err_msg=name)
        assert reads_rows(weight) == (name in ("rows", "file", "wide")), name
        slabs = list(slabs_of(weight, 40))
        assert [len(slab) for slab in slabs] == [2, 2, 2, 1]
        np.testing.assert_array_equal(np.concatenate(slabs), VALUES)


def test_a_function_of_rows_reads_as_its_tensor_does(tmp_path: Path) -> None:
    for name, weight in weights(tmp_path).items():
        halves = apply_to_rows(weight, lambda values: values.astype(np.float16), ir.DataType.FLOAT16, name="half")
        assert (halves.name, halves.dtype) == ("half", ir.DataType.FLOAT16)
        assert reads_rows(halves) == reads_rows(weight), name
        np.testing.assert_array_equal(halves.rows(1, 4), VALUES[1:4].astype(np.float16))


def test_checked_names_the_weight_and_leaves_the_other_alone(tmp_path: Path) -> None:
    bad = VALUES.copy()
    bad[6, 4] = np.nan
    (tmp_path / "bad.bin").write_bytes(bad.tobytes())
    for weight in (FileTensor(tmp_path / "bad.bin", 0, ir.DataType.FLOAT, bad.shape), ArrayTensor("stored", bad)):
        checked = weight.checked("bound")
        assert (checked.name, type(weight.numpy())) == ("bound", np.ndarray)
        with pytest.raises(CorruptFileError, match="weight bound holds NaN"):
            checked.numpy()
        with pytest.raises(CorruptFileError, match="weight bound holds NaN"):
            checked.rows(6, 7)


def test_a_transposed_weight_is_read_in_slabs_from_files_only(tmp_path: Path) -> None:
    held = weights(tmp_path)
    for name, whole in (("file", False), ("rows", True), ("computed", True)):
        wide = WideTensor(held[name], transposed=True)
        assert reads_rows(wide) != whole
        np.testing.assert_array_equal(wide.numpy(), VALUES.T)
        np.testing.assert_array_equal(wide.rows(1, 3), VALUES.T[1:3])


def test_scalars_and_packed_elements_are_read_whole(tmp_path: Path) -> None:
    (tmp_path / "packed.bin").write_bytes(bytes([0x21, 0x03]))
    packed = FileTensor(tmp_path / "packed.bin", 0, ir.DataType.UINT4, (3, 1))
    assert not reads_rows(packed)
    assert packed.numpy().astype(int).tolist() == [[1], [2], [3]]
    assert packed.rows(1, 3).astype(int).tolist() == [[2], [3]]
    assert packed.tobytes() == bytes([0x21, 0x03])
    number = FileTensor(tmp_path / "packed.bin", 0, ir.DataType.INT16, ())
    assert not reads_rows(number)
    assert [slab.item() for slab in slabs_of(number, 100)] == [0x0321]


def test_a_weight_names_itself(tmp_path: Path) -> None:
    """onnx_ir's own would print the method that computes it, which prints the weight, and so on."""
    assert repr(ArrayTensor("up", VALUES)) == "ArrayTensor(up: FLOAT[7, 5])"

"""Files of masks: what is written is read, and nothing else is."""

from __future__ import annotations

import json
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxpress.errors import CorruptFileError, OutputError, SourceNotFoundError
from onnxpress.optimizers.pruning.mask_files import FORMAT, PackedMask, read_masks, write_masks


def mask(rows: int, columns: int, seed: int = 0) -> PackedMask:
    return PackedMask.pack(np.random.default_rng(seed).random((rows, columns)) < 0.5)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 20)), max_size=4))
def test_a_bit_a_weight_and_back(tmp_path_factory: pytest.TempPathFactory, shapes: list[tuple[int, int]]) -> None:
    path = tmp_path_factory.mktemp("masks") / "a.masks"
    masks = {f"layer.{n}.weight": mask(*shape, seed=n) for n, shape in enumerate(shapes)}
    write_masks(path, masks)
    found = read_masks(path)
    assert list(found) == list(masks)
    for name, one in masks.items():
        assert found[name].shape == one.shape
        np.testing.assert_array_equal(found[name].rows(0, one.shape[0]), one.rows(0, one.shape[0]))
    assert path.stat().st_size < 8 + 64 + sum(120 + rows * -(-columns // 8) for rows, columns in shapes)


def test_other_tools_open_it(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.numpy")
    write_masks(tmp_path / "a", {"w": mask(3, 10)})
    np.testing.assert_array_equal(safetensors.load_file(tmp_path / "a")["w"], mask(3, 10).bits)


def header(**changes: Any) -> dict[str, Any]:
    """Of one mask [2, 12] called w."""
    entry = {"dtype": "U8", "shape": [2, 2], "data_offsets": [0, 4]} | changes
    return {"__metadata__": {"format": FORMAT, "w": "12"}, "w": entry}


def with_columns(columns: Any) -> dict[str, Any]:
    found = header()
    found["__metadata__"]["w"] = columns
    return found


@pytest.mark.parametrize(
    "content",
    [
        header(dtype="F32"),
        header(shape=[2, 3]),
        header(shape=[1 << 40, 1 << 40]),
        header(shape=[-2, -2]),
        header(shape=[2.0, 2]),
        header(shape=[2]),
        header(shape=None),
        header(data_offsets=[0, 8]),
        header(data_offsets=[4, 8]),
        header(data_offsets=[0, 1 << 62]),
        header(data_offsets=[0, True]),
        with_columns("17"),
        with_columns("8"),
        with_columns("-12"),
        with_columns(12),
        with_columns("9" * 5000),
        with_columns("¹²"),
        {"__metadata__": {"format": FORMAT}, "w": []},
        {"__metadata__": {"format": "pt"}},
        {"__metadata__": None},
        {"__metadata__": {"format": FORMAT}},
        [1],
        "w",
    ],
    ids=lambda content: json.dumps(content)[:80],
)
def test_hostile_headers(tmp_path: Path, content: Any) -> None:
    write(tmp_path / "a", json.dumps(content).encode(), bytes(4))
    with pytest.raises(CorruptFileError):
        read_masks(tmp_path / "a")


def write(path: Path, header: bytes, data: bytes, length: int | None = None) -> None:
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + data)


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[:5],
        lambda content: content[:-1],
        lambda content: content + b"\0",
        lambda content: struct.pack("<Q", 1 << 60) + content[8:],
        lambda content: struct.pack("<Q", 0) + content[8:],
        lambda content: content[:-1] + b"\xff",  # bits beyond the twelfth column
        lambda content: pickle.dumps({"w": content}),
        lambda content: content[:8] + b"[" * (len(content) - 8),
    ],
)
def test_damaged_files(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    sound = json.dumps(header()).encode()
    write(tmp_path / "a", sound, b"\xff\xf0\xff\xf0")
    assert read_masks(tmp_path / "a")["w"].rows(0, 2).all()
    (tmp_path / "a").write_bytes(damage((tmp_path / "a").read_bytes()))
    with pytest.raises(CorruptFileError, match="a holds"):
        read_masks(tmp_path / "a")


def test_no_such_file_and_no_such_folder(tmp_path: Path) -> None:
    with pytest.raises(SourceNotFoundError, match="No such file"):
        read_masks(tmp_path / "a")
    with pytest.raises(OutputError, match="cannot write"):
        write_masks(tmp_path / "nowhere" / "a", {})

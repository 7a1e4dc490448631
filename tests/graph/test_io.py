"""Reading and writing graphs: same values, same bytes, hostile files refused, nothing half-written."""

from __future__ import annotations

import contextlib
import os
import resource
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxpress.errors import (
    CorruptFileError,
    OnnxpressError,
    OutputError,
    SourceNotFoundError,
    UnsafeInputError,
    UnsupportedModelError,
    VerificationError,
)
from onnxpress.graph.io import copy_graph, load_graph, save_graph
from onnxpress.graph.tensors import FileTensor, LazyGroup, RowTensor


def graph_of(**tensors: ir.TensorProtocol) -> ir.Model:
    """A model that returns each of the given initializers through an Identity."""
    outputs, nodes, initializers = [], [], []
    for name, tensor in tensors.items():
        value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(tensor.shape), const_value=tensor)
        initializers.append(value)
        node = ir.node("Identity", [value])
        node.outputs[0].name = f"{name}_out"
        node.outputs[0].type, node.outputs[0].shape = value.type, value.shape
        nodes.append(node)
        outputs.append(node.outputs[0])
    graph = ir.Graph([], outputs, nodes=nodes, initializers=initializers, opset_imports={"": 21}, name="g")
    return ir.Model(graph, ir_version=10)


def run(path: Path) -> list[np.ndarray]:
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {})


def ramp(*shape: int) -> np.ndarray:
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A saved model with a weight of 16 KiB in model.onnx_data."""
    save_graph(graph_of(w=ir.tensor(ramp(64, 64))), tmp_path / "model.onnx", external_data="model.onnx_data")
    return tmp_path / "model.onnx"


def edit(path: Path, **entries: str) -> None:
    """Rewrite the external data entries of the only weight."""
    model = onnx.load(path, load_external_data=False)
    (tensor,) = model.graph.initializer
    for entry in tensor.external_data:
        entry.value = entries.get(entry.key, entry.value)
    path.write_bytes(model.SerializeToString())


def test_weights_of_every_kind_come_back(tmp_path: Path) -> None:
    source = ramp(300, 40)
    group = LazyGroup(
        lambda: [source.astype(np.uint8), source[:, 0] * 2],
        [(ir.DataType.UINT8, (300, 40)), (ir.DataType.FLOAT, (300,))],
    )
    model = graph_of(
        small=ir.tensor(np.float32(3.0)),
        transposed=ir.tensor(source.T),
        rows=RowTensor(lambda a, b: source[a:b] + 1, ir.DataType.FLOAT, source.shape),
        lazy=ir.LazyTensor(lambda: ir.tensor(source - 1), ir.DataType.FLOAT, ir.Shape(source.shape)),
        codes=group.tensors[0],
        scales=group.tensors[1],
        empty=ir.tensor(np.zeros((0, 7), np.float32)),
        half=ir.tensor(source.astype(np.float16)),
    )
    save_graph(model, tmp_path / "m.onnx", external_data="m.onnx_data")
    expected = [np.float32(3.0), source.T, source + 1, source - 1, source.astype(np.uint8), source[:, 0] * 2,
                np.zeros((0, 7), np.float32), source.astype(np.float16)]  # fmt: skip
    for got, want in zip(run(tmp_path / "m.onnx"), expected, strict=True):
        np.testing.assert_array_equal(got, want)
    loaded = load_graph(tmp_path / "m.onnx").graph.initializers
    for name, want in zip(loaded, expected, strict=True):
        np.testing.assert_array_equal(loaded[name].const_value.numpy(), want)
    assert {"small", "empty"} == {n for n, v in loaded.items() if not isinstance(v.const_value, FileTensor)}
    assert all(v.const_value.offset % 64 == 0 for v in loaded.values() if isinstance(v.const_value, FileTensor))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.onnx", "m.onnx_data"]


@given(
    rows=st.integers(0, 70),
    columns=st.integers(1, 70),
    dtype=st.sampled_from(
        ["float32", "float16", "bfloat16", "int8", "uint4", "int4", "bool", "int64", "float8_e4m3fn"]
    ),
    transposed=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_round_trip_keeps_every_bit(
    tmp_path_factory: pytest.TempPathFactory, rows: int, columns: int, dtype: str, transposed: bool
) -> None:
    folder = tmp_path_factory.mktemp("round")
    array = (ramp(rows, columns) % 7).astype(getattr(ml_dtypes, dtype, None) or dtype)
    array = array.T if transposed else array
    save_graph(graph_of(w=ir.tensor(array)), folder / "a.onnx", external_data="a.data")
    back = load_graph(folder / "a.onnx")
    tensor = back.graph.initializers["w"].const_value
    assert tensor is not None
    np.testing.assert_array_equal(tensor.numpy(), array)
    save_graph(back, folder / "b.onnx", external_data="b.data")
    again = load_graph(folder / "b.onnx").graph.initializers["w"].const_value
    assert again is not None
    assert again.tobytes() == tensor.tobytes() == ir.tensor(array).tobytes()
    if isinstance(tensor, FileTensor):
        np.testing.assert_array_equal(tensor.rows(1, len(array)), array[1:])


def test_a_computation_runs_once_per_save_and_is_not_kept(tmp_path: Path) -> None:
    calls = []

    def compute() -> list[np.ndarray]:
        calls.append(threading.get_ident())
        return [ramp(64, 64), -ramp(64, 64)]

    group = LazyGroup(compute, [(ir.DataType.FLOAT, (64, 64))] * 2)
    model = graph_of(a=group.tensors[0], b=group.tensors[1])
    other = graph_of(b=group.tensors[1])
    save_graph(model, tmp_path / "m.onnx", external_data="m.data")
    assert len(calls) == 1
    save_graph(other, tmp_path / "o.onnx", external_data="o.data")
    assert len(calls) == 2
    np.testing.assert_array_equal(run(tmp_path / "o.onnx")[0], -ramp(64, 64))
    assert model.graph.initializers["a"].const_value is group.tensors[0], "the model that was saved is left as it was"


def test_shared_weights_are_written_once(tmp_path: Path) -> None:
    weight = ir.LazyTensor(lambda: ir.tensor(ramp(64, 64)), ir.DataType.FLOAT, ir.Shape((64, 64)))
    save_graph(graph_of(a=weight, b=weight), tmp_path / "m.onnx", external_data="m.data")
    assert (tmp_path / "m.data").stat().st_size == 64 * 64 * 4
    save_graph(load_graph(tmp_path / "m.onnx"), tmp_path / "n.onnx", external_data="n.data")
    assert (tmp_path / "n.data").stat().st_size == 64 * 64 * 4
    assert [o.sum() for o in run(tmp_path / "n.onnx")] == [ramp(64, 64).sum()] * 2


def test_bytes_do_not_depend_on_the_number_of_workers(tmp_path: Path) -> None:
    def weights() -> Iterator[tuple[str, ir.TensorProtocol]]:
        for i in range(20):
            array = ramp(100 + i, 33)
            yield f"w{i}", ir.LazyTensor(lambda a=array: ir.tensor(a), ir.DataType.FLOAT, ir.Shape(array.shape))

    for workers in (1, 4):
        folder = tmp_path / str(workers)
        folder.mkdir()
        save_graph(graph_of(**dict(weights())), folder / "m.onnx", external_data="m.data", workers=workers)
    for name in ("m.onnx", "m.data"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "4" / name).read_bytes()


def test_single_file(tmp_path: Path) -> None:
    save_graph(graph_of(w=ir.tensor(ramp(64, 64))), tmp_path / "m.onnx")
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]
    np.testing.assert_array_equal(run(tmp_path / "m.onnx")[0], ramp(64, 64))


def test_a_single_file_has_a_limit(tmp_path: Path) -> None:
    huge = ir.LazyTensor(lambda: pytest.fail("evaluated"), ir.DataType.FLOAT, ir.Shape((2**29, 1)))
    with pytest.raises(UnsupportedModelError, match="2 GiB"):
        save_graph(graph_of(w=huge), tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


def test_weights_in_place_are_not_copied(saved: Path) -> None:
    model = load_graph(saved)
    model.graph.initializers["w"].name = "renamed"
    save_graph(model, saved.parent / "next.onnx", external_data="next.data", reuse=saved.parent)
    assert not (saved.parent / "next.data").exists()
    np.testing.assert_array_equal(run(saved.parent / "next.onnx")[0], ramp(64, 64))


def test_progress_counts_every_byte(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    model = graph_of(a=ir.tensor(ramp(64, 64)), b=ir.tensor(ramp(32, 64)))
    save_graph(model, tmp_path / "m.onnx", external_data="m.data", progress=lambda *p: seen.append(p))
    assert seen[-1] == (24576, 24576)
    assert len(seen) == 2


def test_copies_share_weights_but_not_nodes() -> None:
    model = graph_of(w=ir.tensor(ramp(4, 4)))
    copy = copy_graph(model)
    copy.graph.initializers["w"].const_value = None
    copy.graph.outputs[0].dtype = ir.DataType.INT8
    copy.graph.outputs[0].shape[0] = 7
    assert model.graph.outputs[0].dtype == ir.DataType.FLOAT
    assert model.graph.outputs[0].shape == [4, 4]
    assert model.graph.initializers["w"].const_value is not None
    assert copy_graph(model).graph.initializers["w"].const_value is model.graph.initializers["w"].const_value


def test_a_weight_that_is_not_what_it_said_is_an_error(tmp_path: Path) -> None:
    liar = ir.LazyTensor(lambda: ir.tensor(ramp(64, 63)), ir.DataType.FLOAT, ir.Shape((64, 64)))
    with pytest.raises(VerificationError, match="announce"):
        save_graph(graph_of(w=liar), tmp_path / "m.onnx", external_data="m.data")
    group = LazyGroup(lambda: [ramp(64, 63)], [(ir.DataType.FLOAT, (64, 64))])
    with pytest.raises(VerificationError, match="computed shape"):
        save_graph(graph_of(w=group.tensors[0]), tmp_path / "m.onnx", external_data="m.data")
    assert not list(tmp_path.iterdir())


def test_an_error_while_computing_leaves_the_previous_files(saved: Path) -> None:
    before = {p.name: p.read_bytes() for p in saved.parent.iterdir()}

    def fail() -> ir.TensorProtocol:
        raise RuntimeError("boom")

    model = graph_of(w=ir.LazyTensor(fail, ir.DataType.FLOAT, ir.Shape((64, 64))))
    with pytest.raises(RuntimeError, match="boom"):
        save_graph(model, saved, external_data="model.onnx_data")
    assert {p.name: p.read_bytes() for p in saved.parent.iterdir()} == before


def test_a_file_size_limit_is_an_output_error(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))
    try:
        with pytest.raises(OutputError, match="File too large") as caught:
            save_graph(graph_of(w=ir.tensor(ramp(64, 64))), tmp_path / "m.onnx", external_data="m.data")
        with pytest.raises(OutputError, match="File too large"):
            save_graph(graph_of(w=ir.tensor(ramp(64, 64))), tmp_path / "m.onnx")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.hint
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_an_output_error(tmp_path: Path) -> None:
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", tmp_path], capture_output=True, check=False
    )
    if mount.returncode:
        pytest.skip("mounting a small disk is not permitted here")
    try:
        with pytest.raises(OutputError, match="No space left"):
            save_graph(graph_of(w=ir.tensor(ramp(256, 256))), tmp_path / "m.onnx", external_data="m.data")
        assert not list(tmp_path.iterdir())
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_a_missing_folder_is_an_output_error(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="No such file"):
        save_graph(graph_of(w=ir.tensor(ramp(64, 64))), tmp_path / "none" / "m.onnx", external_data="m.data")


def test_external_data_must_be_a_plain_name(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="plain file name"):
        save_graph(graph_of(w=ir.tensor(ramp(64, 64))), tmp_path / "m.onnx", external_data="../m.data")


@pytest.mark.slow
def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """1 GiB of lazy weights is written, and read back and written again, in less than 400 MiB."""
    script = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_io import *
path = Path({str(tmp_path)!r})
def weight(i):
    return ir.LazyTensor(lambda: ir.tensor(np.full((2048, 2048), i, np.float32)), ir.DataType.FLOAT, shape)
shape = ir.Shape((2048, 2048))
save_graph(graph_of(**{{f"w{{i}}": weight(i) for i in range(64)}}), path / "m.onnx", external_data="m.data")
save_graph(load_graph(path / "m.onnx"), path / "n.onnx", external_data="n.data")
status = Path("/proc/self/status").read_text()  # ru_maxrss would count what the parent had when it forked
print(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 400 * 1024


# Hostile and damaged files.


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(SourceNotFoundError):
        load_graph(tmp_path / "none.onnx")


@pytest.mark.parametrize("keep", [0, 1, 10, 60, 0.5, 0.9, 0.99])
def test_truncated_model(tmp_path: Path, keep: float) -> None:
    path = tmp_path / "m.onnx"
    save_graph(graph_of(w=ir.tensor(ramp(64, 64))), path)
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data)) if keep < 1 and keep else int(keep)])
    with pytest.raises(CorruptFileError):
        load_graph(path)


@given(data=st.binary(max_size=200))
@settings(max_examples=100, deadline=None)
def test_noise_is_not_a_model(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.mktemp("noise") / "m.onnx"
    path.write_bytes(data)
    with pytest.raises(CorruptFileError):
        load_graph(path)


@given(position=st.integers(0, 10**6), byte=st.integers(0, 255))
@settings(max_examples=150, deadline=None)
def test_a_flipped_byte_gives_a_model_or_a_clear_error(
    tmp_path_factory: pytest.TempPathFactory, position: int, byte: int
) -> None:
    folder = tmp_path_factory.mktemp("flip")
    save_graph(graph_of(w=ir.tensor(ramp(64, 64))), folder / "m.onnx", external_data="m.data")
    data = bytearray((folder / "m.onnx").read_bytes())
    data[position % len(data)] = byte
    (folder / "m.onnx").write_bytes(data)
    with contextlib.suppress(OnnxpressError):  # and no other exception
        load_graph(folder / "m.onnx")


@pytest.mark.parametrize("location", ["../model.onnx_data", "/etc/passwd", "sub/../../x", "", "..\\x", "C:\\x"])
def test_external_data_outside_the_folder(saved: Path, location: str) -> None:
    edit(saved, location=location)
    with pytest.raises(UnsafeInputError):
        load_graph(saved)


def test_external_data_through_a_link_out_of_the_folder(saved: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    secret = tmp_path_factory.mktemp("elsewhere") / "secret"
    (saved.parent / "model.onnx_data").rename(secret)
    (saved.parent / "model.onnx_data").symlink_to(secret)
    with pytest.raises(UnsafeInputError, match="symbolic link"):
        load_graph(saved)


def test_a_hub_cache_with_links_to_blobs_is_fine(saved: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    cache = tmp_path_factory.mktemp("cache")
    (cache / "blobs").mkdir()
    (cache / "snapshot").mkdir()
    for name in ("model.onnx", "model.onnx_data"):
        (saved.parent / name).rename(cache / "blobs" / f"hash-{name}")
        (cache / "snapshot" / name).symlink_to(cache / "blobs" / f"hash-{name}")
    weight = load_graph(cache / "snapshot" / "model.onnx").graph.initializers["w"].const_value
    assert weight is not None
    np.testing.assert_array_equal(weight.numpy(), ramp(64, 64))


@pytest.mark.parametrize("entries", [{"offset": "1"}, {"offset": "99999999"}, {"offset": "-4"}])
def test_external_data_beyond_the_file(saved: Path, entries: dict[str, str]) -> None:
    edit(saved, **entries)
    with pytest.raises(CorruptFileError):
        load_graph(saved)


@pytest.mark.parametrize("length", ["1", "99999999", "-1", "x"])
def test_external_length_that_contradicts_the_shape(saved: Path, length: str) -> None:
    edit(saved, length=length)
    with pytest.raises(CorruptFileError):
        load_graph(saved)


def test_missing_and_irregular_external_data(saved: Path) -> None:
    (saved.parent / "model.onnx_data").unlink()
    with pytest.raises(CorruptFileError, match="missing"):
        load_graph(saved)
    os.mkfifo(saved.parent / "model.onnx_data")
    with pytest.raises(UnsafeInputError, match="regular"):
        load_graph(saved)


def test_a_file_that_shrinks_after_loading(saved: Path) -> None:
    weight = load_graph(saved).graph.initializers["w"].const_value
    os.truncate(saved.parent / "model.onnx_data", 100)
    assert weight is not None
    with pytest.raises(CorruptFileError, match="ends inside"):
        weight.numpy()


@pytest.mark.parametrize("dims", [[64, 63], [-64, 64], [2**40, 2**40]])
def test_inline_data_that_contradicts_the_shape(tmp_path: Path, dims: list[int]) -> None:
    path = tmp_path / "m.onnx"
    save_graph(graph_of(w=ir.tensor(ramp(64, 64))), path)
    model = onnx.load(path)
    model.graph.initializer[0].dims[:] = dims
    path.write_bytes(model.SerializeToString())
    with pytest.raises(CorruptFileError, match="shape"):
        load_graph(path)


@pytest.mark.parametrize("data_type", [onnx.TensorProto.UNDEFINED, onnx.TensorProto.STRING, 999])
def test_external_data_of_no_usable_type(saved: Path, data_type: int) -> None:
    model = onnx.load(saved, load_external_data=False)
    model.graph.initializer[0].data_type = data_type
    saved.write_bytes(model.SerializeToString())
    with pytest.raises((CorruptFileError, UnsupportedModelError), match="'w'"):
        load_graph(saved)


def test_typed_fields_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    save_graph(graph_of(w=ir.tensor(ramp(2, 2))), path)
    model = onnx.load(path)
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.float_data.extend([1.0, 2.0, 3.0])
    path.write_bytes(model.SerializeToString())
    with pytest.raises(CorruptFileError, match="3 values"):
        load_graph(path)
    tensor.float_data.append(4.0)
    path.write_bytes(model.SerializeToString())
    assert load_graph(path).graph.initializers["w"].const_value.numpy().tolist() == [[1, 2], [3, 4]]


def test_a_value_that_nothing_defines(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    save_graph(graph_of(w=ir.tensor(ramp(2, 2))), path)
    model = onnx.load(path)
    model.graph.node[0].input[0] = "ghost"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(CorruptFileError, match="ghost"):
        load_graph(path)

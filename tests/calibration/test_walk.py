"""Block by block must be the same as all at once, in memory that does not grow with depth, and survive a kill."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from onnxpress.arrays import Feeds
from onnxpress.calibration.walk import Walk
from onnxpress.errors import BadInputError, UnsupportedModelError
from onnxpress.graph.anatomy import find_products
from onnxpress.graph.io import copy_graph

PROGRAM = Path(__file__).with_name("layered.py")


@pytest.fixture(scope="module")
def tiny() -> ModuleType:
    """`layered.py`, which is also run as a program."""
    spec = importlib.util.spec_from_file_location("layered", PROGRAM)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def at_once(run: Callable[..., Any]) -> Callable[..., dict[str, NDArray[np.float32]]]:
    """What the inputs of all products are when the whole graph is run: real rows only, by name."""

    def observe(model: ir.Model, samples: list[Feeds]) -> dict[str, NDArray[np.float32]]:
        tapped = copy_graph(model)
        names = list(dict.fromkeys(str(product.activation.name) for product in find_products(tapped.graph)))
        values = {str(value.name): value for node in tapped.graph for value in node.outputs}
        tapped.graph.outputs[:] = [values[name] for name in names]
        for value in tapped.graph.outputs:
            value.type, value.shape = ir.TensorType(ir.DataType.FLOAT), None
        parts: dict[str, list[Any]] = {name: [] for name in names}
        for sample in samples:
            for name, array in zip(names, run(tapped, sample), strict=True):
                parts[name].append(array[sample["attention_mask"] != 0])
        return {name: np.concatenate(rows) for name, rows in parts.items()}

    return observe


def walk_rows(tiny: ModuleType, walk: Walk) -> dict[str, NDArray[np.float32]]:
    found = {}
    for step in walk:
        rows = {str(product.activation.name): tiny.Rows() for product in tiny.products(step)}
        step.observe({name: [one] for name, one in rows.items()})
        found |= {name: one.all for name, one in rows.items()}
    return found


@pytest.mark.parametrize("memory", [1 << 20, 0], ids=["memory", "spilled"])
@pytest.mark.parametrize("feed", ["modified", "original"])
@pytest.mark.parametrize("by_product", [False, True])
def test_the_same_as_all_at_once(
    tiny: ModuleType, at_once: Callable[..., Any], feed: Any, memory: int, by_product: bool
) -> None:
    model, samples = tiny.layered(3), tiny.samples()
    walk = Walk(model, samples, feed=feed, memory_bytes=memory, by_product=by_product)
    found = walk_rows(tiny, walk)
    expected = at_once(model, samples)
    assert found.keys() == expected.keys()
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-6, atol=1e-6)
        assert len(found[name]) == sum(int(sample["attention_mask"].sum()) for sample in samples)
    assert walk.reason is None


def test_parts_of_blocks_are_run_once(tiny: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two products a block: looking at what they read runs nothing, only handing on what they make does."""
    runs: list[int] = []
    kept = Walk.run

    def counted(self: Walk, number: int, outputs: Any, receive: Any) -> None:
        given = {str(value.name) for value in self.segments[number].inputs()}
        runs.extend([number] * any(name not in given for name in outputs))
        kept(self, number, outputs, receive)

    monkeypatch.setattr(Walk, "run", counted)
    walk = Walk(tiny.layered(3), tiny.samples(), by_product=True)
    assert [segment.layer for segment in walk.segments] == [None, 0, 0, 1, 1, 2, 2, None]
    walk_rows(tiny, walk)
    assert runs == list(range(7))  # nobody reads what the last one makes


@pytest.mark.parametrize("by_product", [False, True])
def test_blocks_read_what_the_edited_ones_before_them_make(
    tiny: ModuleType, at_once: Callable[..., Any], by_product: bool
) -> None:
    model, samples = tiny.layered(3), tiny.samples()
    seen: dict[str, Any] = {}
    for step in Walk(model, samples, by_product=by_product):
        for product in tiny.products(step):
            if step.segment.layer is None:
                continue
            rows = tiny.Rows()
            step.observe({str(product.activation.name): [rows]})
            seen[product.name] = rows.all
            product.weight.const_value = ir.tensor(product.weight.const_value.numpy() * np.float32(0.5))
    expected = at_once(model, samples)  # all weights halved by now
    for product in find_products(model.graph):
        if product.name in seen:
            np.testing.assert_allclose(seen[product.name], expected[str(product.activation.name)], rtol=1e-5, atol=1e-6)


def test_original_outputs_go_onward_if_asked(tiny: ModuleType, at_once: Callable[..., Any]) -> None:
    model, samples = tiny.layered(3), tiny.samples()
    expected = at_once(model, samples)
    for step in Walk(model, samples, feed="original"):
        for product in tiny.products(step):
            product.weight.const_value = ir.tensor(product.weight.const_value.numpy() * np.float32(0.5))
            rows = tiny.Rows()
            step.observe({str(product.activation.name): [rows]})
            np.testing.assert_allclose(rows.all, expected[str(product.activation.name)], rtol=1e-6, atol=1e-6)


def test_what_is_held_does_not_grow_with_depth(tiny: ModuleType) -> None:
    held = {}
    for depth in (3, 9):
        walk = Walk(tiny.layered(depth), tiny.samples())
        held[depth] = max(len(walk._states.numbers) for step in walk)
    assert held[3] == held[9] <= 3  # the hidden states before and after, the positions


def test_spilled_files_are_gone_afterwards(tiny: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tempfile

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    most = 0
    for _ in Walk(tiny.layered(2), tiny.samples(), memory_bytes=0):
        most = max(most, len(list(tmp_path.rglob("*.npy"))))
    assert most
    assert not list(tmp_path.iterdir())


def test_a_graph_without_layers_is_walked_in_one_step(
    tiny: ModuleType, graph: Callable[..., ir.Model], rng: np.random.Generator
) -> None:
    weights = {f"w{i}": rng.standard_normal((4, 4)).astype(np.float32) for i in range(3)}
    model = graph(
        """
        agraph (float[b, 4] x, float[4, 4] w0, float[4, 4] w1, float[4, 4] w2) => (float[b, 4] y) {
            p = MatMul(x, w0)
            q = MatMul(p, w1)
            y = MatMul(q, w2)
        }
        """,
        **weights,
    )
    samples = [{"x": rng.standard_normal((5, 4)).astype(np.float32)} for _ in range(2)]
    for memory in (1 << 20, 1):  # all values in one run; one value a run
        walk = Walk(model, samples, memory_bytes=memory)
        found = walk_rows(tiny, walk)
        assert walk.reason is not None
        assert "no transformer layers" in walk.reason
        x = np.concatenate([sample["x"] for sample in samples])
        np.testing.assert_allclose(found["x"], x)
        np.testing.assert_allclose(found["q"], x @ weights["w0"] @ weights["w1"], rtol=1e-5, atol=1e-5)


class TestResume:
    DEPTH, FATAL = 5, 3

    def program(self, folder: Path, fatal: int) -> int:
        arguments = [sys.executable, str(PROGRAM), str(folder), str(self.DEPTH), str(fatal)]
        return subprocess.run(arguments, check=False).returncode

    def test_after_a_kill(self, tiny: ModuleType, tmp_path: Path) -> None:
        assert self.program(tmp_path, self.FATAL) == -9
        assert self.program(tmp_path, -1) == 0
        computed = [int(line) for line in (tmp_path / "computed.txt").read_text().split()]
        # Layer 3 was computed before the kill, but not kept; the layers before it are not computed again.
        assert computed == [0, 1, 2, 3, 3, 4]
        # What the two processes found together is what one finds alone.
        resumed = tiny.layered(self.DEPTH)
        tiny.centre(Walk(resumed, tiny.samples(), folder=tmp_path / "walk", method="centre"), lambda layer: 1 / 0)
        alone = tiny.layered(self.DEPTH)
        tiny.centre(Walk(alone, tiny.samples()))
        for name, value in alone.graph.initializers.items():
            assert value.const_value is not None
            found = resumed.graph.initializers[name].const_value
            assert found is not None
            np.testing.assert_array_equal(found.numpy(), value.const_value.numpy())

    @pytest.mark.parametrize("change", ["weight", "sample", "method"])
    def test_not_for_anything_else(self, change: str, tiny: ModuleType, tmp_path: Path) -> None:
        tiny.centre(Walk(tiny.layered(2), tiny.samples(), folder=tmp_path, method="centre"))
        model = tiny.layered(2, seed=int(change == "weight"))
        samples = tiny.samples(seed=int(change == "sample"))
        computed: list[int] = []
        method = "other" if change == "method" else "centre"
        tiny.centre(Walk(model, samples, folder=tmp_path, method=method), computed.append)
        assert computed == [0, 1]

    def test_discard_leaves_nothing(self, tiny: ModuleType, tmp_path: Path) -> None:
        walk = Walk(tiny.layered(2), tiny.samples(), folder=tmp_path / "walk", method="centre")
        tiny.centre(walk)
        assert len(list((tmp_path / "walk").rglob("result_*.bin"))) == 2
        walk.discard()
        assert not list((tmp_path / "walk").iterdir())


class TestRefusals:
    def test_infinite_activations(self, tiny: ModuleType) -> None:
        model = tiny.layered(3)
        weight = model.graph.initializers["model.layers.1.down.weight"]
        assert weight.const_value is not None
        weight.const_value = ir.tensor(np.full_like(weight.const_value.numpy(), np.inf))
        with pytest.raises(BadInputError, match=r"model\.layers\.1: h1 is NaN or infinite in sample 0"):
            list(Walk(model, tiny.samples()))

    def test_what_padding_holds_does_not_matter(self, tiny: ModuleType) -> None:
        model, samples = tiny.layered(2), tiny.samples()
        table = model.graph.initializers["table"]
        assert table.const_value is not None
        array = table.const_value.numpy().copy()
        array[7] = np.nan
        table.const_value = ir.tensor(array)
        for sample in samples:
            sample["input_ids"] = np.where(sample["attention_mask"] == 0, 7, sample["input_ids"] % 7)
        assert all(np.isfinite(rows).all() for rows in walk_rows(tiny, Walk(model, samples)).values())

    @pytest.mark.parametrize(
        ("name", "array", "message"),
        [
            ("input_ids", None, r"sample 1 has no input_ids"),
            ("input_ids", np.zeros((2, 6), np.float32), r"sample 1: input_ids holds float32 numbers"),
            ("input_ids", np.zeros(6, np.int64), r"sample 1: input_ids has the shape \[6\]"),
            ("input_ids", np.zeros((2, 0), np.int64), r"sample 1: input_ids is empty"),
            ("attention_mask", np.ones((2, 7), np.int64), r"attention_mask has sequence_length 7; input_ids has 6"),
        ],
    )
    def test_samples_that_do_not_fit(self, tiny: ModuleType, name: str, array: Any, message: str) -> None:
        samples = tiny.samples()
        samples[1] = {key: value for key, value in samples[1].items() if key != name}
        if array is not None:
            samples[1][name] = array
        with pytest.raises(BadInputError, match=message):
            Walk(tiny.layered(2), samples)

    def test_no_samples(self, tiny: ModuleType) -> None:
        with pytest.raises(BadInputError, match="no samples"):
            Walk(tiny.layered(2), [])

    def test_words_that_the_model_does_not_know(self, tiny: ModuleType) -> None:
        samples = tiny.samples()
        samples[2]["input_ids"][0, 0] = tiny.WORDS
        with pytest.raises(BadInputError, match=r"before model\.layers cannot run on sample 2"):
            list(Walk(tiny.layered(2), samples))

    def test_padding_that_an_activation_does_not_show(self, graph: Callable[..., ir.Model]) -> None:
        model = graph(
            """
            agraph (float[b, n] input_values, int64[b, n] attention_mask, float[1, 1] w) => (float[b, m, 1] y) {
                s = Constant <value_ints = [2, -1, 1]> ()
                c = Reshape (input_values, s)
                y = MatMul (c, w)
            }
            """,
            w=np.ones((1, 1), np.float32),
        )
        sample = {"input_values": np.zeros((1, 8), np.float32), "attention_mask": np.array([[1] * 7 + [0]])}
        with pytest.raises(UnsupportedModelError, match="cannot tell which rows of c"):
            for step in Walk(model, [sample]):
                step.observe({"c": []})

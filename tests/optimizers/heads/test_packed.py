"""Packed projections apart and together again; heads reduced in between, against silent heads that go."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from onnxpress.arrays import Array
from onnxpress.artifact.artifact import Source
from onnxpress.calibration.calibration import Calibration
from onnxpress.errors import UnsupportedModelError
from onnxpress.graph.anatomy import anatomy_of
from onnxpress.graph.io import copy_graph
from onnxpress.optimizers.base import Context
from onnxpress.optimizers.fusion.pack_projections import PackProjections
from onnxpress.optimizers.heads.packed import packed_columns, unpacked
from onnxpress.optimizers.heads.reduce_heads import ReduceHeads
from onnxpress.optimizers.heads.sites import HeadSite, pack_weights, site_of

Run = Callable[..., list[Array]]
Tiny = Callable[[str], ir.Model]
PACKED = ["gpt2", "phi3", "gpt_neox", "falcon", "modernbert", "llama"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """`tiny("gpt2")`: a graph of our exporter; Llama's is packed by our own pass."""
    from onnxpress.exporter import architectures
    from onnxpress.exporter.export import export
    from onnxpress.exporter.sources.checkpoint import load_folder

    known: dict[str, ir.Model] = {}

    def graph(name: str) -> ir.Model:
        if name not in known:
            folder = tmp_path_factory.mktemp(name)
            architectures.tiny_model(name, folder)
            task = architectures.catalog()[name]["task"]
            known[name] = export(load_folder(folder, Source(name, "folder")), task=task, remember=False).graphs["model"]
            if name == "llama":
                assert PackProjections()(known[name]).report.matched
        return copy_graph(known[name])

    return graph


@contextmanager
def apart(model: ir.Model) -> Iterator[list[HeadSite]]:
    with unpacked(model, [(block, one) for block in anatomy_of(model).blocks for one in block.attentions]):
        yield [site_of(block, one) for block in anatomy_of(model).blocks for one in block.attentions]


def sizes(model: ir.Model) -> set[tuple[Any, ...]]:
    every = [one for block in anatomy_of(model).blocks for one in block.attentions]
    assert all(one.packed for one in every)
    return {(one.heads, one.kv_heads, one.head_dim) for one in every}


def feeds(model: ir.Model, seed: int, empty_cache: bool = True) -> dict[str, Array]:
    ids = np.random.default_rng(seed).integers(3, 100, (2, 11))
    found: dict[str, Array] = {}
    for value in model.graph.inputs:
        assert value.shape is not None
        if str(value.name).startswith("past") and empty_cache:
            found[str(value.name)] = np.zeros((2, value.shape[1], 0, value.shape[3]), np.float32)  # type: ignore[arg-type]
        elif not str(value.name).startswith("past"):
            found[str(value.name)] = ids if value.name == "input_ids" else np.ones_like(ids)
    return found


def reduce(model: ir.Model, **options: Any) -> ReduceHeads:
    one = ReduceHeads(**options)
    context = Context(Calibration([feeds(model, seed, empty_cache=False) for seed in range(6)]))
    assert one.run(model, context).report.matched
    return one


@pytest.mark.parametrize("name", PACKED)
def test_apart_and_together_again_nothing_changes(tiny: Tiny, run: Run, name: str) -> None:
    model, original = tiny(name), tiny(name)
    given = feeds(model, 1)
    (expected, *_) = run(original, given)
    with apart(model) as sites:
        assert all(len(one.attention.products) == 4 for one in sites)
        np.testing.assert_allclose(run(model, given)[0], expected, atol=1e-5)
    np.testing.assert_allclose(run(model, given)[0], expected, atol=1e-5)
    before, after = (
        {product.name: one for block in anatomy_of(one).blocks for product in block.products}
        for one in (original, model)
    )
    assert list(before) == list(after)
    for name in before:
        weight, same = (one.graph.initializers[name].const_value for one in (original, model))
        np.testing.assert_array_equal(weight.numpy(), same.numpy())  # type: ignore[union-attr]
    again = copy_graph(model)
    with apart(again):
        pass
    assert set(again.graph.initializers) == set(model.graph.initializers)


@pytest.mark.parametrize("name", PACKED)
def test_silent_heads_go_and_nothing_changes(tiny: Tiny, run: Run, name: str) -> None:
    """And what is left is packed again under its name."""
    model = tiny(name)
    ((_, kv_heads, head_dim),) = sizes(model)
    with apart(model) as sites:
        for one in sites:
            weights = one.read()
            weights.output[[0, 3]] = 0
            one.write({key: ir.tensor(array) for key, array in pack_weights(one, weights).items()})
    reduced = copy_graph(model)
    reduce(reduced, heads=2)
    assert sizes(reduced) == {(2, min(kv_heads, 2), head_dim)}
    names = [[str(one.name) for one in block.products] for block in anatomy_of(model).blocks]
    assert [[str(one.name) for one in block.products] for block in anatomy_of(reduced).blocks] == names
    expected = run(model, feeds(model, 9))[0]
    np.testing.assert_allclose(run(reduced, feeds(reduced, 9))[0], expected, atol=2e-4)


def test_one_layer_by_the_name_of_its_packed_weight(tiny: Tiny, run: Run) -> None:
    model = tiny("gpt2")
    reduce(model, ratio=0.5, include=["transformer.h.1.attn.c_attn.weight"])
    every = [block.attentions[0] for block in anatomy_of(model).blocks]
    assert [one.heads for one in every] == [4, 2, 4, 4]
    assert [one.query.features[1] for one in every] == [192, 96, 192, 192]
    assert np.isfinite(run(model, feeds(model, 3))[0]).all()


@pytest.mark.parametrize("name", ["falcon", "phi3"])
def test_merged_and_narrowed_heads_are_those_of_the_model_with_products_apart(tiny: Tiny, run: Run, name: str) -> None:
    """The same reduction of the packed model and of one whose products were apart before."""
    packed, plain = tiny(name), tiny(name)
    with apart(plain):
        loose = copy_graph(plain)
    for model in (packed, loose):
        reduce(model, heads=4, kv_heads=1)
    assert sizes(packed) == {(4, 1, 16)}
    given = feeds(packed, 4)
    np.testing.assert_allclose(run(packed, given)[0], run(loose, given)[0], atol=1e-4)


def test_by_group_is_how_falcon_packs() -> None:
    """As its `_split_heads` views the output, [kv_heads, group + 2, head_dim]."""
    features = np.arange(2 * 4 * 3).reshape(2, 4, 3)
    query, key, value = packed_columns((4, 2, 3), by_group=True)
    np.testing.assert_array_equal(query, features[:, :-2].ravel())
    np.testing.assert_array_equal(key, features[:, [-2]].ravel())
    np.testing.assert_array_equal(value, features[:, [-1]].ravel())


def test_an_order_of_another_kind_is_refused(tiny: Tiny) -> None:
    model = tiny("gpt2")
    split = next(node for node in model.graph if node.op_type == "Split")
    value = split.outputs[0]
    order = ir.node("Gather", [value, _numbers(model, np.arange(64)[::-1])], {"axis": 2})
    for user, index in list(value.uses()):
        user.replace_input_with(index, order.outputs[0])
    order.replace_input_with(0, value)
    model.graph.insert_after(split, order)
    weights = set(model.graph.initializers)
    with pytest.raises(UnsupportedModelError, match=r"packed in transformer.h.0.attn.c_attn.weight in an order that"):
        reduce(model, heads=2)
    assert set(model.graph.initializers) == weights


def _numbers(model: ir.Model, numbers: Array) -> ir.Value:
    value = ir.Value(name="numbers", const_value=ir.tensor(np.ascontiguousarray(numbers)))
    model.graph.register_initializer(value)
    return value

"""What gets a format of its own: products that share an input or a weight, nothing else."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from onnxpress.graph.tensors import ViewTensor
from onnxpress.search.formats import constant_bytes, run_part
from onnxpress.search.groups import find_groups, part_model


def test_products_of_one_input_and_a_tied_head_are_one_group(model: ir.Model) -> None:
    groups = find_groups(model.graph)
    assert [group.weights for group in groups] == [
        ("layers.0.gate", "layers.0.up"),
        ("layers.0.down",),
        ("layers.1.gate", "layers.1.up"),
        ("layers.1.down",),
        ("embed",),
    ]
    tied = groups[-1]
    assert (tied.inputs, tied.outputs) == (("input_ids", "s1"), ("h", "logits"))
    assert (tied.shapes, tied.table, tied.parameters) == (((64, 200),), (200, 64), 200 * 64)
    assert groups[0].shapes == ((64, 96), (64, 96))
    assert sum(group.parameters for group in groups) == 200 * 64 + 2 * 3 * 64 * 96, "every weight is in one group"


def test_a_product_too_small_for_any_pass_is_in_no_group(model: ir.Model) -> None:
    weight = model.graph.initializers["layers.1.down"]
    weight.const_value = ir.tensor(np.zeros((96, 31), np.float32), name=weight.name)
    assert ("layers.1.down",) not in [group.weights for group in find_groups(model.graph)]


def test_a_unit_alone_computes_what_it_computes_in_the_graph(model: ir.Model) -> None:
    group = find_groups(model.graph)[0]
    part = part_model(model, group)
    assert {value.name for value in part.graph.inputs} == set(group.inputs)
    (x,) = part.graph.inputs
    assert x.shape is not None
    assert [size if isinstance(size, int) else None for size in x.shape] == [None, None, 64], "passes need the rank"
    value = np.random.default_rng(0).standard_normal((2, 5, 64)).astype(np.float32)
    (found,) = run_part(part, [{group.inputs[0]: value}], {}).outputs
    for output, name in zip(group.outputs, group.weights, strict=True):
        weight = model.graph.initializers[name].const_value
        assert weight is not None
        np.testing.assert_allclose(found[output], value @ weight.numpy(), rtol=1e-4, atol=1e-4)


def test_codes_that_are_only_seen_in_another_shape_weigh_what_the_file_holds(model: ir.Model) -> None:
    """The codes of a lookup table are views; with a tied head, so is what the head reads."""
    codes = ir.tensor(np.zeros((200, 2, 16), np.uint8), name="codes")
    graph = model.graph
    before = constant_bytes(model)
    for name in ("rows", "columns"):
        view = ir.Value(name=name, const_value=ViewTensor(codes, (200, 32), name=name))
        graph.register_initializer(view)
    assert constant_bytes(model) == before + 200 * 32

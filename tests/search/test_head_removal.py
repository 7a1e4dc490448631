"""Losses of one attention without one head: what the model with that head's rows of the output product zeroed loses."""

from __future__ import annotations

import onnx_ir as ir
import pytest

from onnxpress.errors import UnsupportedModelError
from onnxpress.graph.io import copy_graph
from onnxpress.search.head_removal import AttentionOutput, find_attention_outputs, without_heads
from onnxpress.search.sensitivity import Measurement, TrialInputs, measure_parts

from .conftest import Exported, language_model, lost, samples_of

HEADS, SIZE = 4, 16
"""Of each attention of the tiny models."""


def measured(model: ir.Model, samples: TrialInputs) -> dict[tuple[str, str], Measurement]:
    found = find_attention_outputs(model)
    rows = measure_parts(model, [], [], samples, others=found, cuts=without_heads(found), session_options={})
    return {(row.part, row.format): row for row in rows if row.format != "float32"}


def true_loss(model: ir.Model, weight: str, head: int, samples: TrialInputs) -> float:
    """KL, or 1 − cosine, with these rows of W [in, out] zero; W is transposed where the graph holds it as [out, in]."""
    changed = copy_graph(model)
    value = changed.graph.initializers[weight]
    assert value.const_value is not None
    array = value.const_value.numpy().copy()
    (user,) = value.consumers()
    transposed = user.op_type == "Transpose" or bool(user.attributes.get_int("transB", 0))
    (array.T if transposed else array)[SIZE * head : SIZE * (head + 1)] = 0.0
    value.const_value = ir.tensor(array, name=weight)
    return lost(model, changed, samples)


@pytest.mark.parametrize(
    ("name", "stem", "attentions"),
    [("llama", "model", 1), ("gpt2", "model", 1), ("bert", "model", 1), ("t5", "decoder_model", 2)],
)
def test_losses_are_those_of_the_model_without_that_head(
    exported: Exported, name: str, stem: str, attentions: int
) -> None:
    """GPT-2's projections are packed, and T5's decoder has cross-attention, whose heads no pass reduces."""
    model = exported(name, stem)
    samples = samples_of(model)
    found = measured(model, samples)
    groups = list(dict.fromkeys(group for group, _ in found))
    assert len(groups) % attentions == 0
    assert len(found) == HEADS * len(groups)
    for group in groups[-attentions:]:
        for head in range(HEADS):
            row = found[group, f"head {head}"]
            assert row.measured
            expected = true_loss(model, f"{group}.weight", head, samples)
            assert row.loss == pytest.approx(expected, rel=0.02, abs=2e-6), (group, head)
    assert max(row.loss for row in found.values()) > 1e-4, "above what rounding explains"


def test_an_attention_with_fewer_heads_has_fewer_to_lose(exported: Exported) -> None:
    model = exported("llama")
    few, many = (
        AttentionOutput(one.name, one.weights, one.inputs, one.outputs, one.shape, heads)
        for one, heads in zip(find_attention_outputs(model)[:2], (2, 4), strict=True)
    )
    rows = measure_parts(
        model, [], [], samples_of(model), others=[few, many], cuts=without_heads([few, many]), session_options={}
    )
    assert [row.format for row in rows if row.part == few.name] == ["float32", "head 0", "head 1"]
    assert [row.format for row in rows if row.part == many.name][1:] == [f"head {head}" for head in range(4)]


def test_without_attention_there_are_no_heads() -> None:
    with pytest.raises(UnsupportedModelError, match="how many heads"):
        find_attention_outputs(language_model())

"""trim-vocabulary: the logits of the kept tokens, as they were; and graphs that it refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from onnxpress.errors import UnsupportedModelError, UsageError
from onnxpress.graph.anatomy import anatomy_of
from onnxpress.graph.report import Report
from onnxpress.optimizers.base import PassResult
from onnxpress.optimizers.pruning.trim_vocabulary import TrimVocabulary, keep_tokens
from onnxpress.optimizers.quantization.quantize_embedding import QuantizeEmbedding

Exported = Callable[..., ir.Model]
Run = Callable[..., list[np.ndarray]]

SIZES = {"batch": 2, "batch_size": 2, "sequence": 5, "sequence_length": 5, "total": 5}
TYPES = {ir.DataType.INT64: np.int64, ir.DataType.FLOAT: np.float32}


def trim(kept: Any) -> Callable[[ir.Model], PassResult]:
    """What the pass does to a graph once it is known which tokens are kept."""

    def run(model: ir.Model) -> PassResult:
        report = Report()
        keep_tokens(model, np.array(kept, np.int64), report)
        return PassResult(model, modified=bool(report.matched), report=report)

    return run


def rows_of(model: ir.Model) -> int:
    table = next(table for table in anatomy_of(model).embeddings if table.node.inputs[1].name == "input_ids")
    return int(table.weight.shape[0])  # type: ignore[index, arg-type]


def feeds(model: ir.Model, ids: np.ndarray) -> dict[str, np.ndarray]:
    """A prompt; a graph that takes a cache gets an empty one, encoder states are random."""
    found: dict[str, np.ndarray] = {}
    for value in model.graph.inputs:
        name, shape = str(value.name), list(value.shape or ())
        if name == "input_ids":
            found[name] = ids
        elif "mask" in name:
            found[name] = np.ones_like(ids)
        elif name == "position_ids":
            found[name] = np.broadcast_to(np.arange(ids.shape[1]), ids.shape).copy()
        elif "type" in name:
            found[name] = np.zeros_like(ids)
        elif name.startswith("past_key_values"):
            found[name] = np.zeros((len(ids), int(shape[1]), 0, int(shape[3])), np.float32)
        else:
            found[name] = np.random.default_rng(0).standard_normal((*ids.shape, int(shape[-1]))).astype(np.float32)
    return found


@pytest.mark.parametrize(
    ("name", "stem", "head"),
    [
        ("llama", "model", 1),
        ("gpt2", "model", 1),
        ("bert", "model", 0),
        ("t5", "encoder_model", 0),
        ("t5", "decoder_model", 1),
    ],
)
def test_what_the_kept_tokens_give_does_not_change(
    exported: Exported, run: Run, rng: np.random.Generator, name: str, stem: str, head: int
) -> None:
    model = exported(name, stem)
    size = rows_of(model)
    kept = np.sort(rng.choice(size, size // 2, replace=False))
    ids = rng.integers(0, len(kept), (2, 5))
    before = run(model, feeds(model, kept[ids]))
    inputs = [(value.name, value.shape) for value in model.graph.inputs]
    report = trim(kept)(model).report  # type: ignore[attr-defined]
    assert report.matched == {"embedding": 1, **({"head": 1} if head else {})}
    after = run(model, feeds(model, ids))
    for value, got, want in zip(model.graph.outputs, after, before, strict=True):
        expected = want[..., kept] if value.name == "logits" else want
        np.testing.assert_allclose(got, expected, atol=1e-5)
        if value.name == "logits":
            assert value.shape is not None
            assert value.shape[-1] == len(kept)
    assert [(value.name, value.shape) for value in model.graph.inputs] == inputs
    assert rows_of(model) == len(kept)


def test_a_tied_table_stays_one(exported: Exported) -> None:
    model = exported("gpt2")
    assert anatomy_of(model).tied
    count = len(model.graph.initializers)
    trim(range(0, 40, 2))(model)
    assert anatomy_of(model).tied
    assert len(model.graph.initializers) == count


def test_nothing_is_read_before_it_is_written(exported: Exported) -> None:
    model = exported("llama")
    trim([0, 1, 2, 9])(model)
    table = next(table for table in anatomy_of(model).embeddings)
    tensor = table.weight.const_value
    assert isinstance(tensor, ir.LazyTensor)
    whole = tensor.numpy()
    np.testing.assert_array_equal(tensor.rows(1, 3), whole[1:3])  # type: ignore[attr-defined]


def test_all_tokens_kept_is_nothing_to_do(exported: Exported, listing: Callable[[ir.Model], str]) -> None:
    model = exported("llama")
    before = listing(model)
    report = trim(range(rows_of(model)))(model).report  # type: ignore[attr-defined]
    assert not report.matched
    assert report.skipped == {"all tokens are kept": 1}
    assert listing(model) == before


PADDED = """g (int64[B, S] input_ids, float[60, 8] a__weight, float[8, 8] model__layers__0__w__weight,
    float[8] norm__weight, float[60] b)
    => (float[B, S, 60] logits, bool[B, S] real) {
        pad = Constant<value = int64 {30}>()
        same = Equal(input_ids, pad)  real = Not(same)
        x = Gather(a__weight, input_ids)  y = MatMul(x, model__layers__0__w__weight)
        t = Transpose<perm = [1, 0]>(a__weight)  n = LayerNormalization(y, norm__weight)
        z = MatMul(n, t)  logits = Add(z, b) }"""


@pytest.fixture
def padded(graph: Callable[..., ir.Model], rng: np.random.Generator) -> ir.Model:
    shapes = {"a__weight": (60, 8), "model__layers__0__w__weight": (8, 8), "norm__weight": (8,), "b": (60,)}
    weights = {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}
    return graph(PADDED, **weights)


def test_ids_in_the_graph_and_the_bias_of_a_tied_head_follow(
    padded: ir.Model, run: Run, rng: np.random.Generator
) -> None:
    kept = np.array([0, 3, 30, 31, 59])
    ids = rng.integers(0, 5, (2, 7))
    logits, real = run(padded, {"input_ids": kept[ids]})
    trim(kept)(padded)
    after, still = run(padded, {"input_ids": ids})
    np.testing.assert_allclose(after, logits[..., kept], atol=1e-5)
    np.testing.assert_array_equal(real, still)


def test_refusals(padded: ir.Model, exported: Exported) -> None:
    with pytest.raises(UnsupportedModelError, match="looks for token 30, which is not kept"):
        trim([0, 1, 2])(padded)
    with pytest.raises(UnsupportedModelError, match="has 60 rows; token 60 has none"):
        trim([0, 60])(padded)
    with pytest.raises(UsageError, match="in a build only"):
        TrimVocabulary(scripts=["latin"])(padded)
    quantized = exported("llama")
    QuantizeEmbedding(block_size=16, min_rows=1)(quantized)
    with pytest.raises(UnsupportedModelError, match="not in floating point") as error:
        trim([0, 1, 2])(quantized)
    assert error.value.hint is not None


def test_ids_that_are_computed_with_are_refused(graph: Callable[..., ir.Model], rng: np.random.Generator) -> None:
    text = PADDED.replace("same = Equal(input_ids, pad)", "two = Mul(input_ids, pad) same = Equal(two, pad)")
    shapes = {"a__weight": (60, 8), "model__layers__0__w__weight": (8, 8), "norm__weight": (8,), "b": (60,)}
    model = graph(text, **{name: rng.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()})
    with pytest.raises(UnsupportedModelError, match="computes with token ids: Mul"):
        trim([0, 30])(model)


@pytest.mark.parametrize("options", [{}, {"scripts": []}, {"tokens": 0}, {"tokens": 9, "multiple_of": 0}])
def test_options(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"give|empty|1 or more"):
        TrimVocabulary(**options)

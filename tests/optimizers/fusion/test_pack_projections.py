from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx_ir.passes import common

from onnxpress.errors import UsageError
from onnxpress.graph.tensors import RowTensor, concatenate_tensors
from onnxpress.optimizers.fusion.pack_projections import PackProjections

LAYER = "model__layers__0__"


def attention(bias: bool, extra: str = "") -> str:
    """A cached attention of 2 heads and 1 key/value head of size 8, on a hidden size of 16."""
    sizes = {"q": 16, "k": 8, "v": 8}
    weights = "".join(f", float[16, {n}] {LAYER}self_attn__{x}_proj__weight" for x, n in sizes.items())
    products = "\n".join(
        f"{x}0 = MatMul(h, {LAYER}self_attn__{x}_proj__weight)\n"
        + (f"{x} = Add({x}0, {LAYER}self_attn__{x}_proj__bias)" if bias else f"{x} = Identity({x}0)")
        for x in "qkv"
    )
    if bias:
        weights += "".join(f", float[{n}] {LAYER}self_attn__{x}_proj__bias" for x, n in sizes.items())
    return f"""g (float[B, S, 16] h, float[B, 1, P, 8] past_key, float[B, 1, P, 8] past_value, int32[B] last,
               int32 total{weights})
          => (float[B, S, 16] y, float[B, 1, T, 8] key, float[B, 1, T, 8] value{extra and ", float[B, S, 8] z"}) {{
            {products}
            y, key, value = com.microsoft.GroupQueryAttention<num_heads=2, kv_num_heads=1>(
                q, k, v, past_key, past_value, last, total)
            {extra}
        }}"""


@pytest.fixture
def feeds(rng: np.random.Generator) -> dict[str, np.ndarray]:
    return {
        "h": rng.standard_normal((1, 3, 16), dtype=np.float32),
        "past_key": rng.standard_normal((1, 1, 4, 8), dtype=np.float32),
        "past_value": rng.standard_normal((1, 1, 4, 8), dtype=np.float32),
        "last": np.full(1, 6, np.int32),
        "total": np.array(7, np.int32),
    }


def weights(rng: np.random.Generator, bias: bool) -> dict[str, np.ndarray]:
    made = {}
    for x, n in {"q": 16, "k": 8, "v": 8}.items():
        made[f"{LAYER}self_attn__{x}_proj__weight"] = rng.standard_normal((16, n), dtype=np.float32)
        if bias:
            made[f"{LAYER}self_attn__{x}_proj__bias"] = rng.standard_normal(n, dtype=np.float32)
    return made


def without_identities(model: ir.Model) -> ir.Model:
    common.IdentityEliminationPass()(model)
    return model


@pytest.mark.parametrize("bias", [False, True])
def test_group_query_attention_takes_the_packed_product(
    graph: Any, check: Any, rng: np.random.Generator, feeds: Any, bias: bool
) -> None:
    model = without_identities(graph(attention(bias), **weights(rng, bias)))
    packed = "model.layers.0.self_attn.qkv_proj"
    result = f"{packed}.Add.output" if bias else f"{packed}.MatMul.output"
    product = f"{packed}.MatMul.output = MatMul(h, {packed}.weight)"
    added = f"{packed}.Add.output = Add({packed}.MatMul.output, {packed}.bias)"
    done = check(
        PackProjections(),
        model,
        feeds,
        golden="\n".join(
            [
                product,
                *([added] if bias else []),
                f"y, key, value = GroupQueryAttention[kv_num_heads=1, num_heads=2]({result}, , , past_key, past_value, "
                "last, total)",
            ]
        ),
    )
    assert done.result.report.matched == {"packed attention": 1}
    assert f"{packed}.weight" in done.model.graph.initializers
    assert len(done.model.graph.initializers) == 1 + bias


def test_a_key_that_is_read_elsewhere_needs_a_split(
    graph: Any, check: Any, rng: np.random.Generator, feeds: Any
) -> None:
    model = without_identities(graph(attention(False, extra="z = Exp(k)"), **weights(rng, False)))
    done = check(PackProjections("all"), model, feeds, tolerance=1e-3)
    assert done.result.report.matched == {"packed products": 1}
    assert "q0, k0, v0 = Split[axis=-1]" in done.listing


def mlp(inputs: str = "h, h", weights: str = "float[16, 24] {0}, float[16, 24] {1}") -> str:
    first, second = inputs.split(", ")
    names = [f"{LAYER}mlp__{x}_proj__weight" for x in ("gate", "up")]
    return f"""g (float[B, S, 16] h, float[B, S, 16] e, {weights.format(*names)}) => (float[B, S, 24] y) {{
        a = MatMul({first}, {names[0]})
        s = Sigmoid(a)
        b = MatMul({second}, {names[1]})
        y = Mul(s, b)
    }}"""


def gate_up(rng: np.random.Generator) -> dict[str, np.ndarray]:
    return {
        f"{LAYER}mlp__{x}_proj__weight": rng.standard_normal((16, 24), dtype=np.float32) / 4 for x in ("gate", "up")
    }


def test_gate_and_up(graph: Any, check: Any, rng: np.random.Generator) -> None:
    feeds = {name: rng.standard_normal((2, 3, 16), dtype=np.float32) for name in "he"}
    done = check(
        PackProjections("all"),
        graph(mlp(), **gate_up(rng)),
        feeds,
        golden="""
            model.layers.0.mlp.gate_up_proj.MatMul.output = MatMul(h, model.layers.0.mlp.gate_up_proj.weight)
            a, b = Split[axis=-1](model.layers.0.mlp.gate_up_proj.MatMul.output, model.layers.0.mlp.gate_up_proj.MatMul.output.widths)
            s = Sigmoid(a)
            y = Mul(s, b)
        """,  # noqa: E501
    )
    assert not PackProjections()(graph(mlp(), **gate_up(rng))).modified
    assert done.result.report.matched == {"packed products": 1}


def test_outputs_of_the_graph_keep_their_names(graph: Any, check: Any, rng: np.random.Generator) -> None:
    model = graph(
        """g (float[B, 4] x, float[4, 3] a, float[4, 5] b) => (float[B, 3] y, float[B, 5] z) {
            y = MatMul(x, a)
            z = MatMul(x, b)
        }""",
        a=rng.standard_normal((4, 3), dtype=np.float32),
        b=rng.standard_normal((4, 5), dtype=np.float32),
    )
    done = check(PackProjections("all"), model, {"x": np.ones((2, 4), np.float32)})
    assert list(done.model.graph.initializers) == ["a_b", "a_b.MatMul.output.widths"]


def test_different_inputs_and_modules_stay_apart(graph: Any, rng: np.random.Generator) -> None:
    assert not PackProjections("all")(graph(mlp("h, e"), **gate_up(rng))).modified
    model = graph(mlp(), **gate_up(rng))
    model.graph.initializers["model.layers.0.mlp.up_proj.weight"].name = "model.layers.0.self_attn.up_proj.weight"
    assert not PackProjections("all")(model).modified


def test_a_shared_weight_is_left_alone(graph: Any, rng: np.random.Generator) -> None:
    model = graph(mlp(), **gate_up(rng))
    gate = model.graph.initializers["model.layers.0.mlp.gate_proj.weight"]
    extra = ir.node("Exp", [gate])
    model.graph.append(extra)
    assert PackProjections("all")(model).report.skipped == {"weight is shared with another node": 1}


def test_lazy_weights_stay_lazy(graph: Any) -> None:
    def never(start: int, stop: int) -> np.ndarray:
        raise AssertionError("computed")

    names = [f"{LAYER}mlp__{x}_proj__weight" for x in ("gate", "up")]
    tensors = {name: RowTensor(never, ir.DataType.FLOAT, (16, 24)) for name in names}
    model = graph(mlp(), **tensors)
    assert PackProjections("all")(model).modified
    packed = model.graph.initializers["model.layers.0.mlp.gate_up_proj.weight"].const_value
    assert isinstance(packed, RowTensor)
    assert list(packed.shape) == [16, 48]


@pytest.mark.parametrize("rowwise", [False, True])
def test_concatenate(rng: np.random.Generator, rowwise: bool) -> None:
    arrays = [rng.standard_normal((5, n), dtype=np.float32) for n in (2, 3)]
    tensors = [
        RowTensor(lambda a, b, x=x: x[a:b], ir.DataType.FLOAT, x.shape) if rowwise else ir.tensor(x) for x in arrays
    ]
    whole = concatenate_tensors(tensors, axis=1)
    assert isinstance(whole, RowTensor) == rowwise
    np.testing.assert_array_equal(whole.numpy(), np.concatenate(arrays, 1))


def test_unknown_option() -> None:
    with pytest.raises(UsageError, match="none of"):
        PackProjections("everything")


@given(widths=st.lists(st.integers(1, 9), min_size=2, max_size=4), bias=st.booleans(), depth=st.integers(1, 7))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_siblings(
    graph: Any, check: Any, rng: np.random.Generator, widths: list[int], bias: bool, depth: int
) -> None:
    weights = {f"m__w{i}__weight": rng.standard_normal((depth, n), dtype=np.float32) for i, n in enumerate(widths)}
    if bias:
        weights |= {f"m__w{i}__bias": rng.standard_normal(n, dtype=np.float32) for i, n in enumerate(widths)}
    declared = ", ".join(f"float[{', '.join(map(str, w.shape))}] {name}" for name, w in weights.items())
    outputs = ", ".join(f"float[B, {n}] y{i}" for i, n in enumerate(widths))
    body = " ".join(
        f"p{i} = MatMul(x, m__w{i}__weight) y{i} = Add(p{i}, m__w{i}__bias)"
        if bias
        else f"y{i} = MatMul(x, m__w{i}__weight)"
        for i in range(len(widths))
    )
    model = graph(f"g (float[B, {depth}] x, {declared}) => ({outputs}) {{ {body} }}", **weights)
    done = check(PackProjections("all"), model, {"x": rng.standard_normal((3, depth), dtype=np.float32)})
    assert done.result.report.matched == {"packed products": 1}


def test_weights_on_different_grids_can_be_kept_apart(graph: Any, rng: np.random.Generator) -> None:
    """A .gguf often has values in more bits than queries and keys; with one kind it makes no difference."""
    text = f"""g (
        float[M, 64] x, float[64, 16] {LAYER}mlp__gate_proj__weight, float[64, 16] {LAYER}mlp__up_proj__weight
    ) => (float[M, 16] y, float[M, 16] z) {{
        y = MatMul(x, {LAYER}mlp__gate_proj__weight)  z = MatMul(x, {LAYER}mlp__up_proj__weight) }}"""
    whole = rng.integers(-8, 8, (64, 16)).astype(np.float32)
    whole[::32] = -8
    eight = rng.integers(-127, 128, (64, 16)).astype(np.float32)
    eight[::32] = 127
    names = [f"{LAYER}mlp__{name}_proj__weight" for name in ("gate", "up")]

    def pack(*weights: np.ndarray, **options: bool) -> Any:
        model = graph(text, **dict(zip(names, weights, strict=True)))
        return PackProjections("split", **options)(model).report  # type: ignore[attr-defined]

    assert pack(whole, eight, one_grid=True).skipped == {"weights on different grids": 1}
    assert pack(whole, whole * 2, one_grid=True).matched == {"packed products": 1}
    assert pack(whole, eight).matched == {"packed products": 1}

"""The map from graphs to transformers: our exports of many architectures, at every stage, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from onnxpress.errors import UnsupportedModelError
from onnxpress.graph.anatomy import Product, anatomy_of, split_layers
from onnxpress.graph.anatomy.layers import TORCH_SCOPES
from onnxpress.graph.anatomy.products import find_products
from onnxpress.graph.io import copy_graph
from onnxpress.optimizers import recipe


def leaf(product: Product | None) -> str | None:
    """`q_proj` of `model.layers.0.self_attn.q_proj.weight.q8b32`."""
    return None if product is None else product.name.split(".weight")[0].split(".")[-1]


# stem, blocks, heads, kv heads, head_dim; q k v o; gate up down; tied head
EXPECTED: dict[tuple[str, str], tuple[Any, ...]] = {
    ("llama", "model"): (4, 4, 2, 16, "q_proj k_proj v_proj o_proj", "gate_proj up_proj down_proj", True),
    ("phi3", "model"): (4, 4, 2, 16, "qkv_proj qkv_proj qkv_proj o_proj", "gate_up_proj gate_up_proj down_proj", False),
    ("gpt2", "model"): (4, 4, 4, 16, "c_attn c_attn c_attn c_proj", "None c_fc c_proj", True),
    ("gemma2", "model"): (4, 4, 2, 16, "q_proj k_proj v_proj o_proj", "gate_proj up_proj down_proj", True),
    ("falcon", "model"): (
        *(4, 4, 2, 16, "query_key_value query_key_value query_key_value dense"),
        *("None dense_h_to_4h dense_4h_to_h", True),
    ),
    ("granite", "model"): (4, 4, 2, 16, "q_proj k_proj v_proj o_proj", "gate_proj up_proj down_proj", False),
    ("bert", "model"): (4, 4, 4, 16, "query key value dense", "None dense dense", None),
    ("vit", "model"): (4, 4, 4, 16, "q_proj k_proj v_proj o_proj", "None fc1 fc2", False),
    ("t5", "encoder_model"): (4, 4, 4, 16, "q k v o", "None wi wo", None),
    ("t5", "decoder_model"): (4, 4, 4, 16, "q k v o", "None wi wo", True),
}


@pytest.mark.parametrize(("name", "stem"), EXPECTED)
def test_roles(name: str, stem: str, exported: Callable[..., ir.Model]) -> None:
    blocks, heads, kv_heads, head_dim, attention, feed_forward, tied = EXPECTED[name, stem]
    anatomy = anatomy_of(exported(name, stem))
    assert len(anatomy.blocks) == blocks
    for block in anatomy.blocks:
        assert len(block.hidden) == len(block.outputs) == 1, block.title
        found = block.attentions[0]
        assert (found.heads, found.kv_heads, found.head_dim) == (heads, kv_heads, head_dim)
        projections = (found.query, found.key, found.value, found.output)
        assert " ".join(str(leaf(product)) for product in projections) == attention
        assert block.feed_forward is not None
        parts = (block.feed_forward.gate, block.feed_forward.up, block.feed_forward.down)
        assert " ".join(str(leaf(product)) for product in parts) == feed_forward
    for before, after in zip(anatomy.blocks, anatomy.blocks[1:], strict=False):
        assert before.outputs == after.hidden
    assert (anatomy.head.activation is not None and anatomy.tied) is tied if anatomy.head else tied is None


@pytest.mark.parametrize(("name", "stem"), EXPECTED)
def test_segments_hold_every_node_once_and_run_in_order(
    name: str, stem: str, exported: Callable[..., ir.Model]
) -> None:
    model = exported(name, stem)
    segments = split_layers(model.graph)
    nodes = [node for segment in segments for node in segment.nodes]
    assert len(nodes) == len(set(nodes)) == len(list(model.graph))
    known: set[ir.Value] = {*model.graph.inputs, *model.graph.initializers.values()}
    for segment in segments:
        assert set(segment.inputs()) <= known
        known.update(output for node in segment.nodes for output in node.outputs)


def test_cross_attention_is_the_second_and_may_take_keys_from_the_cache(exported: Callable[..., ir.Model]) -> None:
    first = anatomy_of(exported("t5", "decoder_model")).blocks[1]
    later = anatomy_of(exported("t5", "decoder_with_past_model")).blocks[1]
    assert [leaf(product) for product in first.attentions[1].products] == ["q", "k", "v", "o"]
    assert [leaf(product) for product in later.attentions[1].products] == ["q", "o"]
    assert later.attentions[1].key is None
    assert later.feed_forward is not None


def test_two_stacks(exported: Callable[..., ir.Model]) -> None:
    anatomy = anatomy_of(exported("clip"))
    stacks = {block.title.rsplit(".", 1)[0] for block in anatomy.blocks}
    assert stacks == {"text_model.encoder.layers", "vision_model.encoder.layers"}
    assert all(len(block.attentions) == 1 and block.feed_forward for block in anatomy.blocks)


def test_experts_are_no_feed_forward(exported: Callable[..., ir.Model]) -> None:
    anatomy = anatomy_of(exported("mixtral"))
    assert all(block.attentions and block.feed_forward is None for block in anatomy.blocks)


STAGES = (
    "pack-projections",
    "quantize-blocks:bits=4,block_size=16,include=['*mlp.gate_proj*']",
    "quantize-blocks:bits=4,block_size=16,zero_points='float',include=['*mlp.down_proj*']",
    "quantize-dynamic:include=['*self_attn*']",
    "quantize-dynamic:activations=per_token,include=['*mlp.up_proj*']",
    "quantize-embedding:min_rows=16",
)


def test_every_stage_has_the_same_anatomy(exported: Callable[..., ir.Model]) -> None:
    """Packed, and then all formats mixed in one layer."""
    model = exported("llama")
    titles = [block.title for block in anatomy_of(model).blocks]
    for stage in STAGES:
        assert recipe.parse_pass(stage).build()(model).modified, stage
        anatomy = anatomy_of(model)
        assert [block.title for block in anatomy.blocks] == titles
        for block in anatomy.blocks:
            assert len(block.hidden) == len(block.outputs) == 1, (stage, block.title)
            (attention,) = block.attentions
            assert attention.packed
            assert (attention.heads, attention.kv_heads, attention.head_dim) == (4, 2, 16)
            assert leaf(attention.output) == "o_proj"
            assert block.feed_forward is not None
            names = [leaf(product) for product in block.feed_forward.products]
            assert names == ["gate_proj", "up_proj", "down_proj"]
            assert {product.activation.dtype for product in block.products} == {ir.DataType.FLOAT}
        assert anatomy.embeddings
        assert anatomy.head is not None


def test_layers_that_share_weights_are_refused(exported: Callable[..., ir.Model]) -> None:
    with pytest.raises(UnsupportedModelError, match=r"no transformer layers were recognised"):
        anatomy_of(exported("albert"))


def test_weights_of_an_earlier_layer_are_refused(graph: Callable[..., ir.Model], rng: np.random.Generator) -> None:
    model = graph(
        """
        agraph (float[b, 4] x, float[4, 4] h__0__a, float[4, 4] h__1__a) => (float[b, 4] y) {
            p = MatMul(x, h__0__a)
            q = MatMul(p, h__1__a)
            y = MatMul(q, h__0__a)
        }
        """,
        h__0__a=rng.standard_normal((4, 4)).astype(np.float32),
        h__1__a=rng.standard_normal((4, 4)).astype(np.float32),
    )
    with pytest.raises(UnsupportedModelError, match=r"layers share weights"):
        anatomy_of(model)


def test_a_product_keeps_its_bias_through_scaling(graph: Callable[..., ir.Model], rng: np.random.Generator) -> None:
    model = graph(
        """
        agraph (float[b, 32] x, float[32, 32] w, float[32] b) => (float[b, 32] y) {
            p = MatMul(x, w)
            y = Add(b, p)
        }
        """,
        w=rng.standard_normal((32, 32)).astype(np.float32),
        b=rng.standard_normal(32).astype(np.float32),
    )
    for activations in ("per_tensor", "per_token"):
        copy = copy_graph(model)
        recipe.parse_pass(f"quantize-dynamic:activations={activations}").build()(copy)
        (product,) = find_products(copy.graph)
        assert (str(product.activation.name), product.features) == ("x", (32, 32))
        assert product.bias is not None
        assert product.output.name == "y"


def test_numbers_named_after_a_layer_are_no_evidence(graph: Callable[..., ir.Model], rng: np.random.Generator) -> None:
    """torch names a constant after the layer that wants it first; once duplicates are one, later layers read it."""
    model = graph(
        """
        agraph (float[b, 4] x, float[4, 4] h__0__a, float[4, 4] h__1__a, float h__0__two, int64[2] h__0__sizes)
            => (float[b, 4] y) {
            p = MatMul(x, h__0__a)
            q = Mul(p, h__0__two)
            r = MatMul(q, h__1__a)
            s = Mul(r, h__0__two)
            y = Reshape(s, h__0__sizes)
        }
        """,
        h__0__a=rng.standard_normal((4, 4)).astype(np.float32),
        h__1__a=rng.standard_normal((4, 4)).astype(np.float32),
        h__0__two=np.array(2, np.float32),
        h__0__sizes=np.array([-1, 4]),
    )
    segments = [segment for segment in split_layers(model.graph) if segment.layer is not None]
    assert [[node.op_type for node in segment.nodes] for segment in segments] == [
        ["MatMul", "Mul"],
        ["MatMul", "Mul", "Reshape"],
    ]


def test_layers_by_the_modules_that_torch_records(graph: Callable[..., ir.Model], rng: np.random.Generator) -> None:
    """Only a norm's weight is named after its layer, as in what torch's exporter makes of a Llama."""
    model = graph(
        """
        agraph (float[b, 4] x, float[4] model__layers__0__norm__weight, float[4, 4] val_1, float[4, 4] val_2)
            => (float[b, 4] y) {
            n = Mul(x, model__layers__0__norm__weight)
            p = MatMul(n, val_1)
            y = MatMul(p, val_2)
        }
        """,
        model__layers__0__norm__weight=rng.standard_normal(4).astype(np.float32),
        val_1=rng.standard_normal((4, 4)).astype(np.float32),
        val_2=rng.standard_normal((4, 4)).astype(np.float32),
    )
    for layer, node in zip((0, 0, 1), model.graph, strict=True):
        node.metadata_props[TORCH_SCOPES] = f"['', 'model', 'model.layers.{layer}', 'model.layers.{layer}.mlp', 'n']"
    segments = [segment for segment in split_layers(model.graph) if segment.layer is not None]
    assert [(segment.title, len(segment.nodes)) for segment in segments] == [
        ("model.layers.0", 2),
        ("model.layers.1", 1),
    ]


SPELLED = """
    agraph (float[b, s, 32] x, float[32, 32] h__0__q, float[32, 16] h__0__k, float[32, 16] h__0__v,
            float[32, 32] h__0__o, int64[4] four) => (float[b, s, 32] y) {
        q = MatMul(x, h__0__q)
        k = MatMul(x, h__0__k)
        v = MatMul(x, h__0__v)
        q4 = Reshape(q, SIZES)
        k4 = Reshape(k, SIZES)
        v4 = Reshape(v, SIZES)
        qt = Transpose<perm=[0, 2, 1, 3]>(q4)
        kt = Transpose<perm=[0, 2, 3, 1]>(k4)
        vt = Transpose<perm=[0, 2, 1, 3]>(v4)
        kr = Concat<axis=1>(kt, kt)
        vr = Concat<axis=1>(vt, vt)
        scores = MatMul(qt, kr)
        p = Softmax<axis=-1>(scores)
        c = MatMul(p, vr)
        ct = Transpose<perm=[0, 2, 1, 3]>(c)
        joined = Shape<start=0, end=2>(x)
        rest = Constant<value_ints=[32]>()
        shape = Concat<axis=0>(joined, rest)
        c3 = Reshape(ct, shape)
        y = MatMul(c3, h__0__o)
    }
"""


def spelled(graph: Callable[..., ir.Model], rng: np.random.Generator, sizes: str, **constants: np.ndarray) -> ir.Model:
    widths = {"h__0__q": 32, "h__0__k": 16, "h__0__v": 16, "h__0__o": 32}
    weights = {name: rng.standard_normal((32, width)).astype(np.float32) for name, width in widths.items()}
    return graph(SPELLED.replace("SIZES", sizes), **weights, **constants)


def test_heads_of_attention_that_is_spelled_out(graph: Callable[..., ir.Model], rng: np.random.Generator) -> None:
    """No shapes are known: the Reshape that makes heads tells."""
    model = spelled(graph, rng, "four", four=np.array([0, 0, -1, 8]))
    (found,) = anatomy_of(model).blocks[0].attentions
    assert (found.heads, found.kv_heads, found.head_dim) == (4, 2, 8)
    assert [leaf(product) for product in found.products] == ["q", "k", "v", "o"]


def test_heads_that_nothing_tells(graph: Callable[..., ir.Model], rng: np.random.Generator) -> None:
    (found,) = anatomy_of(spelled(graph, rng, "four")).blocks[0].attentions  # `four` is an input of the graph
    assert (found.heads, found.kv_heads, found.head_dim) == (None, None, None)


def test_an_embedding_whose_shape_is_looked_up_is_one(graph: Callable[..., ir.Model], rng: np.random.Generator) -> None:
    """TorchScript reads lengths as Gather(Shape(embeddings), 1), which is no lookup in the table."""
    model = graph(
        """
        agraph (int64[b, s] ids, float[9, 4] wte, float[4, 4] h__0__a) => (float[b, s, 4] y, int64 length) {
            x = Gather(wte, ids)
            sizes = Shape(x)
            one = Constant<value_int=1>()
            length = Gather<axis=0>(sizes, one)
            y = MatMul(x, h__0__a)
        }
        """,
        wte=rng.standard_normal((9, 4)).astype(np.float32),
        h__0__a=rng.standard_normal((4, 4)).astype(np.float32),
    )
    assert [table.weight.name for table in anatomy_of(model).embeddings] == ["wte"]

"""Which attentions of a graph can have other heads, and how their weights are read and written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from onnxpress.arrays import Floats, Indices
from onnxpress.errors import UnsupportedModelError
from onnxpress.graph.anatomy import Attention, Block, Product
from onnxpress.graph.anatomy.editing import (
    PAST,
    QK_NORM,
    QK_NORM_HINT,
    decomposed_attention_error,
    forget_block_shapes,
    read_weight,
    require_editable,
    set_bias,
    set_heads,
    set_weight,
)
from onnxpress.graph.anatomy.layers import NORMS
from onnxpress.graph.anatomy.roles import FUSED, ROTARY_INPUTS
from onnxpress.graph.edits import add_initializers
from onnxpress.graph.sizes import size_of
from onnxpress.optimizers.heads.maths.attention_weights import AttentionWeights

BIAS_INPUT = {"GroupQueryAttention": 10, "MultiHeadAttention": 5, "DecoderMaskedMultiHeadAttention": 4, "Attention": 3}
"""What is added to scores, or masks them: [batch, 1 or heads, queries, keys]."""


@dataclass(frozen=True)
class HeadSite:
    """A self-attention whose heads are plain runs of the columns of its products."""

    block: Block
    attention: Attention
    key: Product
    value: Product
    output: Product
    sizes: tuple[int, int, int]
    """(heads, kv_heads, head_dim)"""
    rotations: tuple[ir.Node, ...]
    """RotaryEmbedding of queries and keys; the fused operator turns them itself where there are none."""

    @property
    def query(self) -> Product:
        return self.attention.query

    @property
    def hidden(self) -> ir.Value:
        """The activation that query, key and value are computed from."""
        return self.query.activation

    @property
    def states(self) -> ir.Value:
        """z, what the output product reads."""
        return self.output.activation

    @property
    def biased(self) -> bool:
        """Whether the output product has a bias, which can take up what is constant."""
        return self.output.bias is not None

    @property
    def causal(self) -> bool:
        """Whether the first token of a text can attend to nothing but itself."""
        node = self.attention.node
        given = (node.attributes.get(name) for name in ("unidirectional", "is_causal"))
        return node.op_type == "GroupQueryAttention" or any(one is not None and bool(one.value) for one in given)

    @property
    def interleaved(self) -> bool:
        names = ("rotary_interleaved", "interleaved")
        nodes = self.rotations or (self.attention.node,)
        return any(name in nodes[0].attributes and bool(nodes[0].attributes[name].value) for name in names)

    def read(self) -> AttentionWeights:
        heads, kv_heads, head_dim = self.sizes
        query, key, value = (
            np.vstack([read_weight(product), _bias(product)]).astype(np.float64).reshape(-1, count, head_dim)
            for product, count in ((self.query, heads), (self.key, kv_heads), (self.value, kv_heads))
        )
        output = read_weight(self.output).astype(np.float64).reshape(heads, head_dim, -1)
        return AttentionWeights(query, key, value, output, _bias(self.output).astype(np.float64))

    def write(self, arrays: Mapping[str, ir.TensorProtocol]) -> None:
        """Put what `pack_weights` returned, or the part of it that there is, in the graph."""
        products = {"query": self.query, "key": self.key, "value": self.value, "output": self.output}
        for name, product in products.items():
            if name in arrays:
                set_weight(product, arrays[name].numpy())
            if f"{name}_bias" in arrays:
                set_bias(product, arrays[f"{name}_bias"].numpy())

    def resize(self, sizes: tuple[int, int, int], tables: tuple[ir.Value, ir.Value] | None) -> None:
        """Tell the operators their new sizes, and the tables of cosines and sines that fit them."""
        heads, kv_heads, head_dim = sizes
        set_heads(self.attention, heads, kv_heads, head_dim)
        forget_block_shapes(self.block)
        for node, count in zip(self.rotations, (heads, kv_heads), strict=False):
            if "num_heads" in node.attributes and node.attributes["num_heads"].value:
                node.attributes["num_heads"] = ir.AttrInt64("num_heads", count)
        if tables is None:
            return
        for node in self.rotations or (self.attention.node,):
            first = ROTARY_INPUTS[0] if node is self.attention.node else 2 if node.domain else 1
            for index, table in enumerate(tables, first):
                node.replace_input_with(index, table)
            if "rotary_embedding_dim" in node.attributes and node.attributes["rotary_embedding_dim"].value:
                node.attributes["rotary_embedding_dim"] = ir.AttrInt64("rotary_embedding_dim", head_dim)


def pack_weights(site: HeadSite, weights: AttentionWeights) -> dict[str, Floats]:
    """Weights as matrices [in, out] and biases [out], in float32; biases of products without one only if they are
    not zero."""
    arrays: dict[str, Floats] = {}
    for name, product, weight in (
        ("query", site.query, weights.query),
        ("key", site.key, weights.key),
        ("value", site.value, weights.value),
    ):
        matrix = weight.reshape(len(weight), -1).astype(np.float32)
        arrays[name] = np.ascontiguousarray(matrix[:-1])
        if product.bias is not None or matrix[-1].any():
            arrays[f"{name}_bias"] = matrix[-1].copy()
    return arrays | pack_output(site, weights)


def pack_output(site: HeadSite, weights: AttentionWeights) -> dict[str, Floats]:
    arrays: dict[str, Floats] = {"output": weights.output.reshape(-1, weights.output.shape[2]).astype(np.float32)}
    if site.biased:
        arrays["output_bias"] = weights.offset.astype(np.float32)
    return arrays


def skip_reason(attention: Attention) -> str | None:
    """Why an attention is left alone by design, if it is."""
    if attention.key is None or attention.value is None:
        return "cross-attention reads keys and values from a cache that another graph made"
    if attention.key.activation is not attention.query.activation:
        return "cross-attention: keys and values come from the encoder"
    for value in (attention.key.output, attention.value.output):
        if not attention.packed and len(value.uses()) > 1:
            return (
                "keys and values are read by more than the attention: relative positions, or a cache for other graphs"
            )
    return None


def site_of(block: Block, attention: Attention) -> HeadSite:
    """Raise UnsupportedModelError, naming the layer, where heads are no plain runs of columns."""
    node, where = attention.node, block.title
    if node.op_type not in FUSED:
        raise decomposed_attention_error(where, node)
    if attention.query is attention.key:
        raise UnsupportedModelError(f"{where}: query and key are packed in {attention.query.name}")
    key, value, output = attention.key, attention.value, attention.output
    assert key is not None
    assert value is not None
    if output is None or output.activation is not node.outputs[0]:
        between = node.outputs[0].consumers()
        raise UnsupportedModelError(
            f"{where}: {', '.join(one.op_type for one in between) or 'nothing'} stands between attention and its output"
        )
    rotations = tuple(
        rotation
        for index, product in enumerate((attention.query, key, value))
        for rotation in _between(node.inputs[index], product, where)
    )
    heads, kv_heads, head_dim = attention.heads, attention.kv_heads, attention.head_dim
    if heads is None or kv_heads is None or head_dim is None:
        raise UnsupportedModelError(f"{where}: nothing tells how many heads there are")
    widths = [product.features[1] for product in (attention.query, key, value)] + [output.features[0]]
    if widths != [heads * head_dim, kv_heads * head_dim, kv_heads * head_dim, heads * head_dim]:
        raise UnsupportedModelError(
            f"{where}: widths {widths} of query, key, value and output are no {heads} and {kv_heads} heads of "
            f"{head_dim}, as in multi-head latent attention"
        )
    _check_inputs(node, where)
    for product in (attention.query, key, value, output):
        require_editable(product)
    return HeadSite(block, attention, key, value, output, (heads, kv_heads, head_dim), rotations)


def cut_tables(graph: ir.Graph, tables: tuple[ir.Value, ir.Value], planes: Indices) -> tuple[ir.Value, ir.Value]:
    """Tables of cosines and sines [positions, planes] with these columns only, as new initializers."""
    cut = []
    for table in tables:
        tensor = table.const_value
        if not table.is_initializer() or tensor is None:
            raise UnsupportedModelError(f"{table.name}, a table of rotary positions, is computed in the graph")
        kept = np.ascontiguousarray(tensor.numpy()[:, planes])
        cut += add_initializers(graph, [f"{table.name}.planes{len(planes)}"], [ir.tensor(kept)])
    return cut[0], cut[1]


def table_width(tables: tuple[ir.Value, ir.Value]) -> int | None:
    """How many planes are turned."""
    shape = tables[0].shape
    return shape[1] if shape is not None and isinstance(shape[1], int) else None


def _between(value: ir.Value | None, product: Product, where: str) -> list[ir.Node]:
    """The rotations between a product and attention; a multiplication by one number does no harm."""
    rotations = []
    while value is not product.output:
        node = value.producer() if value is not None else None
        if node is not None and node.op_type == "RotaryEmbedding":
            rotations.append(node)
            value = node.inputs[0]
            continue
        others = [one for one in node.inputs if one is not None and one.const_value is not None] if node else []
        if node is not None and node.op_type == "Mul" and len(others) == 1 and others[0].const_value.size == 1:  # type: ignore[union-attr]
            value = next(one for one in node.inputs if one is not others[0])
            continue
        reason, hint = _obstacle(value, product)
        raise UnsupportedModelError(f"{where}: {reason}", hint=hint)
    return rotations


def _obstacle(value: ir.Value | None, product: Product) -> tuple[str, str | None]:
    """Say what is between a product and attention, and what to do about it."""
    names: list[str] = []
    queue = [value]
    while queue and len(names) < 20:
        current = queue.pop(0)
        node = current.producer() if current is not None and current is not product.output else None
        if node is None:
            continue
        names.append(node.op_type)
        if node.op_type in NORMS:
            return f"{node.op_type} of each head ({QK_NORM}) stands between {product.name} and attention", QK_NORM_HINT
        queue.extend(node.inputs)
    hint = "fuse the rotation of a part of each head first: --pass fuse-foreign" if "RotaryEmbedding" in names else None
    return f"{', '.join(dict.fromkeys(names[:3]))} stands between {product.name} and attention", hint


def _check_inputs(node: ir.Node, where: str) -> None:
    def given(index: int) -> ir.Value | None:
        return node.inputs[index] if len(node.inputs) > index else None

    bias = given(BIAS_INPUT.get(node.op_type, len(node.inputs)))
    if bias is not None and (bias.shape is None or (len(bias.shape) == 4 and size_of(bias, -3) != 1)):
        raise UnsupportedModelError(
            f"{where}: what is added to scores, {bias.name} {bias.shape}, is not known to be the same for all heads"
        )
    caches = [str(one.name) for one in node.inputs if one is not None and str(one.name).startswith("past_key_values.")]
    if not all(PAST.fullmatch(name) for name in caches):
        raise UnsupportedModelError(
            f"{where}: the cache {caches[0]} is one of several graphs, whose heads cannot be reduced yet"
        )
    if node.op_type == "GroupQueryAttention" and any(given(index) is not None for index in range(11, len(node.inputs))):
        raise UnsupportedModelError(f"{where}: attention has sinks or scales for each head")
    if node.op_type == "MultiHeadAttention" and given(3) is not None:
        raise UnsupportedModelError(f"{where}: biases are inside of MultiHeadAttention")


def _bias(product: Product) -> Floats:
    if product.bias is None:
        # As wide as the weight is by now: `features` are what they were when the product was found.
        return np.zeros(read_weight(product).shape[1], np.float32)
    if product.bias.const_value is None:
        raise UnsupportedModelError(f"the bias of {product.name} is no constant")
    return np.asarray(product.bias.const_value.numpy(), np.float32)

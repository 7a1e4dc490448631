"""Attention modules that compute attention by themselves, led to transformers' attention interface.

Most of transformers' models call an attention function by name, and ours is registered there (see `fuse.py`). A few
families do not: what their forward computes beside the attention itself is written here once more, and the attention is
left to the function given. A bias of positions (ALiBi, relative positions, disentangled attention) becomes part of what
is added to the scores.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from onnxpress.exporter.fusing.patching import replaced_forward

Attention = Callable[..., tuple[Tensor, Any]]
"""transformers' attention interface: (module, query, key, value, bias, scaling=…) -> output [batch, length, heads,
head_dim] and weights or None."""
Forward = Callable[..., Any]


@contextmanager
def installed(model: nn.Module, attention: Attention) -> Iterator[None]:
    """Give the attention modules of these families a forward that calls `attention`, and take it out again."""
    with ExitStack() as stack:
        for module in model.modules():
            for family in type(module).__mro__:
                if family.__name__ in FAMILIES:
                    stack.enter_context(replaced_forward(module, FAMILIES[family.__name__](module, attention)))
        for place in {sys.modules[type(module).__module__] for module in model.modules()}:
            if place.__name__.endswith(".modeling_falcon"):
                stack.enter_context(mock.patch.object(place, "build_alibi_tensor", _falcon_alibi))
        yield


def _bloom(module: Any, attention: Attention) -> Forward:
    """ALiBi (Press et al., 2021) is one more bias; queries, keys and values are interleaved by head."""

    def forward(
        hidden_states: Tensor,
        residual: Tensor,
        alibi: Tensor,
        attention_mask: Tensor | None,
        layer_past: Any = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        batch, length, width = hidden_states.shape
        query, key, value = module._reshape(module.query_key_value(hidden_states))
        if layer_past is not None:
            key, value = layer_past.update(key, value, module.layer_idx)
        bias = alibi.view(batch, module.num_heads, 1, -1)
        if attention_mask is not None:
            bias = bias + attention_mask
        output, _weights = attention(module, query, key, value, bias, scaling=module.inv_norm_factor)
        return module.dense(output.reshape(batch, length, width)) + residual, None

    return forward


def _falcon(module: Any, attention: Attention) -> Forward:
    """Rotary or ALiBi, which the model has put into the mask already; as many key-value heads as there are weights for
    (transformers repeats them before it caches them)."""

    def forward(
        hidden_states: Tensor,
        alibi: Tensor | None,
        attention_mask: Tensor | None,
        position_ids: Any = None,
        layer_past: Any = None,
        use_cache: bool = False,
        output_attentions: bool = False,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        batch, length, width = hidden_states.shape
        # by groups of query heads, each followed by its key and its value head
        kv_heads = module.num_kv_heads
        packed = module.query_key_value(hidden_states).view(batch, length, kv_heads, -1, module.head_dim)
        query = packed[..., :-2, :].reshape(batch, length, module.num_heads, module.head_dim).transpose(1, 2)
        key, value = packed[..., -2, :].transpose(1, 2), packed[..., -1, :].transpose(1, 2)
        if alibi is None:
            rotate = sys.modules[type(module).__module__].apply_rotary_pos_emb
            query, key = rotate(query, key, *(position_embeddings or ()))
        if layer_past is not None:
            key, value = layer_past.update(key, value, module.layer_idx)
        output, _weights = attention(module, query, key, value, attention_mask, scaling=module.inv_norm_factor)
        return module.dense(output.reshape(batch, length, width)), None

    return forward


def _falcon_alibi(attention_mask: Tensor, num_heads: int, dtype: torch.dtype) -> Tensor:
    """Falcon's ALiBi [batch * heads, 1, length] from a mask [batch, length].

    Falcon multiplies in bfloat16. The product of two of its numbers is exact in float32, in which runtimes multiply, so
    that only the operands and the result are rounded.
    """
    from transformers.models.bloom.modeling_bloom import _get_alibi_slopes

    rounded = lambda values: values.to(torch.bfloat16).to(torch.float32)  # noqa: E731
    positions = (attention_mask.cumsum(dim=-1) - 1) * attention_mask
    slopes = rounded(_get_alibi_slopes(num_heads, attention_mask.device))
    alibi = rounded(slopes[:, None] * rounded(positions)[:, None, :])
    return alibi.reshape(attention_mask.shape[0] * num_heads, 1, attention_mask.shape[1]).to(dtype)


def _mpnet(module: Any, attention: Attention) -> Forward:
    """Relative positions [batch, heads, length, length] are added to the mask."""

    def forward(
        hidden_states: Tensor, attention_mask: Tensor | None = None, position_bias: Tensor | None = None, **_: Any
    ) -> tuple[Tensor]:
        batch, length, _width = hidden_states.shape
        query, key, value = (
            product(hidden_states).view(batch, length, -1, module.attention_head_size).transpose(1, 2)
            for product in (module.q, module.k, module.v)
        )
        output, _weights = attention(
            module,
            query,
            key,
            value,
            attention_mask,
            scaling=module.attention_head_size**-0.5,
            position_bias=position_bias,
        )
        return (module.o(output.reshape(batch, length, module.all_head_size)),)

    return forward


def _deberta(module: Any, attention: Attention) -> Forward:
    """Disentangled attention (He et al., 2020): the terms of content and position are a bias of each layer's own."""

    def forward(
        hidden_states: Tensor,
        attention_mask: Tensor,
        output_attentions: bool = False,
        query_states: Tensor | None = None,
        relative_pos: Tensor | None = None,
        rel_embeddings: Tensor | None = None,
    ) -> tuple[Tensor, None]:
        batch, length, _width = hidden_states.shape
        heads, head_dim = module.num_attention_heads, module.attention_head_size

        def by_head(states: Tensor) -> Tensor:
            return states.view(*states.shape[:2], heads, head_dim).transpose(1, 2)

        asking = hidden_states if query_states is None else query_states
        query, key = by_head(module.query_proj(asking)), by_head(module.key_proj(hidden_states))
        value = by_head(module.value_proj(hidden_states))
        kinds = [kind for kind in ("c2p", "p2c") if kind in module.pos_att_type]
        scale = (head_dim * (1 + len(kinds))) ** -0.5
        bias = torch.where(attention_mask.to(torch.bool), 0.0, torch.finfo(hidden_states.dtype).min)
        if module.relative_attention and relative_pos is not None and rel_embeddings is not None:
            for kind in kinds:
                content = query if kind == "c2p" else key
                bias = bias + _position_scores(module, kind, content * scale, relative_pos, rel_embeddings)
        output, _weights = attention(module, query, key, value, bias, scaling=scale)
        return output.reshape(batch, length, module.all_head_size), None

    return forward


def _position_scores(module: Any, kind: str, content: Tensor, buckets: Tensor, embeddings: Tensor) -> Tensor:
    """DeBERTa's scores of queries with the positions of keys (`c2p`), or of keys with those of queries (`p2c`).

    content [batch, heads, length, head_dim]; buckets [1, length, length], the bucket of each distance i - j; embeddings
    [2 · span, width]. Returns [batch, heads, length of queries, length of keys].

    Measured on a CPU at 512 tokens, picking a bucket for each pair is faster than multiplying with the embedding of
    every distance and shifting the rows.
    """
    batch, heads, length, head_dim = content.shape
    span = module.pos_ebd_size
    if module.share_att_key:
        product = module.key_proj if kind == "c2p" else module.query_proj
    else:
        product = module.pos_key_proj if kind == "c2p" else module.pos_query_proj
    positions = product(embeddings[: 2 * span]).view(2 * span, heads, head_dim)
    scores = content @ positions.permute(1, 2, 0)  # [batch, heads, length, 2 · span]
    index = ((buckets if kind == "c2p" else -buckets) + span).clamp(0, 2 * span - 1)
    picked = scores.gather(-1, index[:, None].expand(batch, heads, length, length))
    return picked if kind == "c2p" else picked.transpose(2, 3)


FAMILIES: Mapping[str, Callable[[Any, Attention], Forward]] = {
    "BloomAttention": _bloom,
    "FalconAttention": _falcon,
    "MPNetSelfAttention": _mpnet,
    "DisentangledSelfAttention": _deberta,
}
"""By the name of the class that has the attention's weights."""

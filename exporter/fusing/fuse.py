"""While a model is traced, its attention, rotations and norms are written as fused operators.

transformers lets one register an attention and a mask function by name; registering ours makes every architecture that
uses that interface export fused, with no pattern matching. Masks stay transformers' own: whatever function of positions
a model asks for (causal, sliding window, chunks) is evaluated into an additive bias, to which padding is added.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    bidirectional_mask_function,
    causal_mask_function,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from onnxpress.exporter.fusing import adapters, experts, norms
from onnxpress.exporter.fusing.experts import Experts
from onnxpress.exporter.fusing.graph_cache import GraphCache
from onnxpress.exporter.fusing.patching import registered, replaced_forward
from onnxpress.exporter.fusing.rotary import APPLY, Rotary, Table
from onnxpress.exporter.tracing import operators


class Refused(Exception):
    """Raised while tracing when a part cannot be fused as planned; the exporter traces again without that fusion."""

    def __init__(self, part: str, reason: str) -> None:
        super().__init__(reason)
        self.part = part
        self.reason = reason


@dataclass
class Fusion:
    """State of the fusing while one model is traced."""

    rotary: Rotary = field(default_factory=Rotary)
    experts: Experts = field(default_factory=Experts)
    fuse_attention: bool = True
    defer_rotary: bool = True
    """Leave the rotation to GroupQueryAttention; otherwise write RotaryEmbedding nodes."""
    tables: dict[tuple[int, str | None], tuple[Table, Tensor, Tensor]] = field(default_factory=dict)
    """The rotary tables and their cos and sin as tensors of the traced module."""
    position_ids: Tensor | None = None
    key_positions: Tensor | None = None
    """Positions of all tokens, past and new [batch, total length]."""
    cache_positions: Tensor | None = None
    """Where GroupQueryAttention rotates the new tokens to, see `operators.cache_positions`."""
    lengths: tuple[Tensor, Tensor] | None = None
    cache: GraphCache | None = None
    made: Counter[str] = field(default_factory=Counter)
    """Fused operators written, by name."""
    _angles: dict[int, tuple[Tensor, tuple[int, str | None], Any]] = field(default_factory=dict)
    _rotated: dict[int, tuple[Tensor, Table, Tensor, Tensor, Tensor]] = field(default_factory=dict)

    def begin(
        self,
        owner: nn.Module,
        cache: GraphCache | None,
        position_ids: Tensor | None,
        lengths: tuple[Tensor, Tensor] | None = None,
        key_positions: Tensor | None = None,
        cache_positions: Tensor | None = None,
    ) -> None:
        """Called at the start of every traced forward, since a trace may run it more than once."""
        self.cache, self.position_ids, self.lengths = cache, position_ids, lengths
        self.key_positions, self.cache_positions = key_positions, cache_positions
        self.made.clear()
        self.experts.begin()
        self._angles.clear()
        self._rotated.clear()
        self.tables = {
            which: (table, getattr(owner, table.buffer("cos")), getattr(owner, table.buffer("sin")))
            for which, table in self.rotary.tables.items()
        }

    def attention(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        **extra: Any,
    ) -> tuple[Tensor, None]:
        """transformers' attention interface: query [batch, heads, length, head_dim], key and value [batch, kv_heads,
        kv_length, head_dim] -> [batch, length, heads, head_dim]."""
        scale = float(query.shape[-1] ** -0.5 if scaling is None else scaling)
        softcap = extra.get("softcap")
        if extra.get("s_aux") is not None:
            raise Refused("attention", "it has attention sinks")
        bias = attention_mask
        if extra.get("position_bias") is not None:
            bias = extra["position_bias"] if bias is None else bias + extra["position_bias"]
        cached = self.cache.waiting(key) if self.cache is not None else None
        if cached is not None:
            return self._cached_attention(cached, query, key, value, bias, scale, softcap), None
        if softcap is not None:
            raise Refused("attention", "softcap without a cache")
        groups = query.shape[1] // key.shape[1]
        if groups > 1:
            key, value = (states.repeat_interleave(groups, dim=1) for states in (key, value))
        if self.fuse_attention:
            self.made["MultiHeadAttention"] += 1
            return operators.multi_head_attention(query, key, value, _within(bias, query, key), scale), None
        return _plain_attention(query, key, value, bias, scale), None

    def _cached_attention(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        bias: Tensor | None,
        scale: float,
        softcap: float | None,
    ) -> Tensor:
        assert self.cache is not None
        assert self.lengths is not None
        if key.shape != value.shape:
            raise Refused("attention", "key and value differ in head_dim")
        head_dim = query.shape[-1]
        rotation = self._rotated.pop(id(query), None)
        if (rotation is None) != (self._rotated.pop(id(key), None) is None):
            raise Refused("rotary", "query and key are not rotated alike")
        attributes: dict[str, Any] = {"scale": scale}
        if softcap is not None:
            attributes["softcap"] = float(softcap)
        rotary = None
        if rotation is not None:
            _, table, cos, sin, position_ids = rotation
            if head_dim % 16 or (table.rotary_dim // 2) % 8:
                raise Refused("rotary", "GroupQueryAttention rotates multiples of 16 only")
            rotary = (cos, sin, position_ids)
            attributes["rotary_interleaved"] = int(table.interleaved)
        if head_dim % 8:
            raise Refused("attention", f"GroupQueryAttention needs head_dim to be a multiple of 8, not {head_dim}")
        output, *present = operators.group_query_attention(
            query, key, value, self.cache.past[layer], self.lengths, rotary, bias, attributes
        )
        self.cache.present[layer] = (present[0], present[1])
        self.made["GroupQueryAttention"] += 1
        return output

    def finish(self) -> None:
        """Called at the end of every traced forward: whatever was left to the attention must have got there."""
        if self.cache is not None and self.cache.unconsumed():
            raise Refused("attention", "it does not use transformers' attention interface")
        if self._rotated:
            raise Refused("rotary", "rotated states do not reach the attention as they are")

    def apply_rotary(self, original: Callable[..., Any], query: Tensor, key: Tensor, *angles: Any, **extra: Any) -> Any:
        """In place of transformers' `apply_rotary_pos_emb(query, key, cos, sin, …)`."""
        known = self._angles.get(id(angles[0])) if angles else None
        if known is None or extra.get("unsqueeze_dim", 1) != 1 or len(angles) > 2:
            return original(query, key, *angles, **extra)
        _, which, position_ids = known
        table, cos, sin = self.tables[which]
        if self.defer_rotary and self.cache is not None:
            # fresh views, so that states that reach the attention unchanged are told by identity
            query, key = query.view_as(query), key.view_as(key)
            if position_ids is not self.position_ids or self.cache_positions is None:
                raise Refused("rotary", "rotated to positions of its own")
            for states in (query, key):
                self._rotated[id(states)] = (states, table, cos, sin, self.cache_positions)
            return query, key
        self.made["RotaryEmbedding"] += 2
        rotate = lambda states: operators.rotary_embedding(  # noqa: E731
            states, position_ids, cos, sin, interleaved=table.interleaved, rotary_dim=table.rotary_dim
        )
        return rotate(query), rotate(key)

    def rotary_forward(self, module: nn.Module, original: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a rotary module's forward to remember which table its angles stand for."""

        def forward(states: Tensor, position_ids: Tensor, *rest: Any, **extra: Any) -> Any:
            layer_type = extra.get("layer_type", rest[0] if rest else None)
            which = (id(module), layer_type)
            kind = getattr(module, "rope_type", None)
            kind = kind.get(layer_type) if isinstance(kind, dict) else kind
            if which in self.tables and kind in ("dynamic", "longrope"):
                # its forward rescales its own buffers by the length; up to the context limit the table is the same
                table, *angles = self.tables[which]
                cos, sin = (
                    part.repeat_interleave(2, -1) if table.interleaved else torch.cat((part, part), -1)
                    for part in (angle[position_ids] for angle in angles)
                )
            else:
                cos, sin = original(states, position_ids, *rest, **extra)
            if which in self.tables and position_ids.dim() == 2:
                if position_ids.shape[0] == 1 and self.position_ids is not None:
                    position_ids = self.position_ids
                self._angles[id(cos)] = (cos, which, position_ids)
            return cos, sin

        return forward

    def mask(
        self,
        batch_size: int,
        q_length: int,
        kv_length: int,
        q_offset: int = 0,
        kv_offset: int = 0,
        mask_function: Callable[..., Tensor] = causal_mask_function,
        attention_mask: Tensor | None = None,
        use_vmap: bool = False,
        device: Any = None,
        **extra: Any,
    ) -> Tensor | None:
        """transformers' mask interface: the additive bias [1 or batch, 1, length, kv_length], or None for no mask."""
        if use_vmap:
            raise Refused("mask", "a mask function that is not index-based")
        causal_inside = self.cache is not None and self.fuse_attention and mask_function is causal_mask_function
        seen: Tensor | None = None
        if mask_function is not bidirectional_mask_function and not causal_inside:
            if self.key_positions is not None and self.position_ids is not None:
                # windows count tokens: places that are only padding must not use them up
                rows, columns = self.position_ids, self.key_positions
            else:
                rows = torch.arange(q_length, device=device)[None] + q_offset
                columns = torch.arange(kv_length, device=device)[None] + kv_offset
            index = torch.zeros(1, 1, 1, 1, dtype=torch.long, device=device)
            seen = mask_function(index, index, rows[:, None, :, None], columns[:, None, None, :])
        if attention_mask is not None:
            padding = attention_mask[:, None, None, :].to(torch.bool)
            seen = padding if seen is None else seen & padding
        if seen is None:
            return None
        lowest = torch.finfo(torch.float32).min
        bias = torch.where(seen, 0.0, lowest).to(torch.float32)
        return bias.expand(-1, -1, q_length, -1)


def register_tables(owner: nn.Module, fusion: Fusion) -> None:
    """Make the rotary tables buffers of the traced module."""
    for table in fusion.rotary.tables.values():
        owner.register_buffer(table.buffer("cos"), table.cos)
        owner.register_buffer(table.buffer("sin"), table.sin)


def _within(bias: Tensor | None, query: Tensor, key: Tensor) -> Tensor | None:
    """MultiHeadAttention wants the bias in full length: [.., length, kv_length]."""
    if bias is None or (bias.shape[-2] == query.shape[-2]):
        return bias
    return bias.expand(-1, -1, query.shape[-2], -1)


def _plain_attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """Attention in plain operators, for heads that no fused operator takes."""
    scores = torch.matmul(query, key.transpose(2, 3)) * scale
    if bias is not None:
        scores = scores + bias
    weights = torch.softmax(scores, dim=-1)
    return torch.matmul(weights, value).transpose(1, 2)


@contextmanager
def fused_forms(fusion: Fusion, model: nn.Module) -> Iterator[None]:
    """Put the fused forms in place for the time of one trace, and take every one of them out again."""
    with ExitStack() as stack:
        for module in model.modules():
            if (forward := norms.one_operator(module, fusion.made)) is not None:
                stack.enter_context(replaced_forward(module, forward))
        for module in fusion.rotary.modules:
            stack.enter_context(replaced_forward(module, fusion.rotary_forward(module, module.forward)))
        for place, original in fusion.rotary.functions.items():
            stack.enter_context(mock.patch.object(place, APPLY, _bound(fusion.apply_rotary, original)))
        stack.enter_context(adapters.installed(model, fusion.attention))
        stack.enter_context(experts.fused_mixtures(fusion.experts, fusion.made))
        stack.enter_context(registered(ALL_ATTENTION_FUNCTIONS, fusion.attention))
        stack.enter_context(registered(ALL_MASK_ATTENTION_FUNCTIONS, fusion.mask))
        yield


def _bound(replacement: Callable[..., Any], original: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *arguments, **extra: replacement(original, *arguments, **extra)

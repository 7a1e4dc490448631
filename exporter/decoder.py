"""A causal language model as a graph with a key-value cache."""

from __future__ import annotations

import inspect
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn

from onnxpress.errors import UnsupportedModelError
from onnxpress.exporter.fusing import adapters
from onnxpress.exporter.fusing.fuse import Fusion, register_tables
from onnxpress.exporter.fusing.graph_cache import GraphCache
from onnxpress.exporter.layers.traced import Traceable, TracedModel, on_meta, trace_model
from onnxpress.exporter.tracing import operators


class DecoderWrapper(nn.Module):
    """forward(input_ids [batch, length], attention_mask [batch, past + length], past) -> logits and the new cache."""

    def __init__(self, model: nn.Module, fusion: Fusion, layers: tuple[int, ...]) -> None:
        super().__init__()
        self.model = model
        self.fusion = fusion
        self.layers = layers
        self.positions = "position_ids" in inspect.signature(model.forward).parameters
        register_tables(self, fusion)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, past: list[tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, ...]:
        fusion = self.fusion
        # A client may hand over a cache longer than the past (one buffer for the whole text): only the mask tells how
        # much of it is past. Without GroupQueryAttention the cache has to be exactly the past.
        length = input_ids.shape[1]
        total_length = attention_mask.shape[1] if fusion.fuse_attention else past[0][0].shape[2] + length
        past_length = total_length - length
        key_positions = operators.token_positions(attention_mask)
        position_ids = key_positions[:, past_length:]
        total = torch.full((), total_length, dtype=torch.int32)
        cache = GraphCache(dict(zip(self.layers, past, strict=True)), past_length, total_length, fusion.fuse_attention)
        fusion.begin(
            self,
            cache,
            position_ids,
            ((total - 1).expand(input_ids.shape[0]), total),
            key_positions,
            operators.cache_positions(attention_mask, past_length),
        )
        extra: dict[str, Any] = {"position_ids": position_ids} if self.positions else {}
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            past_key_values=cache,
            use_cache=True,
            **extra,
        )
        fusion.finish()
        return (output.logits, *(state for layer in self.layers for state in cache.present[layer]))


def traceable_decoder(wrapper: DecoderWrapper, layers: tuple[int, ...], shapes: list[tuple[int, int]]) -> Traceable:
    """Example inputs, free dimensions and names; shapes: (kv_heads, head_dim) of each traced layer."""
    batch, length, past_length = 2, 3, 5
    state = {0: "batch_size", 2: "past_sequence_length"}
    past = [
        (torch.zeros(batch, heads, past_length, head_dim), torch.zeros(batch, heads, past_length, head_dim))
        for heads, head_dim in shapes
    ]
    inputs = (
        torch.zeros(batch, length, dtype=torch.int64),
        torch.ones(batch, past_length + length, dtype=torch.int64),
        past,
    )
    pairs = [f"{layer}.{part}" for layer in layers for part in ("key", "value")]
    return Traceable(
        wrapper,
        inputs,
        (
            {0: "batch_size", 1: "sequence_length"},
            {0: "batch_size", 1: "total_sequence_length"},
            [(state, state)] * len(layers),
        ),
        ["input_ids", "attention_mask", *(f"past_key_values.{pair}" for pair in pairs)],
        ["logits", *(f"present.{pair}" for pair in pairs)],
    )


def cache_shapes(model: nn.Module) -> dict[int, tuple[int, int]]:
    """(kv_heads, head_dim) of the keys of each layer of a model on the meta device, found by running it once."""
    with torch.no_grad(), adapters.installed(model, Fusion(fuse_attention=False).attention):
        tokens = torch.zeros(1, 1, dtype=torch.int64, device="meta")
        output = model(input_ids=tokens, use_cache=True)
    cache = getattr(output, "past_key_values", None)
    if cache is None:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no key-value cache", hint="state-space models are not supported"
        )
    shapes = {}
    for layer, states in enumerate(cache.layers):
        keys = getattr(states, "keys", None)
        if keys is None or keys.dim() != 4:
            raise UnsupportedModelError(
                f"{type(model).__name__} keeps something other than keys and values in layer {layer}",
                hint="state-space and linear-attention layers are not supported",
            )
        shapes[layer] = (int(keys.shape[1]), int(keys.shape[3]))
    return shapes


def export_decoder(model_class: Any, config: Any, *, positions: int) -> TracedModel:
    """The graph of a causal language model with its cache, parameters unbound."""
    shapes = cache_shapes(on_meta(model_class, config))

    def wrap(model: nn.Module, fusion: Fusion, layers: tuple[int, ...]) -> Traceable:
        layers = layers or tuple(shapes)
        wrapper = DecoderWrapper(model, fusion, layers).eval()
        return traceable_decoder(wrapper, layers, [shapes[layer] for layer in layers])

    traced = trace_model(lambda: on_meta(model_class, config), wrap, positions=positions)
    for output in traced.graph.graph.outputs[1:]:
        assert output.shape is not None
        output.shape = ir.Shape([*output.shape[:2], "total_sequence_length", output.shape[3]])
    return traced

"""Encoder-decoder models as the three files that Hugging Face's clients load.

encoder_model             input (ids, features) -> last_hidden_state
decoder_model             input_ids, encoder_hidden_states, encoder_attention_mask -> logits, present.* (both)
decoder_with_past_model   input_ids, encoder_attention_mask, past_key_values.* -> logits, present.{i}.decoder.*
"""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput

from onnxpress.exporter.fusing.fuse import Fusion, register_tables
from onnxpress.exporter.fusing.graph_cache import GraphCache
from onnxpress.exporter.layers.traced import Traceable, TracedModel, on_meta, trace_model


class CrossCache(EncoderDecoderCache):
    """Self-attention keys grow by concatenation; cross-attention keys are made once and then handed back."""

    def __init__(self, own: GraphCache, cross: GraphCache, layers: tuple[int, ...], given: bool) -> None:
        self.self_attention_cache = own
        self.cross_attention_cache = cross
        self.is_updated = dict.fromkeys(layers, given)

    def get_seq_length(self, layer_idx: int = 0) -> Any:
        return self.self_attention_cache.get_seq_length()

    def get_mask_sizes(self, query_length: Any, layer_idx: int) -> Any:
        return self.self_attention_cache.get_mask_sizes(query_length, layer_idx)

    def get_query_offset(self, layer_idx: int = 0) -> Any:
        return self.self_attention_cache.get_query_offset(layer_idx)

    @property
    def is_sliding(self) -> list[bool]:
        return self.self_attention_cache.is_sliding

    @property
    def is_linear(self) -> list[bool]:
        return self.self_attention_cache.is_linear

    @property
    def is_dummy(self) -> list[bool]:
        return self.self_attention_cache.is_dummy


class OnceCache(GraphCache):
    """Cross-attention: what is stored first is the whole of it."""

    def __init__(self, past: dict[int, tuple[Tensor, Tensor]], length: Any) -> None:
        super().__init__(past, 0, length, fused=False)
        self.layers = {  # type: ignore[assignment]
            layer: SimpleNamespace(keys=key, values=value) for layer, (key, value) in past.items()
        }

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *rest: Any, **extra: Any) -> Any:
        self.present[layer_idx] = (key_states, value_states)
        return key_states, value_states


class EncoderHalf(nn.Module):
    """forward(*inputs) -> last_hidden_state."""

    def __init__(self, model: nn.Module, fusion: Fusion, inputs: list[str]) -> None:
        super().__init__()
        self.model = model
        self.fusion = fusion
        self.inputs = inputs
        register_tables(self, fusion)

    def forward(self, *tensors: Tensor) -> Tensor:
        self.fusion.begin(self, None, None)
        output: Tensor = self.model.get_encoder()(**dict(zip(self.inputs, tensors, strict=True))).last_hidden_state
        self.fusion.finish()
        return output


class DecoderHalf(nn.Module):
    """One step of the decoder, with or without a past."""

    def __init__(
        self, model: nn.Module, fusion: Fusion, layers: tuple[int, ...], masked: bool, with_past: bool
    ) -> None:
        super().__init__()
        self.model = model
        self.fusion = fusion
        self.layers = layers
        self.masked = masked
        self.with_past = with_past
        register_tables(self, fusion)

    def forward(self, input_ids: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        tensors = list(rest)
        attention_mask = tensors.pop(0) if self.masked else None
        states = None if self.with_past else tensors.pop(0)
        own_past: dict[int, tuple[Tensor, Tensor]] = {}
        cross_past: dict[int, tuple[Tensor, Tensor]] = {}
        if self.with_past:
            for layer, (own_key, own_value, cross_key, cross_value) in zip(self.layers, tensors[0], strict=True):
                own_past[layer] = (own_key, own_value)
                cross_past[layer] = (cross_key, cross_value)
        past_length = own_past[self.layers[0]][0].shape[2] if self.with_past else 0
        own = StepCache(own_past, past_length, past_length + input_ids.shape[1], len(self.layers))
        cross = OnceCache(cross_past, None)
        self.fusion.begin(self, None, None)
        if states is None:  # the encoder's states are only used for their keys, which are given: any will do
            states = _placeholder(self.model.config, cross_past[self.layers[0]][0])
        output = self.model(
            decoder_input_ids=input_ids,
            attention_mask=attention_mask,
            encoder_outputs=BaseModelOutput(last_hidden_state=states),
            past_key_values=CrossCache(own, cross, self.layers, self.with_past),
            use_cache=True,
        )
        self.fusion.finish()
        present: list[Tensor] = []
        for layer in self.layers:
            present += own.present[layer]
            if not self.with_past:
                present += cross.present[layer]
        return (output.logits, *present)


class StepCache(GraphCache):
    """Self-attention of a decoder that may have no past yet."""

    def __init__(self, past: dict[int, tuple[Tensor, Tensor]], past_length: Any, total_length: Any, depth: int) -> None:
        super().__init__(past, past_length, total_length, fused=False)
        self.depth = depth

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *rest: Any, **extra: Any) -> Any:
        if layer_idx not in self.past:
            self.present[layer_idx] = (key_states, value_states)
            return key_states, value_states
        return super().update(key_states, value_states, layer_idx)


def _placeholder(config: Any, cross_key: Tensor) -> Tensor:
    """Encoder states [batch, encoder_length, hidden] of the right shape; reading cached keys, no layer looks at
    them."""
    width = getattr(config, "d_model", None) or config.hidden_size
    return cross_key.new_zeros(cross_key.shape[0], cross_key.shape[2], width)


def export_encoder_decoder(model_class: Any, config: Any, *, positions: int) -> dict[str, TracedModel]:
    """The three graphs of an encoder-decoder model, parameters unbound."""
    make = lambda: on_meta(model_class, config)  # noqa: E731
    encoder_inputs, encoder_free, masked = _encoder_inputs(make(), config)
    batch, length = "batch_size", "decoder_sequence_length"
    encoder_length, past_length = "encoder_sequence_length", "past_decoder_sequence_length"
    fixed_length = None if masked else _encoder_states(make(), encoder_inputs).shape[1]
    frames = fixed_length or 7
    frames_free = {} if fixed_length else {1: encoder_length}
    heads, head_dim = _decoder_heads(make())

    def wrap_encoder(model: nn.Module, fusion: Fusion, layers: tuple[int, ...]) -> Traceable:
        wrapper = EncoderHalf(model, fusion, list(encoder_inputs)).eval()
        inputs = tuple(encoder_inputs.values())
        return Traceable(wrapper, inputs, (tuple(encoder_free.values()),), list(encoder_inputs), ["last_hidden_state"])

    def wrap_decoder(with_past: bool) -> Any:
        def wrap(model: nn.Module, fusion: Fusion, layers: tuple[int, ...]) -> Traceable:
            width = getattr(config, "d_model", None) or config.hidden_size
            inputs: list[Any] = [torch.zeros(2, 3, dtype=torch.int64)]
            free: list[Any] = [{0: batch, 1: length}]
            names = ["input_ids"]
            if masked:
                inputs.append(torch.ones(2, frames, dtype=torch.int64))
                free.append({0: batch, **frames_free})
                names.append("encoder_attention_mask")
            parts = ["decoder.key", "decoder.value", "encoder.key", "encoder.value"]
            if with_past:
                own = lambda: torch.zeros(2, heads, 5, head_dim)  # noqa: E731
                cross = lambda: torch.zeros(2, heads, frames, head_dim)  # noqa: E731
                cross_free = {0: batch, **({} if fixed_length else {2: encoder_length})}
                inputs.append([(own(), own(), cross(), cross()) for _ in layers])
                own_free = {0: batch, 2: past_length}
                free.append([(own_free, own_free, cross_free, cross_free)] * len(layers))
                names += [f"past_key_values.{layer}.{part}" for layer in layers for part in parts]
                made = parts[:2]
            else:
                inputs.append(torch.zeros(2, frames, width))
                free.append({0: batch, **frames_free})
                names.append("encoder_hidden_states")
                made = parts
            outputs = ["logits", *(f"present.{layer}.{part}" for layer in layers for part in made)]
            wrapper = DecoderHalf(model, fusion, layers, masked, with_past).eval()
            return Traceable(wrapper, tuple(inputs), (free[0], tuple(free[1:])), names, outputs)

        return wrap

    encoder_path, decoder_path = _stack_paths(make())
    return {
        "encoder_model": trace_model(make, wrap_encoder, positions=positions, within=encoder_path),
        "decoder_model": trace_model(make, wrap_decoder(False), positions=positions, within=decoder_path),
        "decoder_with_past_model": trace_model(make, wrap_decoder(True), positions=positions, within=decoder_path),
    }


def _stack_paths(model: nn.Module) -> tuple[str, str]:
    names = {id(module): name for name, module in model.named_modules()}
    return names[id(model.get_encoder())], names[id(model.get_decoder())]


def _encoder_inputs(model: nn.Module, config: Any) -> tuple[dict[str, Tensor], dict[str, dict[int, str]], bool]:
    """Example encoder inputs, their free dimensions, and whether the encoder takes an attention mask."""
    batch, length = "batch_size", "encoder_sequence_length"
    if "input_features" in inspect.signature(model.forward).parameters:
        frames = 2 * config.max_source_positions  # Whisper's two convolutions halve them
        return {"input_features": torch.zeros(2, config.num_mel_bins, frames)}, {"input_features": {0: batch}}, False
    tokens = {0: batch, 1: length}
    inputs = {
        "input_ids": torch.zeros(2, 7, dtype=torch.int64),
        "attention_mask": torch.ones(2, 7, dtype=torch.int64),
    }
    return inputs, {"input_ids": tokens, "attention_mask": tokens}, True


@torch.no_grad()
def _encoder_states(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    states: Tensor = model.get_encoder()(
        **{name: tensor.to("meta") for name, tensor in inputs.items()}
    ).last_hidden_state
    return states


@torch.no_grad()
def _decoder_heads(model: nn.Module) -> tuple[int, int]:
    """(heads, head_dim) of the decoder's attention, found by running it once on the meta device."""
    config = model.config
    width = getattr(config, "d_model", None) or config.hidden_size
    output = model(
        decoder_input_ids=torch.zeros(1, 1, dtype=torch.int64, device="meta"),
        encoder_outputs=BaseModelOutput(last_hidden_state=torch.zeros(1, 3, width, device="meta")),
        use_cache=True,
    )
    keys = output.past_key_values.self_attention_cache.layers[0].keys
    return int(keys.shape[1]), int(keys.shape[3])

"""Models that read everything at once: text, image and speech encoders, classifiers, CLIP."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from onnxpress.exporter.fusing.fuse import Fusion, register_tables
from onnxpress.exporter.layers.traced import Traceable, TracedModel, on_meta, trace_model

OUTPUTS: dict[str, tuple[str, ...]] = {
    "feature-extraction": ("last_hidden_state",),
    "fill-mask": ("logits",),
    "text-classification": ("logits",),
    "token-classification": ("logits",),
    "question-answering": ("start_logits", "end_logits"),
    "image-classification": ("logits",),
    "audio-classification": ("logits",),
    "automatic-speech-recognition": ("logits",),
    "zero-shot-image-classification": ("logits_per_image", "logits_per_text", "text_embeds", "image_embeds"),
}
"""optimum's task name -> graph outputs, which are also the names of the model's outputs."""


class EncoderWrapper(nn.Module):
    """forward(*inputs) -> the task's outputs, and `sentence_embedding` where a pooling is given."""

    def __init__(
        self, model: nn.Module, fusion: Fusion, inputs: list[str], outputs: tuple[str, ...], pooling: Any
    ) -> None:
        super().__init__()
        self.model = model
        self.fusion = fusion
        self.inputs = inputs
        self.outputs = outputs
        self.pooling = pooling
        self.positions = "position_ids" in inspect.signature(model.forward).parameters and bool(fusion.rotary.tables)
        register_tables(self, fusion)

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        named = dict(zip(self.inputs, tensors, strict=True))
        positions = None
        if self.positions:
            batch, length = named["input_ids"].shape
            positions = torch.arange(length)[None].expand(batch, length)
        self.fusion.begin(self, None, positions)
        extra = {} if positions is None else {"position_ids": positions}
        output = self.model(**named, **extra, return_dict=True)
        self.fusion.finish()
        results = [output[name] for name in self.outputs]
        if self.pooling is not None:
            results.append(pooled(output["last_hidden_state"], named["attention_mask"], self.pooling))
        return tuple(results)


def pooled(states: Tensor, attention_mask: Tensor, pooling: Any) -> Tensor:
    """states [batch, length, hidden] -> one vector a row [batch, hidden], over attended tokens only."""
    mask = attention_mask.to(states.dtype)[..., None]
    if pooling.mode == "mean":
        vector = (states * mask).sum(1) / mask.sum(1).clamp(min=1e-9)
    elif pooling.mode == "max":
        vector = torch.where(mask > 0, states, torch.finfo(states.dtype).min).amax(1)
    elif pooling.mode == "cls":
        vector = states[:, 0]
    else:
        last = (attention_mask * torch.arange(states.shape[1])).argmax(-1)
        vector = torch.take_along_dim(states, last[:, None, None], dim=1)[:, 0]
    return torch.nn.functional.normalize(vector, dim=-1) if pooling.normalize else vector


def example_inputs(model: nn.Module, config: Any) -> tuple[dict[str, Tensor], dict[str, dict[int, str]]]:
    """Example tensors by input name, and their free dimensions."""
    accepted = inspect.signature(model.forward).parameters
    inputs: dict[str, Tensor] = {}
    free: dict[str, dict[int, str]] = {}
    if "input_ids" in accepted:
        tokens = {0: "batch_size", 1: "sequence_length"}
        inputs["input_ids"], free["input_ids"] = torch.zeros(2, 7, dtype=torch.int64), tokens
        inputs["attention_mask"], free["attention_mask"] = torch.ones(2, 7, dtype=torch.int64), tokens
        if "token_type_ids" in accepted and (getattr(config, "type_vocab_size", 0) or 0) > 1:
            inputs["token_type_ids"], free["token_type_ids"] = torch.zeros(2, 7, dtype=torch.int64), tokens
    if "pixel_values" in accepted:
        vision = getattr(config, "vision_config", config)
        size = vision.image_size if isinstance(vision.image_size, int) else tuple(vision.image_size)
        height, width = (size, size) if isinstance(size, int) else size
        images = "image_batch_size" if "input_ids" in inputs else "batch_size"
        count = 3 if "input_ids" in inputs else 2
        inputs["pixel_values"] = torch.zeros(count, vision.num_channels, height, width)
        free["pixel_values"] = {0: images}
    if "input_values" in accepted:
        inputs["input_values"], free["input_values"] = torch.zeros(2, 4000), {0: "batch_size", 1: "num_samples"}
    return inputs, free


def export_encoder(model_class: Any, config: Any, *, task: str, pooling: Any, positions: int) -> TracedModel:
    """The graph of an encoder or classifier, parameters unbound."""
    outputs = OUTPUTS[task]

    def wrap(model: nn.Module, fusion: Fusion, layers: tuple[int, ...]) -> Traceable:
        inputs, free = example_inputs(model, config)
        if pooling is not None and "attention_mask" not in inputs:
            raise ValueError("pooling needs an attention mask")
        wrapper = EncoderWrapper(model, fusion, list(inputs), outputs, pooling).eval()
        names = [*outputs, *(["sentence_embedding"] if pooling is not None else [])]
        return Traceable(wrapper, tuple(inputs.values()), (tuple(free.values()),), list(inputs), names)

    return trace_model(lambda: on_meta(model_class, config), wrap, positions=positions)

"""Rotary position embeddings: the model's own tables, computed once for every position that the graph serves."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from onnxpress.exporter.fusing import recognise

APPLY = "apply_rotary_pos_emb"
"""The name under which transformers' modeling files define their rotation."""


@dataclass
class Table:
    """cos and sin [positions, rotary_dim / 2] of one rotary module and one kind of layer."""

    name: str
    cos: Tensor
    sin: Tensor
    interleaved: bool

    def buffer(self, part: str) -> str:
        """Name of the traced module's buffer for `cos` or `sin`."""
        return f"{self.name.replace('.', '_')}_{part}_cache"

    @property
    def rotary_dim(self) -> int:
        return 2 * int(self.cos.shape[-1])


@dataclass
class Rotary:
    """The rotations of a model, as the tracer replaces them."""

    tables: dict[tuple[int, str | None], Table] = field(default_factory=dict)
    """By id of the rotary module and the `layer_type` it is called with (None when it takes none)."""
    modules: list[nn.Module] = field(default_factory=list)
    functions: dict[Any, Callable[..., Any]] = field(default_factory=dict)
    """By modeling module, the original function to put back."""
    reason: str | None = None
    """Why rotations are traced as they stand, if they are."""


def find_rotations(model: nn.Module, positions: int) -> Rotary:
    """Compute the tables of every rotary module for `positions` positions and recognise the rotation applied with them.

    The model's buffers must be real (see `signatures.materialise`). RoPE variants that rescale with the length of the
    text (dynamic, longrope beyond their original length) have no one table: `context_limit` refuses them beforehand.
    """
    rotary = Rotary()
    rotaries = [module for module in model.modules() if "RotaryEmbedding" in type(module).__name__]
    if not rotaries:
        return rotary
    places = {
        sys.modules[type(module).__module__] for module in model.modules() if "Attention" in type(module).__name__
    }
    functions = {place: getattr(place, APPLY) for place in places if hasattr(place, APPLY)}
    if not functions:
        rotary.reason = f"its rotation is not a function named {APPLY}"
        return rotary
    config = model.config
    head_dims = _head_dims(model)
    for number, module in enumerate(rotaries):
        for layer_type in _layer_types(module, config):
            angles = _angles(module, layer_type, positions)
            if angles is None:
                rotary.reason = f"{type(module).__name__} does not give cos and sin of shape [positions, width]"
                return rotary
            # of whole heads, or of the part of them that is rotated
            conventions = {
                recognise.rotary_convention(function, width, *angles)
                for function in functions.values()
                for width in {*head_dims, angles[0].shape[-1]}
                if width >= angles[0].shape[-1]
            } - {None}
            if len(conventions) != 1:
                rotary.reason = f"{APPLY} of {type(model).__name__} is neither of the two known rotations"
                return rotary
            interleaved = bool(conventions.pop())
            cos, sin = angles
            table = recognise.rotary_table(cos, sin, interleaved)
            assert table is not None  # the convention was recognised with it
            suffix = ".".join(part for part in (str(number) if number else "", layer_type or "") if part)
            name = f"rotary.{suffix}" if suffix else "rotary"
            rotary.tables[id(module), layer_type] = Table(name, *table, interleaved)
        rotary.modules.append(module)
    rotary.functions = functions
    return rotary


def _layer_types(module: nn.Module, config: Any) -> list[str | None]:
    if "layer_type" not in inspect.signature(module.forward).parameters:
        return [None]
    return sorted(set(config.layer_types))


@torch.no_grad()
def _angles(module: nn.Module, layer_type: str | None, positions: int) -> tuple[Tensor, Tensor] | None:
    position_ids = torch.arange(positions)[None]
    extra = {} if layer_type is None else {"layer_type": layer_type}
    try:
        cos, sin = module(torch.zeros(1, 1, 1), position_ids, **extra)
    except Exception:  # a rotary module with another interface is traced as it stands
        return None
    if cos.dim() != 3 or cos.shape[:2] != (1, positions) or cos.shape != sin.shape:
        return None
    return cos[0], sin[0]


def _head_dims(model: nn.Module) -> set[int]:
    found = set()
    for module in model.modules():
        for key in ("head_dim", "head_size", "attention_head_size"):
            value = getattr(module, key, None)
            if isinstance(value, int):
                found.add(value)
    return found


def context_limit(config: Any, wanted: int | None) -> tuple[int | None, str | None]:
    """How many positions one table can serve, and why it is fewer than the config's `max_position_embeddings`.

    `dynamic` and `longrope` change every angle once a text passes the original length; up to there they are one table.
    """
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    limit = getattr(text, "max_position_embeddings", None)
    parameters = getattr(text, "rope_parameters", None) or {}
    groups = [value for value in parameters.values() if isinstance(value, dict)] or [parameters]
    reason = None
    for group in groups:
        if group.get("rope_type") in {"dynamic", "longrope"} and isinstance(limit, int):
            original = group.get("original_max_position_embeddings") or getattr(
                text, "original_max_position_embeddings", None
            )
            original = min(limit, int(original)) if original else limit
            if original < limit:
                limit = original
                reason = f"{group['rope_type']} RoPE changes all angles beyond {original} positions"
    if wanted is not None and isinstance(limit, int):
        limit = min(limit, wanted)
    return limit, reason

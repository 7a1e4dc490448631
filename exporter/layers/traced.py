"""Tracing attempts: as fused as the model allows, and no further than it can be told apart into layers.

Each attempt builds the model anew on the meta device, cuts it down to the layers to trace, traces them and repeats
them. What an attempt refuses is given up in the next one: rotations inside GroupQueryAttention, then rotations
altogether, fused attention, and at last the replication itself (all layers are traced).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import onnx_ir as ir
import torch
from torch import nn

from onnxpress.errors import UnsupportedModelError
from onnxpress.exporter.fusing import experts, fuse, rotary
from onnxpress.exporter.fusing.fuse import Fusion, Refused
from onnxpress.exporter.fusing.patching import IMPLEMENTATION
from onnxpress.exporter.layers import signatures, trace
from onnxpress.exporter.layers.replicate import replicate_layers
from onnxpress.exporter.layers.split import CannotReplicate


@dataclass(frozen=True)
class Traceable:
    """A module ready to be traced; what `Wrap` returns."""

    wrapper: nn.Module
    inputs: tuple[Any, ...]
    dynamic_shapes: tuple[Any, ...]
    input_names: list[str]
    output_names: list[str]


Wrap = Callable[[nn.Module, Fusion, tuple[int, ...]], Traceable]
"""(model cut down to the layers to trace, fusion, those layers' indices) -> what to trace."""


@dataclass(frozen=True)
class Plan:
    """How much an attempt tries to fuse."""

    fuse_attention: bool = True
    defer_rotary: bool = True
    use_rotary: bool = True
    extra_layers: int = 0
    all_layers: bool = False
    given_up: dict[str, str] = field(default_factory=dict)
    """Parts that earlier attempts gave up, and why."""

    def without(self, part: str, reason: str) -> Plan:
        given_up = {**self.given_up, part: reason}
        if part == "rotary" and self.use_rotary:
            if self.defer_rotary:
                return replace(self, defer_rotary=False, given_up=given_up)
            return replace(self, use_rotary=False, given_up=given_up)
        if part == "attention" and self.fuse_attention:
            return replace(self, fuse_attention=False, given_up=given_up)
        raise UnsupportedModelError(f"cannot trace this model: {reason}")


@dataclass(frozen=True)
class TracedModel:
    """The graph of the whole model, parameters unbound, and how it was made."""

    graph: ir.Model
    plan: Plan
    operators: dict[str, int]
    """Fused operators in the traced layers, by name."""
    traced_layers: int
    depth: int

    @property
    def method(self) -> str:
        fused = self.plan.fuse_attention and any("Attention" in name for name in self.operators)
        return "fused" if fused else "stamped" if self.traced_layers < self.depth else "traced"


def trace_model(make_model: Callable[[], nn.Module], wrap: Wrap, *, positions: int, within: str = "") -> TracedModel:
    """Trace the model that `make_model` builds (on the meta device, in eval mode).

    positions: length of the rotary tables. within: prefix of the module whose layers repeat, for models with several
    stacks.
    """
    plan = Plan()
    while True:
        try:
            return _attempt(make_model(), wrap, plan, positions, within)
        except Refused as refused:
            plan = plan.without(refused.part, refused.reason)
        except CannotReplicate as failed:
            if failed.retry and plan.extra_layers == 0:
                plan = replace(plan, extra_layers=1)
            elif not plan.all_layers:
                plan = replace(plan, all_layers=True, given_up={**plan.given_up, "template": str(failed)})
            else:
                raise


def _attempt(model: nn.Module, wrap: Wrap, plan: Plan, positions: int, within: str) -> TracedModel:
    stack = signatures.find_stack(model, within)
    if stack is None:
        chosen: tuple[int, ...] = ()
    elif plan.all_layers:
        chosen = tuple(range(stack.depth))
    else:
        chosen = signatures.choose_traced_layers(stack.signatures, plan.extra_layers)
        signatures.keep_layers(model, stack, chosen)
    use_implementation(model)
    signatures.materialise(model)
    tables = rotary.find_rotations(model, positions) if plan.use_rotary else rotary.Rotary()
    mixtures = experts.find_mixtures(model)
    fusion = Fusion(rotary=tables, experts=mixtures, fuse_attention=plan.fuse_attention, defer_rotary=plan.defer_rotary)
    ready = wrap(model, fusion, chosen)
    with fuse.fused_forms(fusion, model):
        try:
            graph = trace.trace(
                ready.wrapper, ready.inputs, ready.dynamic_shapes, ready.input_names, ready.output_names
            )
        except Refused:
            raise
        except Exception:
            fusion.finish()  # shapes that do not fit are what an attention of the model's own makes of a fused cache
            raise
    if stack is not None and len(chosen) < stack.depth:
        graph = replicate_layers(graph, stack, chosen, stack.path)
    if tables.reason is not None:
        plan = replace(plan, given_up={**plan.given_up, "rotary": tables.reason})
    if mixtures.reason is not None:
        plan = replace(plan, given_up={**plan.given_up, "experts": mixtures.reason})
    depth = stack.depth if stack is not None else 0
    return TracedModel(graph, plan, dict(fusion.made), len(chosen), depth)


def use_implementation(model: nn.Module) -> None:
    """Point every config of the model at our attention, mask and experts functions."""
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is not None:
            config._attn_implementation_internal = IMPLEMENTATION
            config._experts_implementation_internal = IMPLEMENTATION


def on_meta(model_class: Any, config: Any) -> nn.Module:
    """The model without memory, in eval mode. The config is copied: cutting a model down changes its depth."""
    import copy

    with torch.device("meta"):
        model = model_class._from_config(copy.deepcopy(config), attn_implementation="eager", dtype=torch.float32)
    for module in model.modules():
        if hasattr(module, "config"):
            module.config._experts_implementation_internal = "batched_mm"  # the one without a loop over experts
    result: nn.Module = model.eval()
    return result

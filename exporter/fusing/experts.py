"""Mixtures of experts as one com.microsoft::MoE a layer, which computes each expert once, over its own tokens.

transformers' experts modules call a function registered by name with what the router chose. The operator routes by
itself, from the router's logits: softmax, the k largest, normalised to a sum of one or not. So a mixture is fused where
its router is found to do just that and its experts are products gated by SiLU. All others gather the weights of every
chosen expert for every token, which is right but takes memory.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, batched_mm_experts_forward

from onnxpress.exporter.fusing import recognise
from onnxpress.exporter.fusing.patching import registered, replaced_forward
from onnxpress.exporter.tracing import operators


@dataclass
class Experts:
    """The mixtures of one model while it is traced."""

    routers: dict[nn.Module, recognise.Router] = field(default_factory=dict)
    modules: set[nn.Module] = field(default_factory=set)
    """Experts that the operator can express."""
    reason: str | None = None
    """Why some mixtures are not fused, if so."""
    _routed: dict[int, tuple[Tensor, Tensor, recognise.Router]] = field(default_factory=dict)
    """By id of routing weights: these, the logits that they come from, and how."""

    def begin(self) -> None:
        """Called at the start of every traced forward."""
        self._routed.clear()

    def compute(
        self, made: Counter[str], module: Any, states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
    ) -> Tensor:
        """transformers' experts interface: states [tokens, hidden], the chosen experts [tokens, k] and their weights
        [tokens, k] -> [tokens, hidden]."""
        routed = self._routed.pop(id(top_k_weights), None)
        if module in self.modules and routed is not None:
            made["MoE"] += 1
            _, logits, router = routed
            k = int(top_k_index.shape[-1])
            return operators.experts(
                states, logits, module.gate_up_proj, module.down_proj, k=k, normalized=router.normalized
            )
        self.reason = self.reason or "routing weights are changed between router and experts"
        result: Tensor = batched_mm_experts_forward(module, states, top_k_index, top_k_weights)
        return result

    def router_forward(self, router: recognise.Router, original: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a router's forward to remember which logits its weights come from."""

        def forward(*arguments: Any, **extra: Any) -> Any:
            logits, weights, chosen = original(*arguments, **extra)
            self._routed[id(weights)] = (weights, logits, router)
            return logits, weights, chosen

        return forward


def find_mixtures(model: nn.Module) -> Experts:
    """Recognise the mixtures of experts of a model."""
    mixtures = Experts()
    for parent in model.modules():
        for experts in parent.children():
            if not recognise.is_experts(experts):
                continue
            reason = recognise.not_swiglu(experts)
            routers = {other: router for other in parent.children() if (router := recognise.softmax_router(other))}
            if reason is None and len(routers) != 1:
                reason = "its router is not softmax and top-k"
            if reason is None:
                mixtures.modules.add(experts)
                mixtures.routers.update(routers)
            mixtures.reason = mixtures.reason or reason
    return mixtures


@contextmanager
def fused_mixtures(experts: Experts, made: Counter[str]) -> Iterator[None]:
    """Put the fused mixtures in place for the time of one trace; `made` counts them."""
    with ExitStack() as stack:
        for module, router in experts.routers.items():
            stack.enter_context(replaced_forward(module, experts.router_forward(router, module.forward)))
        stack.enter_context(registered(ALL_EXPERTS_FUNCTIONS, lambda *given: experts.compute(made, *given)))
        yield

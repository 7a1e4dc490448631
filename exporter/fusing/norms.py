"""Norms and linear layers of many classes, each written as one operator."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from onnxpress.exporter.fusing import recognise
from onnxpress.exporter.tracing import operators

Forward = Callable[[Tensor], Tensor]


def one_operator(module: nn.Module, made: Counter[str]) -> Forward | None:
    """Return a forward that writes a linear layer or an RMS norm as one operator; None for any other module.

    made: counts the fused operators that it writes.
    """
    if type(module) is Conv1D:  # GPT-2's linear layer: weight [in, out]
        return _conv1d_forward(module)
    if type(module) is not nn.Linear and recognise.is_linear(module):
        return _linear_forward(module)
    norm = recognise.find_rms_norm(module)
    return None if norm is None else _norm_forward(made, module, norm)


def _linear_forward(module: nn.Module) -> Forward:
    """The forward of a subclass of torch's linear layer, as torch's own function."""

    def forward(states: Tensor) -> Tensor:
        return nn.functional.linear(states, module.weight, module.bias)

    return forward


def _conv1d_forward(module: nn.Module) -> Forward:
    def forward(states: Tensor) -> Tensor:
        return operators.linear(states, module.weight, module.bias, transposed=True)

    return forward


def _norm_forward(made: Counter[str], module: nn.Module, norm: recognise.RMSNorm) -> Forward:
    def forward(states: Tensor) -> Tensor:
        made["SimplifiedLayerNormalization"] += 1
        weight = module.weight if norm.offset == 0 else module.weight + norm.offset
        return operators.rms_norm(states, weight, norm.epsilon)

    return forward

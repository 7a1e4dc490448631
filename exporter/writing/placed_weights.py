"""Weights of a graph, and where in the model they are read: what a checkpoint is written from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import onnx_ir as ir

Role = Literal["product", "bias", "gain", "shift", "experts", "other"]
"""Matrix and bias of a product; γ and β of a norm; the interleaved gate and up matrices of experts; whatever else."""


@dataclass(frozen=True)
class PlacedWeight:
    name: str
    """The initializer's: the checkpoint's, unless arithmetic on it was folded."""
    role: Role
    module: str | None
    """Path of the module that reads it, where the exporter recorded it."""
    tensor: ir.TensorProtocol
    out_first: bool = True
    """Whether a matrix is [out, in], as `nn.Linear` has it, and not [in, out]."""
    scale: float | None = None
    """The factor of the scores, of a product that makes queries."""
    queries: int = 0
    """How many outputs are queries, the first ones where keys and values are packed behind them."""
    is_head: bool = False
    """Whether it makes the logits."""
    has_bias: bool = False
    """Whether a product has one."""

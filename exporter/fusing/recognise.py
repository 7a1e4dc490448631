"""Recognition by evaluation: what a module or function computes is found by running it on random numbers.

Names and signatures change between model families and releases; the function that is computed does not. A module is
only replaced by a fused operator if it gives the same numbers as that operator's definition.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

TOLERANCE = 1e-5


def is_linear(module: nn.Module) -> bool:
    """Whether `module` computes x · weightᵀ + bias: torch's own linear layer, or a subclass that does the same."""
    return type(module) is nn.Linear or (isinstance(module, nn.Linear) and _like_linear(type(module)))


def _like_linear(kind: type[nn.Linear]) -> bool:
    generator = torch.Generator().manual_seed(0)
    try:
        probe = kind(5, 3)
        with torch.no_grad():
            probe.weight.copy_(torch.randn(3, 5, generator=generator))
            probe.bias.copy_(torch.randn(3, generator=generator))
            states = torch.randn(2, 4, 5, generator=generator)
            found, expected = probe(states), nn.functional.linear(states, probe.weight, probe.bias)
    except Exception:  # it is built or called in another way: not a linear layer that we know
        return False
    same = isinstance(found, Tensor) and found.shape == expected.shape
    return same and torch.allclose(found, expected, atol=TOLERANCE, rtol=TOLERANCE)


@dataclass(frozen=True)
class RMSNorm:
    """x / sqrt(mean(x²) + epsilon) · (weight + offset); Gemma's family has offset 1."""

    epsilon: float
    offset: float


def find_rms_norm(module: nn.Module) -> RMSNorm | None:
    """The RMSNorm (Zhang and Sennrich, 2019) that `module` computes, or None. Its weights may be on the meta device."""
    parameters = dict(module.named_parameters())
    if set(parameters) != {"weight"} or parameters["weight"].dim() != 1 or "Norm" not in type(module).__name__:
        return None
    epsilon = next(
        (float(vars(module)[key]) for key in ("variance_epsilon", "eps", "epsilon") if key in vars(module)), None
    )
    if epsilon is None:
        return None
    probe = copy.deepcopy(module).to_empty(device="cpu").float().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        weight = torch.randn(parameters["weight"].shape, generator=generator)
        probe.weight.copy_(weight)
        states = torch.randn(2, 3, weight.shape[0], generator=generator) * 3
        try:
            found = probe(states)
        except Exception:  # a norm that takes more than the states (a gate, a residual) is not this norm
            return None
        if not isinstance(found, Tensor) or found.shape != states.shape:
            return None
        normal = states * torch.rsqrt(states.pow(2).mean(-1, keepdim=True) + epsilon)
        for offset in (0.0, 1.0):
            if torch.allclose(found, normal * (weight + offset), atol=TOLERANCE, rtol=TOLERANCE):
                return RMSNorm(epsilon, offset)
    return None


@dataclass(frozen=True)
class Router:
    """softmax over all experts, then the k largest; `normalized`: divided by their sum."""

    normalized: bool


def softmax_router(module: nn.Module) -> Router | None:
    """The Router that `module(states [tokens, hidden])` -> (logits, weights, chosen) is, or None."""
    parameters = dict(module.named_parameters())
    if not parameters or any(parameter.dim() > 2 for parameter in parameters.values()) or "weight" not in parameters:
        return None
    if parameters["weight"].dim() != 2 or parameters["weight"].numel() > 1 << 24:
        return None
    generator = torch.Generator().manual_seed(0)
    probe = copy.deepcopy(module).to_empty(device="cpu").float().eval()
    with torch.no_grad():
        for parameter in probe.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        width = parameters["weight"].shape[1]
        try:
            logits, weights, chosen = probe(torch.randn(32, width, generator=generator) * width**-0.5)
            probabilities, expected = torch.softmax(logits.float(), dim=-1).topk(chosen.shape[-1], dim=-1)
        except Exception:  # another signature, or not as many results: not a router that we know
            return None
    if not torch.equal(chosen, expected) or weights.shape != probabilities.shape:
        return None
    for normalized in (False, True):
        wanted = probabilities / probabilities.sum(-1, keepdim=True) if normalized else probabilities
        if torch.allclose(weights, wanted, atol=TOLERANCE, rtol=TOLERANCE):
            return Router(normalized)
    return None


def is_experts(module: nn.Module) -> bool:
    """Whether `module` holds the weights of experts and computes them through transformers' experts interface."""
    return all(hasattr(module, name) for name in ("has_gate", "is_transposed", "_apply_gate", "down_proj"))


def not_swiglu(experts: Any) -> str | None:
    """Why experts are not down(silu(gate(x)) · up(x)) with weights [experts, out, in], gate above up; None if they
    are."""
    if not experts.has_gate or not experts.is_concatenated or experts.is_transposed or experts.has_bias:
        return "its experts have biases, no gate, or weights in another order"
    if getattr(experts, "has_post_expert_norm", False):
        return "its experts end in a norm"
    states = torch.randn(4, 16, generator=torch.Generator().manual_seed(0)) * 30  # far enough to meet a limit
    gate, up = states.chunk(2, dim=-1)
    with torch.no_grad():
        found = experts._apply_gate(states)
    if not torch.allclose(found, nn.functional.silu(gate) * up, atol=TOLERANCE, rtol=TOLERANCE):
        return "its experts are not gated by SiLU"
    return None


def rotary_convention(function: Callable[..., Any], head_dim: int, cos: Tensor, sin: Tensor) -> bool | None:
    """Whether `function(query, key, cos, sin)` rotates pairs that are interleaved (True) or half a head apart (False).

    cos, sin: what the model's rotary module gives, [positions, width]. None when the function does neither; then it is
    traced as it stands.
    """
    generator = torch.Generator().manual_seed(0)
    length = min(7, cos.shape[0])
    query = torch.randn(1, 2, length, head_dim, generator=generator)
    key = torch.randn(1, 1, length, head_dim, generator=generator)
    try:
        found_query, found_key = function(query, key, cos[None, :length], sin[None, :length])
    except Exception:  # another signature: not a function that we know
        return None
    for interleaved in (False, True):
        table = rotary_table(cos, sin, interleaved)
        if table is None:
            continue
        expected = [rotate(states, *table, interleaved=interleaved) for states in (query, key)]
        if all(
            found.shape == want.shape and torch.allclose(found, want, atol=TOLERANCE, rtol=TOLERANCE)
            for found, want in zip((found_query, found_key), expected, strict=True)
        ):
            return interleaved
    return None


def rotary_table(cos: Tensor, sin: Tensor, interleaved: bool) -> tuple[Tensor, Tensor] | None:
    """One angle per plane, [positions, rotary_dim / 2], from tables that repeat each angle; None if they don't."""
    half = cos.shape[-1] // 2
    pick: Any = slice(0, None, 2) if interleaved else slice(0, half)
    other: Any = slice(1, None, 2) if interleaved else slice(half, None)
    if cos.shape[-1] % 2 or not (torch.equal(cos[:, pick], cos[:, other]) and torch.equal(sin[:, pick], sin[:, other])):
        return None
    return cos[:, pick].contiguous(), sin[:, pick].contiguous()


def rotate(states: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool) -> Tensor:
    """Rotary position embedding (Su et al., 2021) as onnxruntime's RotaryEmbedding defines it, positions 0, 1, ….

    states [batch, heads, length, head_dim]; cos, sin [positions, rotary_dim / 2]; what is past rotary_dim passes
    through.
    """
    length, rotary_dim = states.shape[2], 2 * cos.shape[-1]
    cos, sin = cos[:length], sin[:length]
    rotated, passed = states[..., :rotary_dim], states[..., rotary_dim:]
    if interleaved:
        first, second = rotated[..., 0::2], rotated[..., 1::2]
        rotated = torch.stack((first * cos - second * sin, second * cos + first * sin), dim=-1).flatten(-2)
    else:
        first, second = rotated.chunk(2, dim=-1)
        rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return torch.cat((rotated, passed), dim=-1)

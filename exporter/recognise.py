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


@dataclass(frozen=True)
class RMSNorm:
    """x / sqrt(mean(x²) + epsilon) · (weight + offset); Gemma's family has offset 1."""

    epsilon: float
    offset: float


def rms_norm(module: nn.Module) -> RMSNorm | None:
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
        turned = torch.stack((first * cos - second * sin, second * cos + first * sin), dim=-1).flatten(-2)
    else:
        first, second = rotated.chunk(2, dim=-1)
        turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return torch.cat((turned, passed), dim=-1)

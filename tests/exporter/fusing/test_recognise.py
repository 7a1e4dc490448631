"""Recognition by evaluation: the right ones are taken, near misses are not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from onnxpress.exporter.fusing import recognise


class PlainRMSNorm(nn.Module):
    def __init__(self, offset: float = 0.0, centred: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))
        self.eps = 1e-5
        self.offset = offset
        self.centred = centred

    def forward(self, states: Tensor) -> Tensor:
        if self.centred:
            states = states - states.mean(-1, keepdim=True)
        return states * torch.rsqrt(states.pow(2).mean(-1, keepdim=True) + self.eps) * (self.weight + self.offset)


def test_rms_norm_and_its_offset() -> None:
    assert recognise.find_rms_norm(PlainRMSNorm()) == recognise.RMSNorm(1e-5, 0.0)
    assert recognise.find_rms_norm(PlainRMSNorm(offset=1.0)) == recognise.RMSNorm(1e-5, 1.0)


def test_weights_may_be_on_the_meta_device() -> None:
    assert recognise.find_rms_norm(PlainRMSNorm().to("meta")) == recognise.RMSNorm(1e-5, 0.0)


@pytest.mark.parametrize(
    "near_miss", [PlainRMSNorm(offset=0.5), PlainRMSNorm(centred=True), nn.LayerNorm(8), nn.Linear(8, 8)]
)
def test_near_misses_are_no_rms_norm(near_miss: nn.Module) -> None:
    assert recognise.find_rms_norm(near_miss) is None


def angles(positions: int, width: int, interleaved: bool) -> tuple[Tensor, Tensor]:
    half = torch.outer(torch.arange(positions).float(), 0.3 ** torch.arange(width // 2).float())
    full = half.repeat_interleave(2, -1) if interleaved else torch.cat((half, half), -1)
    return full.cos(), full.sin()


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("head_dim", [16, 24])
def test_rotary_conventions(interleaved: bool, head_dim: int) -> None:
    cos, sin = angles(9, 16, interleaved)

    def apply(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        table = recognise.rotary_table(cos[0], sin[0], interleaved)
        assert table is not None
        return tuple(recognise.rotate(states, *table, interleaved=interleaved) for states in (query, key))  # type: ignore[return-value]

    assert recognise.rotary_convention(apply, head_dim, cos, sin) is interleaved


def test_rotating_the_other_way_is_not_recognised() -> None:
    cos, sin = angles(9, 16, False)

    def apply(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        turned = lambda states: torch.cat((states[..., 8:], -states[..., :8]), -1)  # noqa: E731
        return query * cos[:, None] + turned(query) * sin[:, None], key * cos[:, None] + turned(key) * sin[:, None]

    assert recognise.rotary_convention(apply, 16, cos, sin) is None


def test_tables_with_an_angle_per_element_have_no_plane() -> None:
    cos = torch.randn(4, 8)
    assert recognise.rotary_table(cos, cos, False) is None

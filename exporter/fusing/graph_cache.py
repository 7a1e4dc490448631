"""The key-value cache of a decoder while it is traced."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache


class GraphCache(Cache):
    """The key-value cache of a traced decoder.

    For GroupQueryAttention new keys and values pass through: the operator appends them to the past itself. Otherwise
    they are concatenated here.
    """

    def __init__(
        self, past: dict[int, tuple[Tensor, Tensor]], past_length: Any, total_length: Any, fused: bool
    ) -> None:
        self.past = past
        self.past_length = past_length
        self.present: dict[int, tuple[Tensor, Tensor]] = {}
        self.total_length = total_length
        self.fused = fused
        self.layers: list[Any] = []
        self._waiting: dict[int, tuple[Tensor, int]] = {}

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *rest: Any, **extra: Any) -> Any:
        if self.fused:
            self._waiting[id(key_states)] = (key_states, layer_idx)
            return key_states, value_states
        past_key, past_value = self.past[layer_idx]
        present = (torch.cat((past_key, key_states), dim=2), torch.cat((past_value, value_states), dim=2))
        self.present[layer_idx] = present
        return present

    def waiting(self, key_states: Tensor) -> int | None:
        """The layer whose new keys these are, if the attention has to append them."""
        found = self._waiting.pop(id(key_states), None)
        return None if found is None else found[1]

    def unconsumed(self) -> bool:
        return bool(self._waiting)

    def get_seq_length(self, layer_idx: int = 0) -> Any:
        return self.past_length

    def get_query_offset(self, layer_idx: int = 0) -> Any:
        return self.past_length

    def get_mask_sizes(self, query_length: Any, layer_idx: int) -> Any:
        return self.total_length, 0

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def is_sliding(self) -> list[bool]:
        return [False] * len(self.past)

    @property
    def is_linear(self) -> list[bool]:
        return [False] * len(self.past)

    @property
    def is_dummy(self) -> list[bool]:
        return [False] * len(self.past)

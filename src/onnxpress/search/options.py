"""What a search is asked for beside its limits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from onnxpress.build.gates import Gates
from onnxpress.search.kernels import KernelTable

Objective = Literal["loss", "size", "latency", "prompt"]


@dataclass(frozen=True)
class SearchOptions:
    """How a search decides between mixes that all meet the limits."""

    minimize: Objective | None = None
    """What is to be least: the loss, the bytes, the time of a token (decoders) or a call, or that of a prompt."""
    kernel_table: KernelTable | None = None
    """Times of another device's kernels; by default those of this machine are measured."""
    structure: bool = False
    """Whether blocks are cut, too, where no recipe says what there is to choose from."""

    def objective(self, gates: Gates) -> Objective:
        """`minimize`, or the first of size, loss and latency that has no limit."""
        if self.minimize is not None:
            return self.minimize
        if gates.max_size is None and gates.max_memory is None and gates.max_loss is not None:
            return "size"
        if gates.max_loss is None:
            return "loss"
        return "latency" if gates.max_latency is None else "loss"

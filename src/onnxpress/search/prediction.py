"""From sums over units to what is measured of a whole model, mended whenever one was measured."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from onnxpress.gates import Gates

MARGIN = 0.97
"""Of what is allowed, what an assignment may use: measurements scatter."""


@dataclass
class Prediction:
    """Sums of costs are of losses in nats (or 1 − cosine), of bytes and of microseconds."""

    loss_factor: float = 1.0
    size_rest: float = 0.0
    """Bytes beside the units."""
    latency_rest: float = 0.0
    """Microseconds beside the units."""
    memory_rest: float = 0.0
    """Bytes of memory beside the weights."""

    def limits(self, gates: Gates) -> dict[str, float]:
        """Upper bounds of the sums of costs, so that the gates hold."""
        found = {}
        if gates.max_loss is not None:
            found["loss"] = MARGIN * math.log1p(gates.max_loss) / self.loss_factor
        sizes = []
        if gates.max_size is not None:
            sizes.append(gates.max_size - self.size_rest)
        if gates.max_memory is not None:
            sizes.append(gates.max_memory - self.memory_rest - self.size_rest)
        if sizes:
            found["size"] = min(sizes)
        if gates.max_latency is not None:
            found["latency"] = MARGIN * 1e3 * gates.max_latency - self.latency_rest
        return found

    def learn(self, sums: Mapping[str, float], found: Mapping[str, float]) -> None:
        """Mend every part by what was measured of an assignment."""
        if sums["loss"] > 0 and found["spent"] > 0:
            self.loss_factor = found["spent"] / sums["loss"]
        self.size_rest = found["size_bytes"] - sums["size"]
        latency = found.get("decode_ms_per_token", found.get("latency_ms"))
        if latency is not None:
            self.latency_rest = 1e3 * latency - sums["latency"]
        if found.get("peak_rss_bytes"):
            self.memory_rest = found["peak_rss_bytes"] - found["size_bytes"]

    def describe(self, name: str, total: float) -> str:
        """A sum of costs as what it will be measured as, with its unit."""
        if name == "size":
            return f"a size of {(total + self.size_rest) / 1e6:.1f} MB"
        if name == "latency":
            return f"a latency of {(total + self.latency_rest) / 1e3:.2f} ms"
        return f"a loss of {math.expm1(total * self.loss_factor):.2%}"

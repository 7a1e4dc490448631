"""Predict what is measured of a whole model from sums over groups, mended whenever one was measured."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from onnxpress.requests import Gates
from onnxpress.search.assignment import Program

MARGIN = 0.97
"""The part of what is allowed that an assignment may use: measurements scatter."""


UNLIKE = 2.0
"""How many times as much as predicted cuts lose where the text that is measured is another kind than they were fitted
to: on text of one kind it is 0.9 to 1.1 times (MiniLM, SmolLM2-135M)."""


DISTRUST = 4.0
"""By how much more a mix is expected to lose that destroyed the model, about which nothing else was measured."""


@dataclass
class Prediction:
    """Sums of costs are of losses in nats (or 1 − cosine), of bytes, of parameters and of microseconds.

    On other text than what they were fitted to, cuts lose several times as much; formats have a factor of their own.
    """

    loss_factor: float = 1.0
    cut_factor: float = 1.0
    size_rest: float = 0.0
    """Bytes beside the groups."""
    parameters_rest: float = 0.0
    """Parameters beside the groups."""
    latency_rest: float = 0.0
    """Microseconds beside the groups."""
    memory_rest: float = 0.0
    """Bytes of memory beside the weights."""

    def expected(self, program: Program) -> Program:
        """Return the same choices, their losses as they are expected of a whole model."""
        choices = [
            replace(one, costs={**one.costs, "loss": self.loss_factor * one.costs["loss"]}) for one in program.choices
        ]
        cuts = [replace(one, costs={"loss": self.cut_factor * one.costs["cut_loss"]}) for one in program.cuts]
        return Program(choices, cuts, program.most)

    def limits(self, gates: Gates) -> dict[str, float]:
        """Return upper bounds of the sums of expected costs, so that the gates hold."""
        limits = {}
        if gates.max_loss is not None:
            limits["loss"] = MARGIN * math.log1p(gates.max_loss)
        sizes = []
        if gates.max_size is not None:
            sizes.append(gates.max_size - self.size_rest)
        if gates.max_memory is not None:
            sizes.append(gates.max_memory - self.memory_rest - self.size_rest)
        if sizes:
            limits["size"] = min(sizes)
        if gates.max_parameters is not None:
            limits["parameters"] = gates.max_parameters - self.parameters_rest
        if gates.max_latency is not None:
            limits["latency"] = MARGIN * 1e3 * gates.max_latency - self.latency_rest
        return limits

    def learn(self, sums: Mapping[str, float], measured: Mapping[str, float]) -> None:
        """Mend every part by what was measured of an assignment.

        Args:
            sums: of its costs as they were before anything was expected; of cuts, `cut_loss`.
            measured: of the whole model; `spent_on_cuts` of the model that was cut and nothing else.
        """
        cuts = measured.get("spent_on_cuts", 0.0)
        if sums.get("cut_loss", 0.0) > 0 and cuts > 0:
            self.cut_factor = cuts / sums["cut_loss"]
        if sums["loss"] > 0 and measured["spent"] > cuts:
            self.loss_factor = (measured["spent"] - cuts) / sums["loss"]
        self.size_rest = measured["size_bytes"] - sums["size"]
        if "parameters" in measured:
            self.parameters_rest = measured["parameters"] - sums["parameters"]
        latency = measured.get("decode_ms_per_token", measured.get("latency_ms"))
        if latency is not None:
            self.latency_rest = 1e3 * latency - sums["latency"]
        if measured.get("peak_rss_bytes"):
            self.memory_rest = measured["peak_rss_bytes"] - measured["size_bytes"]

    def distrust(self, cuts: bool) -> None:
        """Take in that a mix, of cuts where it has any, destroyed the model: losses this large do not add up."""
        if cuts:
            self.cut_factor *= DISTRUST
        else:
            self.loss_factor *= DISTRUST

    def remarks(self) -> list[str]:
        """Say what the user should know of how predictions fared."""
        if self.cut_factor <= UNLIKE:
            return []
        return [
            f"the cuts lose {self.cut_factor:.1f} times what they do on text like what they were fitted to: calibrate "
            f"with text like what the model will read (--calibration)"
        ]

    def describe(self, name: str, total: float) -> str:
        """Describe a sum of expected costs as what it will be measured as, with its unit."""
        if name == "size":
            return f"a size of {(total + self.size_rest) / 1e6:.1f} MB"
        if name == "latency":
            return f"a latency of {(total + self.latency_rest) / 1e3:.2f} ms"
        if name == "parameters":
            return f"{total + self.parameters_rest:,.0f} parameters"
        return f"a loss of {math.expm1(total):.2%}"

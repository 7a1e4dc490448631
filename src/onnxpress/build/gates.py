"""Gates: limits that an artifact is held to before it is put in place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from onnxpress.artifact.artifact import Step
from onnxpress.artifact.manifest import GateRecord
from onnxpress.errors import GateFailedError, UnsupportedModelError


class Share(float):
    """A limit as a part of what the float32 model has."""


@dataclass(frozen=True)
class Gates:
    """Limits, None where there is none."""

    max_loss: float | None = None
    """The rise of perplexity (decoders) or 1 - the mean cosine (the others), as a fraction."""
    max_size: float | None = None
    """Bytes of the graphs with their weights, or a `Share` of them."""
    max_latency: float | None = None
    """Milliseconds per token (decoders) or per call."""
    max_memory: float | None = None
    """Bytes of peak resident memory."""
    max_parameters: float | None = None
    """Numbers in the weights, or a `Share` of them."""

    def of(self, size_bytes: float, parameters: float | None) -> Gates:
        """The same with amounts for shares. Raises UnsupportedModelError for a share of what is not known.

        Args:
            size_bytes, parameters: of the float32 model.
        """
        if isinstance(self.max_parameters, Share) and parameters is None:
            raise UnsupportedModelError(
                f"{self.max_parameters:.0%} of how many parameters? No transformer layers were recognised in the model"
            )
        return replace(
            self,
            max_size=_amount_of(self.max_size, size_bytes),
            max_parameters=_amount_of(self.max_parameters, parameters or 0),
        )

    @property
    def need_benchmark(self) -> bool:
        return self.max_latency is not None or self.max_memory is not None

    def check(self, after: Mapping[str, float]) -> list[GateRecord]:
        """Hold the measured values to every limit that is set."""
        latency = after.get("decode_ms_per_token", after.get("latency_ms"))
        rows = (
            ("max_loss", self.max_loss, after.get("loss")),
            ("max_size_bytes", self.max_size, after.get("size_bytes")),
            ("max_latency_ms", self.max_latency, latency),
            ("max_memory_bytes", self.max_memory, after.get("peak_rss_bytes")),
            ("max_parameters", self.max_parameters, after.get("parameters")),
        )
        return [
            # A value that could not be measured does not pass.
            GateRecord(
                name=name,
                limit=limit,
                value=-1.0 if value is None else value,
                passed=value is not None and value <= limit,
            )
            for name, limit, value in rows
            if limit is not None
        ]


def _amount_of(limit: float | None, whole: float) -> float | None:
    return float(limit * whole) if isinstance(limit, Share) else limit


def require(gates: Sequence[GateRecord], before: Mapping[str, float], steps: Sequence[Step]) -> None:
    """Raise GateFailedError naming every gate that failed and what each pass cost."""
    failed = [gate for gate in gates if not gate.passed]
    if not failed:
        return
    said = "; ".join(
        f"{gate.name.split('_')[1]} {_amount(gate.name, gate.value)} > {_amount(gate.name, gate.limit)}"
        for gate in failed
    )
    spent = ", ".join(costs(before, steps)) or "no pass changed the quality"
    raise GateFailedError(f"gate failed: {said}", hint=f"cost by pass: {spent}; nothing was written")


def costs(before: Mapping[str, float], steps: Sequence[Step]) -> list[str]:
    """`quantize-blocks +0.0031 KL +0.3% perplexity -71% size`, for each step that changed the quality or the size.

    A step after which quality was not measured, or not against the reference, is taken to have changed none of it.
    """
    lines = []
    last = {"KL": 0.0, "1-cosine": 0.0, "perplexity": 0.0}
    last_size = before.get("size_bytes")
    for step in steps:
        parts = []
        for unit, now in _losses(step.metrics):
            change, last[unit] = now - last[unit], now
            if abs(change) >= 5e-5:
                parts.append(f"{change:+.2%} {unit}" if unit == "perplexity" else f"{change:+.4f} {unit}")
        size = step.metrics.get("size_bytes")
        if size is not None:
            if last_size and abs(size / last_size - 1) >= 5e-3:
                parts.append(f"{size / last_size - 1:+.0%} size")
            last_size = size
        if parts:
            lines.append(f"{step.name} {' '.join(parts)}")
    return lines


def _losses(metrics: Mapping[str, float]) -> list[tuple[str, float]]:
    """(unit, what was lost since the reference) for each measure of quality that there is."""
    found = []
    if "kl" in metrics:
        found.append(("KL", metrics["kl"]))
    if "perplexity" in metrics:
        found.append(("perplexity", metrics["perplexity"] / metrics["reference_perplexity"] - 1))
    if "cosine_mean" in metrics:
        found.append(("1-cosine", 1 - metrics["cosine_mean"]))
    return found


def _amount(name: str, value: float) -> str:
    if value < 0:
        return "(not measured)"
    if name.endswith("_bytes"):
        return f"{value / 1e6:.1f} MB"
    if name.endswith("_parameters"):
        return f"{value:,.0f}"
    return f"{value:.1f} ms" if name.endswith("_ms") else f"{value:.2%}"

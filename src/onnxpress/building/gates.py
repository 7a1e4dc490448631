"""Gates that failed: an error that says which pass cost what."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from onnxpress.artifact.artifact import Step
from onnxpress.artifact.manifest import GateRecord
from onnxpress.errors import GateFailedError


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
    """List (unit, what was lost since the reference) for each measure of quality that there is."""
    losses = []
    if "kl" in metrics:
        losses.append(("KL", metrics["kl"]))
    if "perplexity" in metrics:
        losses.append(("perplexity", metrics["perplexity"] / metrics["reference_perplexity"] - 1))
    if "cosine_mean" in metrics:
        losses.append(("1-cosine", 1 - metrics["cosine_mean"]))
    return losses


def _amount(name: str, value: float) -> str:
    if value < 0:
        return "(not measured)"
    if name.endswith("_bytes"):
        return f"{value / 1e6:.1f} MB"
    if name.endswith("_parameters"):
        return f"{value:,.0f}"
    return f"{value:.1f} ms" if name.endswith("_ms") else f"{value:.2%}"

"""Measured figures as text: what each is called, its unit, and before beside after."""

from __future__ import annotations

from collections.abc import Mapping

from onnxpress.artifact.structure_changes import Row

LABELS = {
    "size_bytes": "size",
    "perplexity": "perplexity",
    "loss": "loss",
    "kl": "KL to the reference, worst mode",
    "top1_agreement": "top-1 agreement",
    "cosine_mean": "cosine, mean",
    "cosine_min": "cosine, worst",
    "spearman": "rank correlation",
    "more_tokens": "more tokens for the same text",
    "prefill_tokens_per_s": "prefill",
    "decode_ms_per_token": "decode",
    "latency_ms": "latency",
    "load_s": "load",
    "peak_rss_bytes": "peak memory",
}


def before_after(before: Mapping[str, float], after: Mapping[str, float]) -> list[Row]:
    """(measure, before, after) for everything that was measured, in the order of `LABELS`, the rest after it."""
    keys = [key for key in LABELS if key in before or key in after]
    keys += [key for key in ("kl_prefill", "kl_decode", "kl_padded") if key in after]
    rows = []
    for key in keys:
        change = ""
        if key in before and key in after and key in ("size_bytes", "perplexity") and before[key]:
            ratio = after[key] / before[key]
            change = f" ({ratio:.2f}×)" if key == "size_bytes" else f" ({ratio - 1:+.2%})"
        rows.append((label(key), amount(key, before.get(key)), amount(key, after.get(key)) + change))
    return rows


def label(key: str) -> str:
    if key.startswith("kl_"):
        return f"KL, {key.removeprefix('kl_')}"
    return LABELS.get(key, key.replace("_", " "))


def amount(key: str, value: float | None) -> str:
    """A measured value with its unit."""
    if value is None:
        return "–"
    if key.endswith("_bytes"):
        return f"{value / 1e6:.1f} MB"
    if key in ("loss", "more_tokens") or key.startswith("top1"):
        return f"{value:.2%}"
    if key.endswith("tokens_per_s"):
        return f"{value:,.0f} tokens/s"
    if "ms_per_token" in key:
        return f"{value:.2f} ms/token"
    if key.endswith("_ms"):
        return f"{value:.2f} ms"
    if key.endswith("_s"):
        return f"{value:.2f} s"
    if key.startswith(("kl", "max_difference")):
        return f"{value:.2g}"
    if key.startswith(("cosine", "spearman")):
        return f"{value:.4f}"
    return f"{value:,.0f}" if abs(value) >= 1e6 else f"{value:.4g}"

"""Draw size against loss, a plot a subject. usage: plot_frontier.py FIGURES.json FOLDER

Writes FOLDER/SUBJECT.svg. Runs in its own environment with matplotlib.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt

MARKERS = {
    "onnxpress": ("o", "#c0392b"),
    "llama.cpp": ("s", "#2c6fbb"),
    "onnxruntime-genai": ("^", "#3a8f4d"),
    "onnxruntime": ("D", "#8e6bb5"),
    "Olive": ("v", "#d08b1c"),
}
LEAST = {"decoder": 1e-4, "gpt": 1e-5, "encoder": 1e-5}
LARGEST = 0.5
"""Share of the float32 bytes beyond which a point is left out."""

Point = tuple[float, float, str]


def points(rows: dict[str, dict[str, object]], least: float) -> dict[str, list[Point]]:
    """(MB, loss, variant) by family."""
    full = rows.get("onnxruntime fp32", {}).get("bytes")
    found: dict[str, list[Point]] = {}
    for name, row in rows.items():
        loss = row.get("KL")
        if loss is None and "cosine mean" in row:
            loss = 1 - row["cosine mean"]
        if loss is None or "bytes" not in row or (full and row["bytes"] > LARGEST * full):
            continue
        variant = name.removeprefix(row["family"]).strip()
        found.setdefault(row["family"], []).append((row["bytes"] / 1e6, max(loss, least), variant))
    return found


def frontier(given: list[Point]) -> list[Point]:
    """Points that no smaller one is closer than, by size."""
    kept: list[Point] = []
    for point in sorted(given):
        if not kept or point[1] < kept[-1][1]:
            kept.append(point)
    return kept


def draw(subject: str, rows: dict[str, dict[str, object]], path: Path) -> None:
    found = points(rows, LEAST[subject])
    figure, axes = plt.subplots(figsize=(9, 6))
    ours = found.get("onnxpress", [])
    others = [point for family, part in found.items() if family != "onnxpress" for point in part]
    for part, color, label in (
        (others, "#888888", "frontier of the others"),
        (ours, "#c0392b", "frontier of onnxpress"),
    ):
        edge = frontier(part)
        if edge:
            x, y = [point[0] for point in edge], [point[1] for point in edge]
            axes.step(x, y, where="post", color=color, linewidth=1, alpha=0.6, label=label)
    for family, part in found.items():
        marker, color = MARKERS[family]
        axes.scatter([p[0] for p in part], [p[1] for p in part], marker=marker, color=color, label=family, zorder=3)
        for x, y, variant in part:
            axes.annotate(variant, (x, y), xytext=(5, 3), textcoords="offset points", fontsize=7, color=color)
    axes.set_yscale("log")
    axes.set_xlabel("MB")
    axes.set_ylabel("1 − mean cosine to float32" if subject == "encoder" else "KL divergence from float32, nats")
    axes.grid(which="both", alpha=0.2)
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "onnxpress"  # the same figures give the same file
    figures = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    for subject, rows in figures.get("subjects", {}).items():
        draw(subject, rows, Path(sys.argv[2]) / f"{subject}.svg")


if __name__ == "__main__":
    main()

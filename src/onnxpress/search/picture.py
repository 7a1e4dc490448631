"""A sensitivity profile as a picture: a column for each layer, a row for each part in each format, for each cut, and
for each head."""

from __future__ import annotations

import math
from pathlib import Path

import jinja2

from onnxpress.files.staging import replacing_file
from onnxpress.graph.conventions import layer_of
from onnxpress.search.formats import FLOAT
from onnxpress.search.sensitivity import Measurement
from onnxpress.search.sensitivity_profile import SensitivityProfile

LEAST, MOST = 1e-7, 1.0
"""Losses at the ends of the scale."""


def plot_profile(profile: SensitivityProfile, path: Path, title: str) -> None:
    """Write an SVG; the colour of a cell is the logarithm of its loss. Raises OutputError."""
    environment = jinja2.Environment(loader=jinja2.PackageLoader("onnxpress.report"), autoescape=True)
    cells = [(*place(row.part), row) for row in (*profile.rows, *profile.head_rows) if row.format != FLOAT]
    candidates = {candidate.name: candidate for candidate in profile.candidates}
    cells += [(candidates[row.part].layer, candidates[row.part].stack, row) for row in profile.cut_rows]
    layers = sorted({layer for layer, _, _ in cells})
    rows = sorted({(part, row.format) for _, part, row in cells}, key=lambda row: (row[0], _by_number(row[1])))
    text = environment.get_template("sensitivity.svg.j2").render(
        title=title,
        layers=layers,
        rows=rows,
        cells=[
            {
                "x": layers.index(layer),
                "y": rows.index((part, row.format)),
                "share": share(row.loss),
                "text": f"{row.part}, {row.format}: loss {row.loss:.2g}, error {row.error:.2g}{_size(profile, row)}",
            }
            for layer, part, row in cells
        ],
        scale=[(10.0**power, share(10.0**power)) for power in range(-7, 1)],
    )
    with replacing_file(path) as aside:
        aside.write_text(text, encoding="utf-8")


def place(group: str) -> tuple[int, str]:
    """Return (layer, what it is in the layer); layer −1 for what is outside of all."""
    found = layer_of(f"{group}.")
    if found is None:
        return -1, group.rpartition(".")[2]
    _, layer = found
    return layer, group.partition(f".{layer}.")[2] or group


def _size(profile: SensitivityProfile, row: Measurement) -> str:
    """Without a head, a product is as large as it was: it is measured by what the head puts in it."""
    return "" if row in profile.head_rows else f", {row.nbytes:,} bytes"


def _by_number(name: str) -> tuple[str, int]:
    """head 2 comes before head 10."""
    text, _, number = name.rpartition(" ")
    return (text, int(number)) if number.isdecimal() else (name, 0)


def share(loss: float) -> float:
    """Place a loss on the scale, 0 to 1."""
    return (math.log(min(max(loss, LEAST), MOST)) - math.log(LEAST)) / (math.log(MOST) - math.log(LEAST))

"""The two pages in an artifact: README.md, the model card, and report.html, with what was cut as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import jinja2

from onnxpress.artifact.folder import CARD, GRAPHS, REPORT
from onnxpress.artifact.manifest import Manifest
from onnxpress.artifact.structure import StructureChange
from onnxpress.artifact.structure_changes import BeforeAfter, list_changes
from onnxpress.report.drawing import draw_structure


def write_report(folder: Path, record: Manifest, rows: Sequence[BeforeAfter]) -> None:
    """Write both to an artifact folder. `rows` are (measure, before, after), as the command line shows them."""
    structure = StructureChange.of(record.export)
    content = {
        "record": record,
        "rows": rows,
        "timed": "peak_rss_bytes" in record.metrics,
        "graphs": sorted(path.name for path in (folder / GRAPHS).glob("*.onnx")),
        "changes": list_changes(structure.before, structure.after) if structure is not None else (),
        "drawing": draw_structure(structure) if structure is not None else None,
    }
    for name, template in ((CARD, "model_card.md.j2"), (REPORT, "report.html.j2")):
        environment = jinja2.Environment(
            loader=jinja2.PackageLoader("onnxpress.report"),
            autoescape=name == REPORT,
            trim_blocks=True,
            lstrip_blocks=True,
            undefined=jinja2.StrictUndefined,
        )
        (folder / name).write_text(environment.get_template(template).render(content), encoding="utf-8")

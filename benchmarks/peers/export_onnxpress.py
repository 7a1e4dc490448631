"""onnxpress's exporter as a contender: checkpoint to a saved graph, not verified, like the other exporters.

usage: export_onnxpress.py CHECKPOINT FOLDER [DTYPE] (in onnxpress's environment)
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from onnxpress.artifact.folder import write_graphs, write_sidecar_files
from onnxpress.exporter.export import export
from onnxpress.exporter.sources.source import Checkpoint, resolve_source


def main() -> None:
    folder = Path(sys.argv[2])
    folder.mkdir(parents=True)
    checkpoint = resolve_source(sys.argv[1])
    assert isinstance(checkpoint, Checkpoint)
    dtype: Any = sys.argv[3] if len(sys.argv) > 3 else "float32"
    artifact = export(checkpoint, dtype=dtype)
    write_graphs(artifact.graphs, folder)
    write_sidecar_files(artifact, folder)


if __name__ == "__main__":
    main()

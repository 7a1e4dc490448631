"""onnxpress's exporter as a contender: checkpoint to a saved float32 graph, not verified, like the other exporters.

usage: export_onnxpress.py CHECKPOINT FOLDER (in onnxpress's environment)
"""

from __future__ import annotations

import sys
from pathlib import Path

from onnxpress.artifact_folder import write_companions, write_graphs
from onnxpress.exporter.export import export
from onnxpress.exporter.source import Checkpoint, resolve


def main() -> None:
    folder = Path(sys.argv[2])
    folder.mkdir(parents=True)
    checkpoint = resolve(sys.argv[1])
    assert isinstance(checkpoint, Checkpoint)
    artifact = export(checkpoint)
    write_graphs(artifact.graphs, folder)
    write_companions(artifact, folder)


if __name__ == "__main__":
    main()

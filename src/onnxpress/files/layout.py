"""By what an artifact folder is known."""

from __future__ import annotations

from pathlib import Path

MANIFEST = "artifact.json"


def is_artifact(folder: Path) -> bool:
    return (folder / MANIFEST).is_file()

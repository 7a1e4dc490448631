"""The file that makes a folder an artifact."""

from __future__ import annotations

from pathlib import Path

MANIFEST = "artifact.json"


def is_artifact(folder: Path) -> bool:
    """Whether a folder holds an artifact."""
    return (folder / MANIFEST).is_file()

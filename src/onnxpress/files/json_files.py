"""JSON files beside a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from onnxpress.errors import CorruptFileError


def read_optional_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; {} when there is no such file. Raises CorruptFileError for anything else."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CorruptFileError(f"cannot read {path}: {error}") from error
    if not isinstance(value, dict):
        raise CorruptFileError(f"{path} is not a JSON object")
    return value

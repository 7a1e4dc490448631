"""JSON files beside a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from onnxpress.errors import CorruptFileError


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        CorruptFileError: unreadable, not JSON, or not an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CorruptFileError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CorruptFileError(
            f"{path} is not JSON, cannot read it: {error}", hint="it may be truncated; fetch it again"
        ) from error
    if not isinstance(value, dict):
        raise CorruptFileError(f"{path} is not a JSON object", hint="fetch it again")
    return value


def read_optional_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; {} when there is no such file. Raises CorruptFileError, see `read_json_object`."""
    return read_json_object(path) if path.is_file() else {}

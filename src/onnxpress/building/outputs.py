"""The folders that a build writes: what they are called, and whether they can take what is written."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from onnxpress.errors import UsageError
from onnxpress.files.staging import check_target, replacing


def default_output(model: str) -> Path:
    """Return `./NAME-onnx`, NAME being the last part of what the model is called by."""
    return Path(f"{artifact_name(model)}-onnx")


def artifact_name(model: str) -> str:
    """Name an artifact after the model that it is made of: `owner/My model.gguf` becomes `My-model`."""
    last = re.split(r"[/:]", model.split("@")[0].rstrip("/"))[-1]
    stem = re.sub(r"\.(gguf|onnx)$", "", last)
    return re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip(".-") or "model"


def output_folders(output: str | Path, checkpoint: str | Path | None = None) -> tuple[Path, Path | None]:
    """Return both as paths. Raises UsageError, before the long work, for one that cannot take what is written to it."""
    output, checkpoint = Path(output), None if checkpoint is None else Path(checkpoint)
    check_target(output)
    if checkpoint is not None:
        check_target(checkpoint, option="--checkpoint")
        if checkpoint.resolve() == output.resolve():
            raise UsageError("--checkpoint and --output are the same folder", hint="give the checkpoint one of its own")
    return output, checkpoint


@contextmanager
def checkpoint_folder(checkpoint: Path | None) -> Iterator[Path | None]:
    """Yield an empty folder that becomes `checkpoint` if all goes well; None if none is wanted."""
    if checkpoint is None:
        yield None
        return
    with replacing(checkpoint, option="--checkpoint") as stage:
        yield stage.result

"""artifact.json: what an artifact is, where it came from, how it was made, what it measured, and its files' hashes."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from onnxpress._version import __version__
from onnxpress.artifact.artifact import Source, Step
from onnxpress.errors import BadInputError, CorruptFileError, SourceNotFoundError, VerificationError
from onnxpress.files.layout import MANIFEST

_VERSIONS = ("onnxruntime", "onnx", "onnx-ir", "onnxscript", "numpy", "torch", "transformers")


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class SourceRecord(_Record):
    """`onnxpress.artifact.artifact.Source`."""

    name: str
    kind: str
    revision: str | None = None
    licence: str | None = None
    sha256: str | None = None


class StepRecord(_Record):
    """`onnxpress.artifact.artifact.Step`, plus the bytes of the graph's files after it."""

    name: str
    options: dict[str, Any] = {}
    seconds: float
    matched: dict[str, int] = {}
    skipped: dict[str, int] = {}
    errors: dict[str, float] = {}
    metrics: dict[str, float] = {}

    @classmethod
    def of(cls, step: Step) -> StepRecord:
        """Convert a step to its record in the manifest."""
        return cls.model_validate(
            {
                "name": step.name,
                "options": dict(step.options),
                "seconds": round(step.seconds, 3),
                "matched": dict(step.matched),
                "skipped": dict(step.skipped),
                "errors": {weight: float(f"{error:.4g}") for weight, error in step.errors.items()},
                "metrics": dict(step.metrics),
            }
        )


class GateRecord(_Record):
    """A limit that the artifact was held to; `value` and `limit` are in the unit that the name ends in."""

    name: str
    limit: float
    value: float
    passed: bool


class FileRecord(_Record):
    bytes: int
    sha256: str


class Manifest(_Record):
    """The whole of artifact.json. Fields are only added with a new schema version."""

    schema_version: Literal[1] = 1
    name: str
    task: str
    model_type: str | None = None
    source: SourceRecord
    export: dict[str, Any] = {}
    profile: str
    session_options: dict[str, str] = {}
    """That the profile asks for when the graph is loaded."""
    recipe: dict[str, Any] | None = None
    """As its TOML file, every `auto` resolved; null for a bare export."""
    steps: list[StepRecord] = []
    before: dict[str, float] = {}
    """The reference: the exported graph in fp32, measured like `metrics`."""
    metrics: dict[str, float] = {}
    """The artifact: quality against the reference, speed and memory on the machine that built it."""
    gates: list[GateRecord] = []
    machine: str = ""
    versions: dict[str, str] = {}
    files: dict[str, FileRecord] = Field(default={})
    """Every file of the artifact but this one, by its path with forward slashes."""

    def to_json(self) -> str:
        """Write the text of artifact.json."""
        return self.model_dump_json(indent=2) + "\n"


def read(folder: Path) -> Manifest:
    """Read the manifest of an artifact folder.

    Raises SourceNotFoundError where there is none, CorruptFileError where it does not follow the schema.
    """
    path = folder / MANIFEST
    try:
        return Manifest.model_validate_json(path.read_bytes())
    except FileNotFoundError as error:
        raise SourceNotFoundError(
            f"{folder} is not an artifact: it has no {MANIFEST}", hint="make one with: onnxpress build MODEL"
        ) from error
    except OSError as error:
        raise BadInputError(f"cannot read {path}: {error.strerror}") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "file"
        raise CorruptFileError(f"{path}: {where}: {first['msg']}") from error


def source_record(source: Source) -> SourceRecord:
    """Convert a source to its record in the manifest."""
    return SourceRecord(
        name=source.name, kind=source.kind, revision=source.revision, licence=source.licence, sha256=source.sha256
    )


def hash_files(folder: Path) -> dict[str, FileRecord]:
    """Take size and sha256 of every file below `folder` but the manifest itself."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST)
    return {
        path.relative_to(folder).as_posix(): FileRecord(bytes=path.stat().st_size, sha256=sha256(path))
        for path in paths
    }


def check_files(folder: Path, files: dict[str, FileRecord]) -> None:
    """Raise VerificationError for the first file that is missing, has another hash, or is not in the manifest."""
    for name, record in files.items():
        path = folder / name
        if not path.is_file():
            raise VerificationError(f"{name} is missing from {folder}", hint="build the artifact again")
        if path.stat().st_size != record.bytes or sha256(path) != record.sha256:
            raise VerificationError(f"{name} is not the file that was built: its sha256 differs")
    for name in sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()):
        if name != MANIFEST and name not in files:
            raise VerificationError(f"{name} is in {folder} but not in {MANIFEST}")


def sha256(path: Path) -> str:
    """Hash a file, as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def versions() -> dict[str, str]:
    """Find the versions of onnxpress, Python and the packages that shape an artifact, as far as they are installed."""
    found = {"onnxpress": __version__, "python": platform.python_version()}
    for name in _VERSIONS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def machine() -> str:
    """Name the CPU, as /proc/cpuinfo names it, or the architecture."""
    try:
        lines: Iterable[str] = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = ()
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            return value.strip()
    return platform.machine()

"""What can be asked of a finished artifact: how good it is, how fast, and whether it is still what was built."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from onnxpress.artifact import manifest
from onnxpress.artifact.artifact import Artifact
from onnxpress.artifact.golden import replay_golden
from onnxpress.build.resolving import resolve
from onnxpress.errors import UsageError
from onnxpress.evaluation.benchmark import benchmark as measure_speed
from onnxpress.evaluation.evaluate import evaluate as measure_quality
from onnxpress.evaluation.opening import find_graphs
from onnxpress.files.layout import is_artifact
from onnxpress.progress import Progress
from onnxpress.runtime_profiles import profile as profiles


def evaluate(
    model: str,
    *,
    reference: str | None = None,
    text: Path | None = None,
    pairs: Path | None = None,
    threads: int | None = None,
    offline: bool = False,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Compare two of {artifact, ONNX, checkpoint}; the default reference is the source that the artifact names."""
    progress = progress or Progress(enabled=False)
    if reference is None:
        if not is_artifact(Path(model)):
            raise UsageError(f"{model} is not an artifact: it names no source", hint="give one with --reference")
        reference = manifest.read(Path(model)).source.name
    flags = {"offline": offline, "allow_pickle": allow_pickle, "trust_remote_code": trust_remote_code}
    sides = [_measurable(side, flags, progress) for side in (model, reference)]
    with progress.stage("evaluating") as update:
        found = measure_quality(
            *sides, text=text, pairs=pairs, threads=threads, progress=lambda what, *done: update(*done)
        )
    return found.to_dict()


def benchmark(
    folder: Path,
    *,
    profile: str | None = None,
    operators: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Speed and memory of an artifact or an ONNX file, with the session options of `profile` or of the artifact.

    Raises UsageError for a checkpoint.
    """
    progress = progress or Progress(enabled=False)
    if folder.is_dir() and not find_graphs(folder):
        raise UsageError(
            f"{folder} has no ONNX graph to benchmark",
            hint="a checkpoint: onnxpress build, or export, first",
        )
    options = dict(profiles.load_profile(profile).session_options) if profile else None
    with progress.stage("measuring speed and memory"):
        return measure_speed(folder, threads=threads, session_options=options, profile=operators).to_dict()


def verify(folder: Path, *, progress: Progress | None = None) -> dict[str, Any]:
    """Check the files of an artifact and replay its golden outputs. Raises VerificationError where either fails."""
    progress = progress or Progress(enabled=False)
    record = manifest.read(folder)
    with progress.stage("hashing"):
        manifest.check_files(folder, record.files)
    with progress.stage("replaying golden outputs"):
        replayed = replay_golden(folder)
    return {"files": len(record.files), **replayed}


def _measurable(model: str, flags: Mapping[str, bool], progress: Progress) -> Any:
    """What `onnxpress.evaluation.evaluate` can open: a path to ONNX or an artifact, or a Checkpoint."""
    path = Path(model)
    if path.suffix == ".onnx" or is_artifact(path):
        return path
    found = resolve(model, progress=progress, **flags)
    return path if isinstance(found, Artifact) else found

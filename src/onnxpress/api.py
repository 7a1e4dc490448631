"""The functions of the Python API for a model that is there: evaluate, benchmark, inspect, verify, load_artifact.

Those that make one, `build`, `export` and `optimize`, are in `onnxpress.pipeline`; `import onnxpress` offers them all.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from onnxpress.artifact import manifest
from onnxpress.artifact.artifact import Artifact
from onnxpress.artifact.folder import graph_paths
from onnxpress.artifact.golden import replay_golden
from onnxpress.artifact.manifest import Manifest
from onnxpress.building.resolving import open_any, resolve
from onnxpress.errors import UsageError
from onnxpress.evaluation.benchmark import Benchmark
from onnxpress.evaluation.benchmark import benchmark as measure_speed
from onnxpress.evaluation.evaluate import Evaluation
from onnxpress.evaluation.evaluate import evaluate as measure_quality
from onnxpress.evaluation.opening import find_graphs
from onnxpress.files.layout import is_artifact
from onnxpress.generation.generate import TextGenerator, embed
from onnxpress.progress import Progress
from onnxpress.report import overview
from onnxpress.report.overview import Overview
from onnxpress.requests import Judging, ModelSource
from onnxpress.runtime_profiles import profile as profiles

if TYPE_CHECKING:
    from onnxpress.exporter.sources.checkpoint import Checkpoint


@dataclass(frozen=True)
class Verification:
    """The outcome of `verify`: how many files have the right hash, and how far off outputs are."""

    files: int
    max_difference: float | None = None
    """The largest difference of a log-probability from the golden ones; None for models without a vocabulary."""
    cosine_min: float | None = None
    """The smallest cosine of an output with the golden one; None for models with a vocabulary."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, figures that do not apply left out."""
        return {key: value for key, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class ArtifactFolder:
    """An artifact on disk, see `load_artifact`."""

    path: Path
    manifest: Manifest
    """The content of its artifact.json."""
    graphs: Mapping[str, Path]
    """ONNX files by graph name: `model`; for encoder-decoders `encoder_model`, `decoder_model` and the others."""

    def text_generator(self, threads: int | None = None) -> TextGenerator:
        """Open a decoder or an encoder-decoder for writing. Raises BadInputError for other models."""
        return TextGenerator(self.path, threads=threads)

    def generate(self, prompt: str, *, threads: int | None = None, **options: Any) -> Iterator[str]:
        """Yield what a decoder answers, piece by piece; options: those of `TextGenerator.stream`."""
        yield from self.text_generator(threads).stream(prompt, **options)

    def embed(self, texts: Sequence[str], *, threads: int | None = None) -> NDArray[np.float32]:
        """Compute vectors [texts, width] of length 1 with a text encoder. Raises BadInputError for other models."""
        return embed(self.path, texts, threads=threads)


def evaluate(
    model: str | Path | ModelSource,
    reference: str | Path | None = None,
    *,
    judging: Judging | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Compare two of {artifact, ONNX, checkpoint}; the default reference is the source that the artifact names.

    Args:
        model: what is measured; what it allows holds for the reference, too.
        judging: its text, pairs and threads count here.

    Raises UsageError where no reference is known, BadInputError where the two cannot be compared, VerificationError
    where an output is NaN or infinite.
    """
    model, judging, progress = ModelSource.of(model), judging or Judging(), progress or Progress(enabled=False)
    if reference is None:
        if not is_artifact(Path(model.model)):
            raise UsageError(f"{model.model} is not an artifact: it names no source", hint="give one with --reference")
        reference = manifest.read(Path(model.model)).source.name
    sides = [_openable(side, progress) for side in (model, replace(model, model=str(reference)))]
    with progress.stage("evaluating") as update:
        opened = [open_any(side, threads=judging.threads, all_logits=True) for side in sides]
        return measure_quality(
            *opened, text=judging.text, pairs=judging.pairs, threads=judging.threads, progress=update
        )


def benchmark(
    model: str | Path,
    *,
    profile: str | None = None,
    operators: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Benchmark:
    """Measure speed and memory of an artifact or an ONNX file, in a process of its own.

    Args:
        profile: the name of the target whose session options are used; None: the artifact's own.
        operators: measure where the time goes, too, by operator.

    Raises UsageError for a checkpoint.
    """
    path, progress = Path(model), progress or Progress(enabled=False)
    if path.is_dir() and not find_graphs(path):
        raise UsageError(
            f"{path} has no ONNX graph to benchmark",
            hint="a checkpoint: onnxpress build, or export, first",
        )
    options = dict(profiles.load_profile(profile).session_options) if profile else None
    with progress.stage("measuring speed and memory"):
        return measure_speed(path, threads=threads, session_options=options, profile=operators)


def inspect(model: str | Path, *, profile: str = "cpu") -> Overview:
    """Read what is in an artifact, an ONNX file or a folder with ONNX files, and what the target would object to.

    Raises SourceNotFoundError where there is no graph, CorruptFileError for a broken one.
    """
    return overview.inspect(str(model), profiles.load_profile(profile))


def verify(folder: str | Path, *, progress: Progress | None = None) -> Verification:
    """Check the files of an artifact and replay its golden outputs. Raises VerificationError where either fails."""
    folder, progress = Path(folder), progress or Progress(enabled=False)
    record = manifest.read(folder)
    with progress.stage("hashing"):
        manifest.check_files(folder, record.files)
    with progress.stage("replaying golden outputs"):
        return Verification(len(record.files), **replay_golden(folder))


def load_artifact(folder: str | Path) -> ArtifactFolder:
    """Read the manifest of an artifact and find its graphs; no weights are read, no session is opened.

    Raises SourceNotFoundError where there is no artifact, CorruptFileError where it is damaged.
    """
    folder = Path(folder)
    return ArtifactFolder(folder, manifest.read(folder), graph_paths(folder))


def _openable(source: ModelSource, progress: Progress) -> Path | Checkpoint:
    """Resolve a source to what `open_any` takes: a path to ONNX or to an artifact, or a Checkpoint."""
    path = Path(source.model)
    if path.suffix == ".onnx" or is_artifact(path):
        return path
    found = resolve(source, progress)
    return path if isinstance(found, Artifact) else found

"""onnxpress: a transformer in, the smallest and fastest verified ONNX artifact out.

The names below are the Python API, see docs/guide/python.md. Importing this package imports nothing heavy: each name is
looked up in its module when it is asked for.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from onnxpress._version import __version__

if TYPE_CHECKING:
    from onnxpress.api import ArtifactFolder, Verification, benchmark, evaluate, inspect, load_artifact, verify
    from onnxpress.artifact.artifact import Step
    from onnxpress.artifact.manifest import Manifest
    from onnxpress.calibration.data import CalibrationData
    from onnxpress.errors import OnnxpressError
    from onnxpress.evaluation.benchmark import Benchmark
    from onnxpress.evaluation.quality import Evaluation
    from onnxpress.pipeline import BuildResult, build, export, optimize
    from onnxpress.report.overview import Overview
    from onnxpress.requests import Gates, Judging, ModelSource, SearchOptions, Share

__all__ = [
    "ArtifactFolder",
    "Benchmark",
    "BuildResult",
    "CalibrationData",
    "Evaluation",
    "Gates",
    "Judging",
    "Manifest",
    "ModelSource",
    "OnnxpressError",
    "Overview",
    "SearchOptions",
    "Share",
    "Step",
    "Verification",
    "__version__",
    "benchmark",
    "build",
    "evaluate",
    "export",
    "inspect",
    "load_artifact",
    "optimize",
    "verify",
]

_MODULES = {
    "onnxpress.api": ("ArtifactFolder", "Verification", "benchmark", "evaluate", "inspect", "load_artifact", "verify"),
    "onnxpress.artifact.artifact": ("Step",),
    "onnxpress.artifact.manifest": ("Manifest",),
    "onnxpress.calibration.data": ("CalibrationData",),
    "onnxpress.errors": ("OnnxpressError",),
    "onnxpress.evaluation.benchmark": ("Benchmark",),
    "onnxpress.evaluation.quality": ("Evaluation",),
    "onnxpress.pipeline": ("BuildResult", "build", "export", "optimize"),
    "onnxpress.report.overview": ("Overview",),
    "onnxpress.requests": ("Gates", "Judging", "ModelSource", "SearchOptions", "Share"),
}


def __getattr__(name: str) -> Any:
    """Import a name of the API when it is first used."""
    for module, names in _MODULES.items():
        if name in names:
            return getattr(import_module(module), name)
    raise AttributeError(f"module 'onnxpress' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__

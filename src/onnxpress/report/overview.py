"""Inspect every graph of a model, and say what the target would mind."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from onnxpress.artifact import manifest
from onnxpress.artifact.folder import graph_paths
from onnxpress.artifact.structure import StructureChange
from onnxpress.errors import SourceNotFoundError
from onnxpress.files.layout import is_artifact
from onnxpress.graph.io import load_graph
from onnxpress.report.inspection import Inspection, inspect_graph
from onnxpress.runtime_profiles.profile import Profile

CONTEXTS = (512, 2048, 8192)
"""Context lengths that memory is estimated for."""
_INTEGER_PRODUCTS = ("MatMulInteger", "DynamicQuantizeMatMul", "MatMulIntegerToFloat", "QLinearMatMul")


@dataclass(frozen=True)
class Overview:
    """The outcome of `inspect`: what is in each graph, and what the target would mind."""

    graphs: dict[str, Inspection]
    """By file name."""
    profile: str
    warnings: list[str]
    structure: StructureChange | None = None
    """What was cut, where that is an artifact's."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, with the memory at some context lengths."""
        graphs = {}
        for name, found in self.graphs.items():
            row = {key: value for key, value in asdict(found).items() if not key.startswith("_")}
            row["memory"] = {str(context): asdict(found.memory(context)) for context in CONTEXTS}
            graphs[name] = row
        structure = self.structure.to_dict() if self.structure is not None else None
        return {"graphs": graphs, "profile": self.profile, "warnings": self.warnings, "structure": structure}


def inspect(model: str, profile: Profile) -> Overview:
    """Inspect an artifact folder, an ONNX file, or a folder with ONNX files.

    Raises SourceNotFoundError where there is none, and what `load_graph` raises for a broken one.
    """
    path = Path(model)
    structure = None
    if is_artifact(path):
        structure = StructureChange.of(manifest.read(path).export)
        files = list(graph_paths(path).values())
    else:
        files = [path] if path.is_file() else sorted(path.rglob("*.onnx"))
    if not files:
        raise SourceNotFoundError(f"no ONNX graph at {model}", hint="give an artifact, an ONNX file or a folder")
    loaded = {file.name: load_graph(file) for file in files}
    warnings = [warning for name, graph in loaded.items() for warning in objections(name, graph, profile)]
    found = {name: inspect_graph(graph) for name, graph in loaded.items()}
    return Overview(found, profile.name, warnings, structure)


def objections(name: str, model: ir.Model, profile: Profile) -> list[str]:
    """List what the target would refuse, get wrong or be slow with, each with the reason."""
    reasons = []
    opset = model.opset_imports.get("", 0)
    if opset > profile.opset:
        reasons.append(f"{name}: opset {opset} is newer than {profile.opset}, the newest that {profile.name} takes")
    if (model.ir_version or 0) > profile.ir_version:
        reasons.append(f"{name}: IR version {model.ir_version} is newer than {profile.ir_version} of {profile.name}")
    signed = sum(map(_multiplies_signed_bytes, model.graph.all_nodes()))
    if signed and profile.saturates:
        reasons.append(
            f"{name}: {signed} products with signed 8-bit weights saturate on x86 without VNNI: "
            "use unsigned weights, or the session option session.x64quantprecision"
        )
    weights = (value.const_value for value in model.graph.initializers.values())
    if "float16" not in profile.dtypes and any(
        item is not None and item.dtype == ir.DataType.FLOAT16 for item in weights
    ):
        reasons.append(f"{name}: float16 weights, for which {profile.name} has no fast kernels")
    return reasons


def _multiplies_signed_bytes(node: ir.Node) -> bool:
    if node.op_type not in _INTEGER_PRODUCTS:
        return False
    constants = (value.const_value for value in node.inputs if value is not None)
    return any(item is not None and item.dtype == ir.DataType.INT8 for item in constants)

"""What is in a graph: parameters, bytes and format by layer, operators, memory at run time, and what a target minds."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import onnx_ir as ir

from onnxpress import artifact_folder, manifest
from onnxpress.errors import SourceNotFoundError
from onnxpress.graph_io import load_graph
from onnxpress.runtime_profiles.profile import Profile, cpu_flags

_LAYER = re.compile(r"\.(?:layers|layer|h|blocks|block)\.(\d+)\.")
_EMBEDDING = re.compile(r"embed|wte|wpe|lm_head", re.IGNORECASE)


@dataclass
class Group:
    """The weights of one layer, of the embeddings and the head, or of the rest."""

    name: str
    parameters: int = 0
    formats: Counter[str] = field(default_factory=Counter)
    """Bytes by format."""

    @property
    def nbytes(self) -> int:
        return sum(self.formats.values())


@dataclass
class Graph:
    """One file."""

    file: str
    opset: dict[str, int]
    ir_version: int
    nodes: int
    operators: dict[str, int]
    """Count by `domain.Operator`, most frequent first."""
    inputs: dict[str, str]
    outputs: dict[str, str]
    groups: list[Group]
    cache_bytes_per_token: int
    """Keys and values that each token of context adds, for one row."""

    @property
    def parameters(self) -> int:
        return sum(group.parameters for group in self.groups)

    @property
    def weight_bytes(self) -> int:
        return sum(group.nbytes for group in self.groups)

    def memory_bytes(self, context: int) -> int:
        """Weights and cache at a context length; activations and the runtime itself come on top."""
        return self.weight_bytes + context * self.cache_bytes_per_token


@dataclass
class Inspection:
    graphs: list[Graph]
    profile: str
    warnings: list[str]

    def to_dict(self) -> dict[str, Any]:
        found = asdict(self)
        for shown, graph in zip(found["graphs"], self.graphs, strict=True):
            shown |= {"parameters": graph.parameters, "weight_bytes": graph.weight_bytes}
            shown["memory_bytes"] = {str(context): graph.memory_bytes(context) for context in (512, 2048, 8192)}
            for group, source in zip(shown["groups"], graph.groups, strict=True):
                group["bytes"] = source.nbytes
        return found


def inspect(model: str, profile: Profile) -> Inspection:
    """Inspect an artifact folder, an ONNX file, or a folder with ONNX files.

    Raises SourceNotFoundError where there is none, and what `load_graph` raises for a broken one.
    """
    path = Path(model)
    if path.is_dir():
        files = (
            list(artifact_folder.graph_paths(path).values())
            if manifest.is_artifact(path)
            else sorted(path.rglob("*.onnx"))
        )
    else:
        files = [path] if path.is_file() else []
    if not files:
        raise SourceNotFoundError(
            f"no ONNX graph at {model}", hint="inspect takes an artifact, an ONNX file or a folder"
        )
    loaded = [(file.name, load_graph(file)) for file in files]
    warnings = [warning for name, graph in loaded for warning in objections(name, graph, profile)]
    return Inspection([describe(name, graph) for name, graph in loaded], profile.name, warnings)


def describe(name: str, model: ir.Model) -> Graph:
    """Everything about one graph that needs no weights."""
    nodes = list(model.graph.all_nodes())
    operators = Counter(f"{node.domain}.{node.op_type}" if node.domain else node.op_type for node in nodes)
    return Graph(
        file=name,
        opset=dict(model.opset_imports),
        ir_version=model.ir_version or 0,
        nodes=len(nodes),
        operators=dict(operators.most_common()),
        inputs={value.name or "": _type(value) for value in model.graph.inputs},
        outputs={value.name or "": _type(value) for value in model.graph.outputs},
        groups=_groups(model),
        cache_bytes_per_token=sum(map(_cache_bytes, model.graph.inputs)),
    )


def objections(name: str, model: ir.Model, profile: Profile) -> list[str]:
    """What the target would refuse or get wrong, each with the reason."""
    found = []
    opset = model.opset_imports.get("", 0)
    if opset > profile.opset:
        found.append(f"{name}: opset {opset} is newer than {profile.opset}, the newest that {profile.name} takes")
    if (model.ir_version or 0) > profile.ir_version:
        found.append(f"{name}: IR version {model.ir_version} is newer than {profile.ir_version} of {profile.name}")
    signed = [node for node in model.graph.all_nodes() if _multiplies_signed_bytes(node)]
    if signed and profile.host is not None and "x86_64" in profile.host.architecture:
        vnni = any(any("vnni" in flag for flag in flags) for flags in profile.host.flags)
        if not vnni and profile.session_options.get("session.x64quantprecision") != "1":
            found.append(
                f"{name}: {len(signed)} products with signed 8-bit weights saturate on AVX2 without VNNI: "
                "use unsigned weights, or the session option session.x64quantprecision"
            )
    if (
        model.graph.inputs
        and any(
            tensor.const_value is not None and tensor.const_value.dtype == ir.DataType.FLOAT16
            for tensor in model.graph.initializers.values()
        )
        and "float16" not in profile.dtypes
    ):
        found.append(f"{name}: float16 weights, for which {profile.name} has no fast kernels")
    return found


def saturates_here(model: ir.Model) -> bool:
    """Whether the graph has signed 8-bit products and this CPU is an x86 without VNNI."""
    flags = cpu_flags()
    vnni = any("vnni" in flag for flag in flags)
    return "avx2" in flags and not vnni and any(map(_multiplies_signed_bytes, model.graph.all_nodes()))


def _multiplies_signed_bytes(node: ir.Node) -> bool:
    if node.op_type not in ("MatMulInteger", "DynamicQuantizeMatMul", "MatMulIntegerToFloat", "QLinearMatMul"):
        return False
    return any(
        value is not None and value.const_value is not None and value.const_value.dtype == ir.DataType.INT8
        for value in node.inputs
    )


def _groups(model: ir.Model) -> list[Group]:
    layers: dict[int, Group] = {}
    edges, rest = Group("embeddings and head"), Group("other")
    for graph in model.graphs():
        for value in graph.initializers.values():
            tensor = value.const_value
            if tensor is None:
                continue
            name = f".{value.name}"
            found = _LAYER.search(name)
            if found:
                group = layers.setdefault(int(found[1]), Group(f"layer {int(found[1])}"))
            else:
                group = edges if _EMBEDDING.search(name) else rest
            label = artifact_folder.weight_format(value) or tensor.dtype.name.lower()
            group.formats[label] += tensor.nbytes
            group.parameters += artifact_folder.parameter_count(value)
    return [group for group in (edges, *(layers[index] for index in sorted(layers)), rest) if group.formats]


def _cache_bytes(value: ir.Value) -> int:
    """Bytes per token of a cache input [batch, heads, past, head_dim]; 0 for other inputs."""
    if not (value.name or "").startswith("past_key_values.") or value.shape is None or len(value.shape) != 4:
        return 0
    heads, head_dim = value.shape[1], value.shape[3]
    if not isinstance(heads, int) or not isinstance(head_dim, int) or value.dtype is None:
        return 0
    return int(heads * head_dim * value.dtype.itemsize)


def _type(value: ir.Value) -> str:
    dims = ", ".join(str(dim) for dim in value.shape) if value.shape is not None else "?"
    return f"{value.dtype.name.lower() if value.dtype is not None else '?'}[{dims}]"


def summary(formats: Mapping[str, int]) -> str:
    """`4-bit 3.1 MB, float32 0.2 MB`, the largest first."""
    ordered = sorted(formats.items(), key=lambda item: -item[1])
    return ", ".join(f"{name} {nbytes / 1e6:.2f} MB" for name, nbytes in ordered)

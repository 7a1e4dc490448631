"""Traced checkpoints kept in the user's cache: graphs without weights, and which checkpoint tensor each parameter is.

An entry is found again by everything that it depends on: the config, the task, names, shapes and types of the
checkpoint's tensors, the versions of torch and transformers, and the exporter's own source. It holds no weights and no
code: ONNX graphs and one JSON file.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnx_ir as ir

from onnxpress.errors import OnnxpressError
from onnxpress.exporter.sources.checkpoint import Checkpoint
from onnxpress.exporter.tracing.binding import unbound
from onnxpress.files.cache import cache_folder, new_folder
from onnxpress.graph.io import copy_graph, load_graph, save_graph
from onnxpress.graph.tensors import WeightTensor, concrete_shape

logger = logging.getLogger(__name__)

KEEP = 32
"""How many entries stay in the cache; the least recently used go."""


@dataclass
class TracedCheckpoint:
    """A checkpoint as graphs whose parameters are unbound (but for the method `fallback`); an entry of the cache."""

    task: str
    graphs: dict[str, ir.Model]
    """By name; parameters are initializers without values."""
    parameters: Mapping[str, WeightTensor]
    """The checkpoint tensor of every parameter."""
    described: dict[str, Any]
    """The export as artifact.json describes it."""


def entry_key(checkpoint: Checkpoint, task: str | None, context_length: int | None) -> str | None:
    """A digest of all that this export depends on; None for a model whose code comes with it."""
    if checkpoint.trust_remote_code:
        return None
    facts = {
        "config": dict(checkpoint.config),
        "task": [task, checkpoint.task],
        "context_length": context_length,
        "pooling": checkpoint.pooling.model_dump() if checkpoint.pooling is not None else None,
        "tensors": sorted(
            (name, list(concrete_shape(tensor)), tensor.dtype.name) for name, tensor in checkpoint.tensors.items()
        ),
        "versions": [version("torch"), version("transformers"), version("onnx-ir"), _own_source()],
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:32]


def _own_source() -> str:
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parents[1].rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def load_entry(key: str, checkpoint: Checkpoint) -> TracedCheckpoint | None:
    """The entry kept under `key`, its parameters pointing into `checkpoint`; None if none can be read."""
    folder = _folder() / key
    if not folder.is_dir():
        return None
    try:
        facts = json.loads((folder / "entry.json").read_text(encoding="utf-8"))
        graphs = {name: load_graph(folder / f"{name}.onnx") for name in facts["graphs"]}
        for graph in graphs.values():
            for graph_input in list(graph.graph.inputs):
                if graph_input.name in facts["parameters"]:
                    graph.graph.inputs.remove(graph_input)
                    graph.graph.initializers.add(graph_input)
        parameters = {name: checkpoint.tensors[tensor] for name, tensor in facts["parameters"].items()}
        folder.touch()
    except (OnnxpressError, OSError, ValueError, KeyError) as error:
        logger.warning("an entry of the export cache cannot be used, tracing again: %s", error)
        shutil.rmtree(folder, ignore_errors=True)
        return None
    return TracedCheckpoint(facts["task"], graphs, parameters, facts["described"])


def store_entry(key: str, traced: TracedCheckpoint, checkpoint: Checkpoint) -> TracedCheckpoint | None:
    """Keep an entry, unless weights are part of it or are computed from more than one tensor, and return it as
    `load_entry` finds it. A cache that cannot be written is no reason to fail: then, too, the result is None."""
    names = {id(tensor): name for name, tensor in checkpoint.tensors.items()}
    needed = {name for graph in traced.graphs.values() for name in unbound(graph)}
    if not needed or any(id(traced.parameters[name]) not in names for name in needed):
        return None
    facts = {
        "task": traced.task,
        "graphs": list(traced.graphs),
        "parameters": {name: names[id(tensor)] for name, tensor in traced.parameters.items() if id(tensor) in names},
        "described": traced.described,
    }
    try:
        with new_folder(_folder() / key) as folder:
            for graph_name, graph in traced.graphs.items():
                unweighted = copy_graph(graph)
                for name in unbound(unweighted):  # ONNX knows no initializer without a value
                    unweighted.graph.inputs.append(unweighted.graph.initializers.pop(name))
                save_graph(unweighted, folder / f"{graph_name}.onnx")
            (folder / "entry.json").write_text(json.dumps(facts, indent=1), encoding="utf-8")
        kept = sorted(_folder().iterdir(), key=lambda path: path.stat().st_mtime, reverse=True)
        for old in kept[KEEP:]:
            shutil.rmtree(old, ignore_errors=True)
    except (OnnxpressError, OSError) as error:
        logger.warning("the export was not kept in the cache: %s", error)
        return None
    return load_entry(key, checkpoint)


def _folder() -> Path:
    return cache_folder() / "exports"

"""What tracing found, kept in the user's cache: graphs without weights, and which checkpoint tensor each parameter is.

A blueprint is found again by everything that it depends on: the config, the task, names, shapes and types of the
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
from onnxpress.exporter.sources.weights import TensorSource
from onnxpress.exporter.tracing.lowering import unbound
from onnxpress.files.cache import cache_folder, new_folder
from onnxpress.graph.io import copy_graph, load_graph, save_graph

logger = logging.getLogger(__name__)

KEEP = 32
"""How many blueprints stay in the cache; the least recently used go."""


@dataclass
class Blueprint:
    task: str
    graphs: dict[str, ir.Model]
    """By file stem; parameters are initializers without values."""
    sources: Mapping[str, TensorSource]
    """By parameter."""
    described: dict[str, Any]
    """What artifact.json says of the export."""


def key(checkpoint: Checkpoint, task: str | None, context_length: int | None) -> str | None:
    """What this export depends on, as a name; None for a model whose code comes with it."""
    if checkpoint.trust_remote_code:
        return None
    facts = {
        "config": dict(checkpoint.config),
        "task": [task, checkpoint.task],
        "context_length": context_length,
        "pooling": checkpoint.pooling.model_dump() if checkpoint.pooling is not None else None,
        "tensors": sorted((name, list(source.shape), source.dtype.name) for name, source in checkpoint.tensors.items()),
        "versions": [version("torch"), version("transformers"), version("onnx-ir"), _own_source()],
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:32]


def _own_source() -> str:
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parents[1].rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def load(key: str, checkpoint: Checkpoint) -> Blueprint | None:
    """The blueprint kept under `key`, its parameters pointing into `checkpoint`; None if none can be read."""
    folder = _folder() / key
    if not folder.is_dir():
        return None
    try:
        facts = json.loads((folder / "blueprint.json").read_text(encoding="utf-8"))
        graphs = {stem: load_graph(folder / f"{stem}.onnx") for stem in facts["graphs"]}
        for graph in graphs.values():
            for graph_input in list(graph.graph.inputs):
                if graph_input.name in facts["sources"]:
                    graph.graph.inputs.remove(graph_input)
                    graph.graph.initializers.add(graph_input)
        sources = {name: checkpoint.tensors[tensor] for name, tensor in facts["sources"].items()}
        folder.touch()
    except (OnnxpressError, OSError, ValueError, KeyError) as error:
        logger.warning("a blueprint in the cache cannot be used, tracing again: %s", error)
        shutil.rmtree(folder, ignore_errors=True)
        return None
    return Blueprint(facts["task"], graphs, sources, facts["described"])


def store(key: str, blueprint: Blueprint, checkpoint: Checkpoint) -> Blueprint | None:
    """Keep a blueprint, unless weights are part of it or are computed from more than one tensor, and return it as
    `load` finds it. A cache that cannot be written is no reason to fail: then, too, the result is None."""
    names = {id(source): name for name, source in checkpoint.tensors.items()}
    needed = {name for graph in blueprint.graphs.values() for name in unbound(graph)}
    if not needed or any(id(blueprint.sources[name]) not in names for name in needed):
        return None
    facts = {
        "task": blueprint.task,
        "graphs": list(blueprint.graphs),
        "sources": {name: names[id(source)] for name, source in blueprint.sources.items() if id(source) in names},
        "described": blueprint.described,
    }
    try:
        with new_folder(_folder() / key) as folder:
            for stem, graph in blueprint.graphs.items():
                unweighted = copy_graph(graph)
                for name in unbound(unweighted):  # ONNX knows no initializer without a value
                    unweighted.graph.inputs.append(unweighted.graph.initializers.pop(name))
                save_graph(unweighted, folder / f"{stem}.onnx")
            (folder / "blueprint.json").write_text(json.dumps(facts, indent=1), encoding="utf-8")
        kept = sorted(_folder().iterdir(), key=lambda path: path.stat().st_mtime, reverse=True)
        for old in kept[KEEP:]:
            shutil.rmtree(old, ignore_errors=True)
    except (OnnxpressError, OSError) as error:
        logger.warning("the blueprint was not kept: %s", error)
        return None
    return load(key, checkpoint)


def _folder() -> Path:
    return cache_folder() / "blueprints"

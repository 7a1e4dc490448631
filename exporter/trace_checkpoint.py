"""What a checkpoint becomes when it is traced: graphs with their parameters unbound, and where each comes from.

Everything here needs torch and transformers; `export.py` only comes here for a model that it has not seen before.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import transformers
from huggingface_hub.errors import StrictDataclassError

from onnxpress.errors import CorruptFileError, OnnxpressError, UnsupportedModelError, UsageError
from onnxpress.exporter import tasks
from onnxpress.exporter.decoder import export_decoder
from onnxpress.exporter.encoder import OUTPUTS, export_encoder
from onnxpress.exporter.encoder_decoder import export_encoder_decoder
from onnxpress.exporter.fusing import rotary
from onnxpress.exporter.layers.trace import first_line
from onnxpress.exporter.layers.traced import Template, on_meta
from onnxpress.exporter.sources import binding
from onnxpress.exporter.sources.checkpoint import Checkpoint, check_architecture
from onnxpress.exporter.sources.weights import TensorSource
from onnxpress.exporter.tracing.lowering import unbound

DEFAULT_POSITIONS = 2048
"""Length of rotary tables where the config names no limit."""


@dataclass(frozen=True)
class Traced:
    """Graphs by file stem, parameters unbound unless the method is `fallback`; where parameters come from; and what
    artifact.json says of it all."""

    task: str
    graphs: dict[str, ir.Model]
    sources: Mapping[str, TensorSource]
    described: dict[str, Any]


def read_config(checkpoint: Checkpoint) -> Any:
    """The configuration as transformers takes it. Raises CorruptFileError for values that it refuses."""
    try:
        return transformers.AutoConfig.from_pretrained(
            checkpoint.folder, local_files_only=True, trust_remote_code=checkpoint.trust_remote_code
        )
    except (StrictDataclassError, TypeError, ValueError, KeyError, AttributeError) as error:
        raise CorruptFileError(
            f"{checkpoint.folder}/config.json: transformers refuses it: {error}",
            hint="compare it with the original model's config.json",
        ) from error


def trace_checkpoint(checkpoint: Checkpoint, task: str | None, context_length: int | None) -> Traced:
    """Trace the model of a checkpoint for a task. Raises what `export.export` says."""
    check_architecture(checkpoint.folder, checkpoint.config, trust_remote_code=checkpoint.trust_remote_code)
    config = read_config(checkpoint)
    task = (task or checkpoint.task or tasks.infer_task(config)).removesuffix("-with-past")
    model_class = tasks.model_class(config, task)
    limit, reason = rotary.context_limit(config, context_length)
    if context_length is not None and limit is not None and context_length > limit:
        raise UsageError(
            f"--context-length {context_length} is more than the {limit} positions that the model serves",
            hint=reason or "leave it out, or give fewer",
        )
    positions = limit or context_length or DEFAULT_POSITIONS
    try:
        templates = _templates(checkpoint, config, model_class, task, positions)
    except OnnxpressError:
        raise
    except Exception as error:  # whatever torch makes of a model that it cannot trace
        if config.is_encoder_decoder or task not in OUTPUTS:
            raise UnsupportedModelError(f"{model_class.__name__} cannot be exported: {first_line(error)}") from error
        from onnxpress.exporter.fallback import export_unfused

        why = first_line(error)
        graph = export_unfused(model_class, config, task, checkpoint.tensors, why)
        return Traced(
            task, {"model": graph}, {}, {"method": "fallback", "operators": [], "not_fused": {"template": why}}
        )
    graphs = {stem: made.graph for stem, made in templates.items()}
    sources = _bound(on_meta(model_class, config), checkpoint, graphs)
    return Traced(task, graphs, sources, _described(templates, limit, reason))


def _templates(checkpoint: Checkpoint, config: Any, model_class: Any, task: str, positions: int) -> dict[str, Template]:
    """The graphs of the task by file stem, parameters unbound."""
    if task == "text-generation":
        return {"model": export_decoder(model_class, config, positions=positions)}
    if config.is_encoder_decoder:
        return export_encoder_decoder(model_class, config, positions=positions)
    if task in OUTPUTS:
        pooling = checkpoint.pooling if task == "feature-extraction" else None
        return {"model": export_encoder(model_class, config, task=task, pooling=pooling, positions=positions)}
    raise UsageError(f"a {config.model_type!r} model cannot serve {task!r}")


def _bound(model: Any, checkpoint: Checkpoint, graphs: Mapping[str, ir.Model]) -> Mapping[str, TensorSource]:
    needed = {name for graph in graphs.values() for name in unbound(graph)}
    return binding.bind(model, checkpoint.tensors, optional=_others(model, needed))


def _others(model: Any, needed: set[str]) -> list[str]:
    """Patterns of parameters that no graph uses, so that a checkpoint may lack them (a pooler, another task's head)."""
    return [f"^{re.escape(name)}$" for name in model.state_dict() if name not in needed]


def _described(templates: Mapping[str, Template], limit: int | None, reason: str | None) -> dict[str, Any]:
    """What artifact.json says of the export."""
    methods = [made.method for made in templates.values()]
    operators: Counter[str] = Counter()
    given_up: dict[str, str] = {}
    for made in templates.values():
        operators.update(made.operators)
        given_up.update(made.plan.given_up)
    described: dict[str, Any] = {
        "method": methods[-1],
        "operators": sorted(operators),
        "traced_layers": {stem: f"{made.traced_layers} of {made.depth}" for stem, made in templates.items()},
    }
    if given_up:
        described["not_fused"] = given_up
    if limit is not None:
        described["context_length"] = limit
    if reason is not None:
        described["context_limit"] = reason
    return described

"""A checkpoint is traced: graphs with their parameters unbound, and the checkpoint tensor of each parameter.

Everything here needs torch and transformers; `export.py` only comes here for a model that it has not seen before.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
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
from onnxpress.exporter.layers.export_cache import TracedCheckpoint
from onnxpress.exporter.layers.trace import first_line
from onnxpress.exporter.layers.traced import TracedModel, on_meta
from onnxpress.exporter.sources.checkpoint import Checkpoint, check_architecture
from onnxpress.exporter.sources.parameters import match_parameters
from onnxpress.exporter.tracing.binding import unbound
from onnxpress.graph.tensors import WeightTensor

DEFAULT_POSITIONS = 2048
"""Length of rotary tables where the config names no limit."""


def transformers_config(checkpoint: Checkpoint) -> Any:
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


def trace_checkpoint(checkpoint: Checkpoint, task: str | None, context_length: int | None) -> TracedCheckpoint:
    """Trace the model of a checkpoint for a task. Raises what `export.export` says."""
    check_architecture(checkpoint.folder, checkpoint.config, trust_remote_code=checkpoint.trust_remote_code)
    config = transformers_config(checkpoint)
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
        models = _traced_models(checkpoint, config, model_class, task, positions)
    except OnnxpressError:
        raise
    except Exception as error:  # whatever torch makes of a model that it cannot trace
        if config.is_encoder_decoder or task not in OUTPUTS:
            raise UnsupportedModelError(f"{model_class.__name__} cannot be exported: {first_line(error)}") from error
        from onnxpress.exporter.fallback import export_unfused

        why = first_line(error)
        graph = export_unfused(model_class, config, task, checkpoint.tensors, why)
        return TracedCheckpoint(
            task, {"model": graph}, {}, {"method": "fallback", "operators": [], "not_fused": {"template": why}}
        )
    graphs = {name: model.graph for name, model in models.items()}
    parameters = _parameters(on_meta(model_class, config), checkpoint, graphs)
    return TracedCheckpoint(task, graphs, parameters, _described(models, limit, reason))


def _traced_models(
    checkpoint: Checkpoint, config: Any, model_class: Any, task: str, positions: int
) -> dict[str, TracedModel]:
    """The graphs of the task by name, parameters unbound."""
    if task == "text-generation":
        return {"model": export_decoder(model_class, config, positions=positions)}
    if config.is_encoder_decoder:
        return export_encoder_decoder(model_class, config, positions=positions)
    if task in OUTPUTS:
        pooling = checkpoint.pooling if task == "feature-extraction" else None
        return {"model": export_encoder(model_class, config, task=task, pooling=pooling, positions=positions)}
    raise UsageError(f"a {config.model_type!r} model cannot serve {task!r}")


def _parameters(model: Any, checkpoint: Checkpoint, graphs: Mapping[str, ir.Model]) -> Mapping[str, WeightTensor]:
    needed = {name for graph in graphs.values() for name in unbound(graph)}
    return match_parameters(model, checkpoint.tensors, optional=_others(model, needed))


def _others(model: Any, needed: set[str]) -> list[str]:
    """Patterns of parameters that no graph uses, so that a checkpoint may lack them (a pooler, another task's head)."""
    return [f"^{re.escape(name)}$" for name in model.state_dict() if name not in needed]


def _described(models: Mapping[str, TracedModel], limit: int | None, reason: str | None) -> dict[str, Any]:
    """The export as artifact.json describes it."""
    methods = [model.method for model in models.values()]
    operators: Counter[str] = Counter()
    given_up: dict[str, str] = {}
    for model in models.values():
        operators.update(model.operators)
        given_up.update(model.plan.given_up)
    described: dict[str, Any] = {
        "method": methods[-1],
        "operators": sorted(operators),
        "traced_layers": {name: f"{model.traced_layers} of {model.depth}" for name, model in models.items()},
    }
    if given_up:
        described["not_fused"] = given_up
    if limit is not None:
        described["context_length"] = limit
    if reason is not None:
        described["context_limit"] = reason
    return described

"""Graphs back to a checkpoint: safetensors and config.json as transformers writes them.

transformers builds the architecture from the configuration on the meta device; its `state_dict` says which tensors
there are and in which shapes, its modules which layout a matrix has. Every tensor is found in the graph by its name, or
by the module that reads it where arithmetic on it was folded, and written as float32, one at a time.
"""

from __future__ import annotations

import json
import math
import shutil
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from onnxpress.arrays import Floats
from onnxpress.errors import UnsupportedModelError
from onnxpress.exporter import tasks
from onnxpress.exporter.layers.traced import on_meta
from onnxpress.exporter.sources.parameters import tied_groups
from onnxpress.exporter.writing.placed_weights import PlacedWeight
from onnxpress.exporter.writing.saved_names import Entry, as_saved
from onnxpress.graph.tensors import WeightTensor, concrete_shape

SHARD_BYTES = 5 * 10**9
"""Largest file of weights; a single tensor may be larger."""
_NO_PLACE = "the reduced model stays an ONNX model: leave out --checkpoint"


@dataclass(frozen=True)
class Written:
    tensors: int
    parameters: int
    left_out: tuple[str, ...]
    """Parameters of the model that no graph has: a pooler, the head of another task."""


def write_checkpoint(
    folder: Path,
    weights: Iterable[PlacedWeight],
    config: Mapping[str, Any],
    files: Mapping[str, Path],
    task: str,
    *,
    originals: Mapping[str, WeightTensor] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Written:
    """Write config.json, `files` (tokenizer, generation config, …) and the weights to an empty folder.

    Args:
        weights: of all graphs of the model, in float32.
        config: config.json that fits them.
        task: optimum's name; it chooses the class of the model.
        originals: tensors of the checkpoint that the graphs were exported from; parameters that no graph has, such as
            a pooler, are copied from it where their shape still fits.

    Raises:
        UnsupportedModelError: a weight that has no place in the architecture, or a parameter without a weight or of
            another shape; it is named.
    """
    for name, path in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, folder / name)
    content = {key: value for key, value in config.items() if key not in ("transformers.js_config", "torch_dtype")}
    content["dtype"] = "float32"
    _write_json(folder / "config.json", content)
    try:
        read = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        model_class = tasks.model_class(read, task.removesuffix("-with-past"))
        model: Any = on_meta(model_class, read)
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UnsupportedModelError(f"transformers cannot build the reduced model: {reason}", hint=_NO_PLACE) from error
    _write_json(folder / "config.json", {**content, "architectures": [model_class.__name__]})
    entries, left_out = parameter_entries(model, list(weights))
    state = model.state_dict(keep_vars=True)
    for name in list(left_out):
        source = (originals or {}).get(name)
        shape = tuple(state[name].shape)
        if source is not None and concrete_shape(source) == shape and source.dtype.is_floating_point():
            entries.append(Entry(name, shape, lambda source=source: source.mapped().astype(np.float32)))  # type: ignore[misc]
            left_out.remove(name)
    entries = as_saved(model, entries)
    write_safetensors(folder, entries, shard_bytes)
    return Written(len(entries), sum(math.prod(entry.shape) for entry in entries), tuple(left_out))


def parameter_entries(model: Any, weights: list[PlacedWeight]) -> tuple[list[Entry], list[str]]:
    """An entry for each parameter of a transformers model, and the names of those that the graph has no use for.

    Raises UnsupportedModelError: see `write_checkpoint`.
    """
    state: dict[str, torch.Tensor] = dict(model.state_dict(keep_vars=True))
    by_name = {weight.name: weight for weight in weights}
    by_place = {f"{one.module}.{_LEAVES[one.role]}": one for one in weights if one.role in _LEAVES}
    head = next((weight for weight in weights if weight.is_head), None)
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if head is not None and output is not None:
        by_place |= {f"{path}.weight": head for path, module in model.named_modules() if module is output}
    placed: dict[str, PlacedWeight] = {}
    for name in state:
        weight = by_name.get(name) or by_place.get(name)
        if weight is not None:
            placed[name] = weight
    entries: dict[str, Entry] = {}
    groups = {name: group for group in tied_groups(model, state) for name in group}
    for name in state:
        group = groups.get(name, [name])
        chosen = next((one for one in group if one in by_name), next((one for one in group if one in placed), None))
        if chosen is not None:
            entries[chosen] = _entry(model, chosen, state[chosen], placed[chosen])
    modules = {weight.module for weight in weights}
    left_out = []
    for name, parameter in state.items():
        module, _, leaf = name.rpartition(".")
        if any(one in entries for one in groups.get(name, [name])) or not parameter.is_floating_point():
            continue
        product = placed.get(f"{module}.weight")
        if leaf == "bias" and product is not None and product.role == "product" and not product.has_bias:
            entries[name] = Entry(name, tuple(parameter.shape), lambda shape=tuple(parameter.shape): _zeros(shape))  # type: ignore[misc]
        elif module in modules:
            raise UnsupportedModelError(f"{name} of the checkpoint was not found in the graph", hint=_NO_PLACE)
        else:
            left_out.append(name)
    _require_all(weights, {placed[name].name for name in entries if name in placed})
    return [entries[name] for name in state if name in entries], left_out


_LEAVES = {"product": "weight", "bias": "bias", "gain": "weight", "shift": "bias"}


def _require_all(weights: Iterable[PlacedWeight], used: set[str]) -> None:
    lost = [weight for weight in weights if weight.role in (*_LEAVES, "experts") and weight.name not in used]
    if lost:
        roles = {"product": "a product by", "bias": "the bias", "gain": "the gain", "shift": "the shift"}
        named = ", ".join(f"{roles.get(weight.role, weight.role)} {weight.name}" for weight in lost[:3])
        raise UnsupportedModelError(
            f"the graph has weights that have no place in a checkpoint: {named}"
            + (f", … ({len(lost)} in all)" if len(lost) > 3 else ""),
            hint=_NO_PLACE,
        )


def _entry(model: Any, name: str, parameter: torch.Tensor, weight: PlacedWeight) -> Entry:
    """The tensor of a parameter, transposed and shifted as its module wants it."""
    path, _, _ = name.rpartition(".")
    module = model.get_submodule(path)
    shape, wanted = concrete_shape(weight.tensor), tuple(parameter.shape)
    # Conv1D, GPT-2's layer, holds [in, out]; nn.Linear and tables hold [out, in].
    transposed = weight.role == "product" and weight.out_first == isinstance(module, transformers.pytorch_utils.Conv1D)
    if (shape[::-1] if transposed else shape) != wanted:
        raise UnsupportedModelError(
            f"{name} is {list(shape[::-1] if transposed else shape)} in the graph; the reduced config.json wants "
            f"{list(wanted)}",
            hint=_NO_PLACE,
        )
    offset = _offset(module) if weight.role == "gain" else 0.0
    factor = _factor(model, path, weight)

    def read() -> Floats:
        values = np.asarray(weight.tensor.numpy(), np.float32)
        if weight.role == "experts":  # rows of gate and up alternate in the graph
            values = values.reshape(len(values), -1, 2, values.shape[-1]).swapaxes(1, 2).reshape(values.shape)
        values = values.T if transposed else values
        if offset:
            values = values - np.float32(offset)
        if factor != 1:
            axis = -1 if isinstance(module, transformers.pytorch_utils.Conv1D) else 0
            values = np.moveaxis(np.array(values), axis, 0)
            values[: weight.queries] *= np.float32(factor)
            values = np.moveaxis(values, 0, axis)
        return np.asarray(values, order="C")

    return Entry(name, wanted, read)


def _offset(module: Any) -> float:
    """The number that a norm adds to its stored gain: 1 in Gemma, which stores it less one; found by running a copy."""
    import copy

    small = copy.deepcopy(module).to_empty(device="cpu")
    with torch.no_grad():
        for parameter in small.parameters():
            parameter.zero_()
        size = next(iter(small.parameters())).shape[-1]
        signs = torch.tensor([1.0, -1.0]).repeat(size)[:size]
        return float(torch.round((small(signs[None, None]) * signs).mean()))


def _factor(model: Any, path: str, weight: PlacedWeight) -> float:
    """The factor of queries, so that scores come out as in the graph, whose scale heads of another size left
    as it was. 1 where the module scales by something else than the size of its heads."""
    if weight.scale is None:
        return 1.0
    attention = model.get_submodule(path.rpartition(".")[0])
    scaling = getattr(attention, "scaling", None)
    if not isinstance(scaling, (int, float)) or math.isclose(scaling, weight.scale, rel_tol=1e-5):
        return 1.0
    if weight.scale == 1:  # queries are scaled before, by arithmetic of the module's own
        return 1.0
    if hasattr(attention, "q_norm"):
        raise UnsupportedModelError(
            f"{path} is normed before it is scaled by {weight.scale:.4g}; config.json means {scaling:.4g}",
            hint=_NO_PLACE,
        )
    return weight.scale / scaling


def _zeros(shape: tuple[int, ...]) -> Floats:
    return np.zeros(shape, np.float32)


def write_safetensors(folder: Path, entries: list[Entry], shard_bytes: int) -> None:
    """One file, or shards of up to `shard_bytes` with their index; one tensor in memory at a time."""
    shards: list[list[Entry]] = [[]]
    for entry in entries:
        if shards[-1] and sum(one.nbytes for one in shards[-1]) + entry.nbytes > shard_bytes:
            shards.append([])
        shards[-1].append(entry)
    if len(shards) == 1:
        _write_shard(folder / "model.safetensors", shards[0])
        return
    places: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        _write_shard(folder / name, shard)
        places |= {entry.name: name for entry in shard}
    total = sum(entry.nbytes for entry in entries)
    _write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": places})


def _write_shard(path: Path, entries: list[Entry]) -> None:
    """https://huggingface.co/docs/safetensors/index#format"""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for entry in entries:
        offsets = [position, position + entry.nbytes]
        header[entry.name] = {"dtype": "F32", "shape": list(entry.shape), "data_offsets": offsets}
        position += entry.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for entry in entries:
            values = entry.read()
            if values.shape != entry.shape:
                raise UnsupportedModelError(f"{entry.name} is {list(values.shape)} instead of {list(entry.shape)}")
            file.write(np.ascontiguousarray(values, "<f4").data)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

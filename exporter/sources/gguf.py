"""Checkpoints from .gguf files: their configuration as a Hugging Face folder, their weights dequantized one at a time.

llama.cpp renames tensors, permutes the rows of some (rotary pairs), shifts norms by one; transformers knows how to undo
that, tensor by tensor, and its own functions are used here without ever loading the model.
"""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from gguf import GGML_QUANT_SIZES, dequantize

from onnxpress.arrays import Array, Floats
from onnxpress.artifact.artifact import Source
from onnxpress.errors import CorruptFileError, UnsupportedModelError
from onnxpress.exporter.sources.checkpoint import Checkpoint, find_sidecar_files
from onnxpress.exporter.sources.gguf_header import Header, TensorInfo, read_header
from onnxpress.files.cache import cache_folder, new_folder
from onnxpress.files.json_files import read_json_object
from onnxpress.graph.tensors import WeightTensor, concrete_shape, map_file

Say = Callable[[str], None]

_TRANSLATION = 1
"""Raise it when the files written for a .gguf change, so that cached ones are made anew."""


@dataclass(frozen=True)
class StoredBlocks:
    """A weight as it lies in the file: rows of quantized blocks."""

    type: str
    """`Q4_1`, `Q8_0`, …: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md"""
    data: Array
    """uint8 [rows, bytes per row], rows in the checkpoint's (not the file's) order; the last axis is blocked."""
    shape: tuple[int, ...]
    """Elements: [rows, columns]."""


class GgufTensor(WeightTensor):
    """A parameter made from one tensor of a .gguf, or from several (gate and up projections of experts).

    Reading it dequantizes to float32 and undoes llama.cpp's changes, row by row where these only reorder rows.
    """

    def __init__(self, name: str, shape: tuple[int, ...], path: Path, parts: list[TensorInfo], undo: _Undo) -> None:
        super().__init__(self._values, ir.DataType.FLOAT, shape, name=name)
        self._path = path
        self._parts = parts
        self._undo = undo

    @property
    def stored_bytes(self) -> int:
        return sum(part.nbytes for part in self._parts)

    def _values(self) -> Floats:
        values = self._undo(str(self.name), {part.name: self._dequantize(part) for part in self._parts})
        if values.shape != concrete_shape(self):
            raise CorruptFileError(
                f"{self._path}: parameter {self.name} has shape {list(values.shape)}, not {list(concrete_shape(self))}"
            )
        return np.ascontiguousarray(values, dtype=np.float32)

    @property
    def reads_rows(self) -> bool:
        single = len(self._parts) == 1 and self._parts[0].shape == concrete_shape(self) and len(self.shape) > 1
        return single and self._row_order is not None

    def rows(self, start: int, stop: int) -> Floats:
        if not self.reads_rows or self._row_order is None:
            return super().rows(start, stop)
        order = self._row_order[start:stop]
        if not order.size:  # which gguf cannot dequantize
            return np.empty((0, *concrete_shape(self)[1:]), np.float32)
        return self._dequantize(self._parts[0], order)

    def blocks(self) -> StoredBlocks | None:
        """The quantized blocks themselves, for whoever can use them as they are.

        None where the values are floats, or where undoing llama.cpp's changes is more than a reordering of rows.
        """
        if len(self._parts) != 1 or len(self.shape) != 2:
            return None
        (part,) = self._parts
        if part.type.name in ("F32", "F16", "BF16", "F64") or part.shape != concrete_shape(self):
            return None
        if self._row_order is None:
            return None
        return StoredBlocks(part.type.name, self._raw(part, self._row_order), part.shape)

    @cached_property
    def _row_order(self) -> Array | None:
        """Which row of the file becomes each row of the parameter: the undoing applied to row numbers.

        None where the undoing is something else than a reordering of rows.
        """
        part = self._parts[0]
        rows = np.arange(part.shape[0], dtype=np.float64).reshape(-1, *(1 for _ in part.shape[1:]))
        try:
            order = self._undo(str(self.name), {part.name: rows})
        except (ValueError, IndexError):  # it needs whole rows: not a permutation of them
            return None
        if order.shape != rows.shape or not np.array_equal(np.sort(order, axis=0), rows):
            return None
        return order.reshape(-1).astype(np.int64)

    def _raw(self, part: TensorInfo, order: Array | None = None) -> Array:
        """Bytes of a tensor of the file, uint8 [rows, …, bytes per row]; only the rows in `order`, if given."""
        block, block_bytes = GGML_QUANT_SIZES[part.type]
        row_bytes = part.shape[-1] // block * block_bytes
        raw = map_file(self._path, part.offset, part.nbytes).reshape(*part.shape[:-1], row_bytes)
        if order is None:
            return raw
        in_place = bool((np.diff(order) == 1).all())
        return raw[order[0] : order[-1] + 1] if in_place else raw[order]

    def _dequantize(self, part: TensorInfo, order: Array | None = None) -> Floats:
        shape = part.shape if order is None else (len(order), *part.shape[1:])
        try:
            return np.asarray(dequantize(self._raw(part, order), part.type)).reshape(shape)
        except NotImplementedError as error:
            raise UnsupportedModelError(
                f"{self._path}: tensor {part.name} is stored as {part.type.name}, which cannot be read",
                hint="take a file in Q8_0, Q4_K_M or F16",
            ) from error


class _Undo:
    """transformers' tensor processor of an architecture, as a function of the file's tensors of one parameter."""

    def __init__(self, processor: Any, names: Mapping[str, str]) -> None:
        self._processor = processor
        self._names = names
        """From the file's names to parameter names; processors want to see it."""

    def __call__(self, target: str, parts: Mapping[str, Array]) -> Array:
        """The parameter `target` from its dequantized `parts`, by their names in the file."""
        merged: dict[str, Any] = {"tensors": {}}
        for name, values in parts.items():
            done = self._processor.process(
                weights=values, name=name, tensor_key_mapping=self._names, parsed_parameters=merged
            )
            if done.name is not None:
                result: Array = done.weights
                return result
        made: Array = merged["tensors"][target].numpy()
        return made


def load_gguf(path: Path, source: Source, *, say: Say = lambda _: None) -> Checkpoint:
    """Read a .gguf; the Hugging Face files made from its header are kept in the cache, by the file's identity.

    Raises:
        CorruptFileError: truncated or damaged.
        UnsupportedModelError: an architecture or element type without a translation.
    """
    from onnxpress.exporter.sources.gguf_config import write_folder

    header = read_header(path)
    folder = cache_folder() / "gguf" / f"{_safe_name(path.stem)}-{_identity(path)}"
    if not (folder / "config.json").is_file():
        say(f"translating the configuration and tokenizer of {path.name}")
        with new_folder(folder) as temporary:
            write_folder(header, temporary)
    licence = header.metadata.get("general.license")
    if source.licence is None and isinstance(licence, str):
        source = Source(source.name, source.kind, source.revision, licence, source.sha256)
    return Checkpoint(
        source=source,
        config=read_json_object(folder / "config.json"),
        files=find_sidecar_files(folder),
        folder=folder,
        tensors=_parameters(header, folder),
        task="text-generation",
    )


def _parameters(header: Header, folder: Path) -> dict[str, WeightTensor]:
    """Lazy parameters by transformers' names."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

    config = AutoConfig.from_pretrained(folder)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except ValueError as error:
        raise UnsupportedModelError(
            f"{header.path}: {config.model_type} is not a language model that can be read from a .gguf",
            hint="start from the safetensors checkpoint instead",
        ) from error
    processor = TENSOR_PROCESSORS.get(header.architecture, TensorProcessor)(config=config.to_dict())
    names: dict[str, str] = get_gguf_hf_weights_map(_Names(model), processor)
    undo = _Undo(processor, names)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.state_dict().items()}
    parts: dict[str, list[TensorInfo]] = defaultdict(list)
    for info in header.tensors.values():
        if (target := names.get(info.name)) is not None or (target := _expert_target(info.name, names)) is not None:
            parts[target].append(info)
    tensors: dict[str, WeightTensor] = {}
    for target, infos in parts.items():
        elements = sum(int(np.prod(info.shape)) for info in infos)
        required = shapes.get(target)
        fits = required is not None and int(np.prod(required)) == elements
        shape = required if fits and required is not None else infos[0].shape
        tensors[target] = GgufTensor(target, shape, header.path, infos, undo)
    return tensors


class _Names:
    """The part of a model that transformers' name mapping looks at, down to its base model and no further.

    It would visit every submodule and build a table of all names for each, which takes seconds and finds nothing.
    """

    def __init__(self, model: Any, *, base: bool = False) -> None:
        self.config = model.config
        self.state_dict = model.state_dict
        self._base = None if base else (model.base_model_prefix, getattr(model, model.base_model_prefix, None))

    def named_children(self) -> list[tuple[str, _Names]]:
        if self._base is None or self._base[1] is None:
            return []
        return [(self._base[0], _Names(self._base[1], base=True))]


def _expert_target(name: str, names: Mapping[str, str]) -> str | None:
    """Experts are listed without `.weight`."""
    return names.get(name.removesuffix(".weight")) if name.endswith("_exps.weight") else None


def _identity(path: Path) -> str:
    """A digest of the file's place, size and time, which changes when any of these does."""
    status = path.stat()
    text = f"{_TRANSLATION}|{path.resolve()}|{status.st_size}|{status.st_mtime_ns}"
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _safe_name(stem: str) -> str:
    return re.sub(r"[^\w.-]", "_", stem)[:80]

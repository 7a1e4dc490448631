"""Finds the checkpoint tensor of every parameter of a model, without reading a single weight.

transformers renames, splits and merges checkpoint tensors while it loads them: `bert.` prefixes come and go, experts
are stacked, `gamma` becomes `weight`, a head shares the embedding. The rules live in transformers
(`conversion_mapping.py`); here they are run on names first, on meta tensors next to learn shapes, and on values only
when somebody reads the parameter.
"""

from __future__ import annotations

import logging
import re
from collections import defaultdict
from collections.abc import Collection, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from onnxpress.arrays import Array
from onnxpress.errors import CorruptFileError, UnsupportedModelError
from onnxpress.exporter.sources.torch_arrays import IR_DTYPES, TORCH_DTYPES, to_numpy, to_torch
from onnxpress.graph.tensors import ArrayTensor, WeightTensor, concrete_shape, slabs_of

logger = logging.getLogger(__name__)


class Parameters(dict[str, WeightTensor]):
    """Every name of `model.state_dict()` -> the tensor that holds its values. Tied names share one tensor."""

    def __init__(self, sources: Mapping[str, WeightTensor], unused: list[str]) -> None:
        super().__init__(sources)
        self.unused = unused
        """Checkpoint tensors that no parameter wants, sorted; buffers known to be obsolete are left out."""


def match_parameters(
    model: torch.nn.Module, tensors: Mapping[str, WeightTensor], *, optional: Collection[str] = ()
) -> Parameters:
    """Map every parameter and persistent buffer of a transformers model to a tensor of the checkpoint.

    Tensors keep the element type of the checkpoint: they are not cast to the model's.

    Args:
        model: a PreTrainedModel; on the meta device it costs no memory. Its parameters give the required shapes.
        tensors: the checkpoint's tensors by their names in the files.
        optional: patterns (regular expressions) of names that may be missing; they are then absent from the result.

    Raises:
        CorruptFileError: parameters that the checkpoint lacks, or of another shape than the config says.
        UnsupportedModelError: a weight stored as integers (quantized by another tool) where the model wants floats.
    """
    required: dict[str, torch.Tensor] = dict(model.state_dict(keep_vars=True))
    matched, unused = _match_names(model, tensors, required)
    _check(required, matched)
    _tie(model, required, matched)
    _fill_computed(model, required, matched)
    missing = [name for name in required if name not in matched]
    missing = [name for name in missing if not any(re.search(pattern, name) for pattern in optional)]
    if missing:
        raise CorruptFileError(
            f"the checkpoint lacks {len(missing)} of the {len(required)} parameters of {type(model).__name__}: "
            f"{_some(missing)}",
            hint="a shard may be missing, or the weights belong to another task or config.json",
        )
    unused = sorted(name for name in unused if not _is_obsolete(model, name))
    if unused:
        logger.warning("%d checkpoint tensors are not used by %s: %s", len(unused), type(model).__name__, _some(unused))
    return Parameters({name: matched[name] for name in required if name in matched}, unused)


@dataclass
class _Pieces:
    """The checkpoint tensors that one converter turns into one or more parameters."""

    converter: WeightConverter
    target: str
    """The first of the parameters made, as a full name."""
    inputs: dict[str, list[WeightTensor]] = field(default_factory=lambda: defaultdict(list))
    """By source pattern, in natural order of their names (expert 2 before expert 10)."""

    @property
    def stacked(self) -> bool:
        """Whether row i of what is made comes from input i of each pattern, as with experts that are stacked."""
        first, *others = self.converter.operations
        return (
            isinstance(first, MergeModulelist)
            and first.dim == 0
            and all(isinstance(operation, Concatenate) and operation.dim > 0 for operation in others)
        )

    def part(self, start: int, stop: int) -> _Pieces:
        """The tensors that rows [start, stop) are made from."""
        inputs = {pattern: sources[start:stop] for pattern, sources in self.inputs.items()}
        return _Pieces(self.converter, self.target, inputs)

    def convert(self, model: torch.nn.Module, load: Any) -> dict[str, torch.Tensor]:
        """Run the converter on `load(source)` for each input; returns parameters by full name."""
        converter = deepcopy(self.converter)
        for pattern, sources in self.inputs.items():
            for source in sources:
                converter.add_tensor(self.target, source.name, pattern, load(source))
        made = converter.convert(self.target, model=model, config=model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


class ConvertedTensor(WeightTensor):
    """A parameter that transformers makes from checkpoint tensors: stacked experts, a chunk of a packed projection.

    Reading it reads its pieces, so the peak is about twice the parameter; experts can be read one at a time.
    """

    def __init__(self, name: str, meta: torch.Tensor, pieces: _Pieces, model: torch.nn.Module) -> None:
        super().__init__(lambda: self._read(pieces), IR_DTYPES[meta.dtype], tuple(meta.shape), name=name)
        self._pieces = pieces
        self._model = model

    @property
    def reads_rows(self) -> bool:
        return self._pieces.stacked and all(len(sources) == self.shape[0] for sources in self._pieces.inputs.values())

    def rows(self, start: int, stop: int) -> Array:
        return self._read(self._pieces.part(start, stop)) if self.reads_rows else super().rows(start, stop)

    def _read(self, pieces: _Pieces) -> Array:
        return to_numpy(pieces.convert(self._model, lambda source: to_torch(source.mapped()))[str(self.name)])


def _match_names(
    model: torch.nn.Module, tensors: Mapping[str, WeightTensor], required: Mapping[str, torch.Tensor]
) -> tuple[dict[str, WeightTensor], list[str]]:
    """Follow transformers' rules from checkpoint names to parameter names; also the names that led nowhere."""
    conversions = get_model_conversion_mapping(model)
    renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    prefix = model.base_model_prefix

    matched: dict[str, WeightTensor] = {}
    groups: dict[str, _Pieces] = {}
    unused: list[str] = []
    for name in sorted(tensors, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, prefix, required)
        if target not in required and name in required:  # a rule fired that was meant for other checkpoints
            target, pattern = rename_source_key(name, [], [], prefix, required)
        if target not in required:
            unused.append(name)
        elif pattern is None:
            matched.setdefault(target, tensors[name])
        else:
            group = groups.setdefault(target, _Pieces(by_pattern[pattern], target))
            group.inputs[pattern].append(tensors[name])
    for target, group in groups.items():
        matched.update(_converted(model, target, group))
    return matched, unused


def _converted(model: torch.nn.Module, target: str, group: _Pieces) -> dict[str, WeightTensor]:
    """The parameters of one converter: it runs on meta tensors, which yields names and shapes but reads nothing."""
    try:
        made = group.convert(model, _to_meta)
    except (RuntimeError, ValueError, IndexError, KeyError) as error:
        inputs = [str(source.name) for sources in group.inputs.values() for source in sources]
        raise CorruptFileError(
            f"parameter {target} cannot be made from {_some(inputs)}: {error}",
            hint="the checkpoint's tensors and its config.json disagree",
        ) from error
    return {name: ConvertedTensor(name, meta, group, model) for name, meta in made.items()}


def _check(required: Mapping[str, torch.Tensor], matched: Mapping[str, WeightTensor]) -> None:
    for name, source in matched.items():
        parameter = required.get(name)
        if parameter is None:
            continue
        if concrete_shape(source) != tuple(parameter.shape):
            raise CorruptFileError(
                f"parameter {name} has shape {list(source.shape)} in the checkpoint; "
                f"its config.json requires {list(parameter.shape)}",
                hint="config.json and the weights do not belong together",
            )
        if parameter.is_floating_point() and not source.dtype.is_floating_point():
            raise UnsupportedModelError(
                f"parameter {name} is stored as {source.dtype}: the checkpoint is quantized in a way onnxpress "
                "does not read",
                hint="start from the unquantized checkpoint (BF16, F16 or F32) or from a .gguf",
            )


def _tie(model: torch.nn.Module, required: Mapping[str, torch.Tensor], matched: dict[str, WeightTensor]) -> None:
    """Give parameters that share storage one source, whichever of their names the checkpoint has.

    Like transformers: where the checkpoint holds several with different values, they stay apart whatever the config
    says.
    """
    for group in tied_groups(model, required):
        present = [name for name in group if name in matched]
        if not present:
            continue
        first = matched[present[0]]
        for name in group:
            if name not in matched or same_values(first, matched[name]):
                matched[name] = first
            else:
                logger.warning("%s and %s are declared tied but differ in the checkpoint: kept apart", present[0], name)


def same_values(a: WeightTensor, b: WeightTensor, *, chunk: int = 1 << 24) -> bool:
    """Whether two tensors are equal bit for bit, compared in pieces of `chunk` bytes."""
    if a is b:
        return True
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return all(x.tobytes() == y.tobytes() for x, y in zip(slabs_of(a, chunk), slabs_of(b, chunk), strict=True))


def tied_groups(model: torch.nn.Module, required: Mapping[str, torch.Tensor]) -> list[list[str]]:
    """Names that are one parameter, by declaration (target -> source) or because one tensor has several names."""
    declared: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    groups: dict[Any, list[str]] = defaultdict(list)
    for name in required:
        groups[declared.get(name, name)].append(name)
    for source, group in groups.items():
        if source in group:
            group.insert(0, group.pop(group.index(source)))
    by_tensor: dict[int, list[str]] = {}
    for group in groups.values():
        by_tensor.setdefault(id(required[group[0]]), []).extend(group)
    return [group for group in by_tensor.values() if len(group) > 1]


def _fill_computed(
    model: torch.nn.Module, required: Mapping[str, torch.Tensor], matched: dict[str, WeightTensor]
) -> None:
    """Add tables that checkpoints may leave out because the model computes them, like sinusoidal positions.

    transformers lists what may be missing, but not all of it is computed. Initialising twice from different seeds
    tells a table from random values.
    """
    patterns = [re.compile(pattern) for pattern in getattr(model, "_keys_to_ignore_on_load_missing", None) or ()]
    for name in required:
        if name in matched or not any(pattern.search(name) for pattern in patterns):
            continue
        module_path, _, leaf = name.rpartition(".")
        values = [_initial_value(model, module_path, leaf, seed) for seed in (0, 1)]
        if torch.equal(*values):
            matched[name] = ArrayTensor(name, to_numpy(values[0]))


def _initial_value(model: torch.nn.Module, module_path: str, leaf: str, seed: int) -> torch.Tensor:
    """The value that transformers initialises a parameter to, computed on a copy of the small module that owns it."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        module = deepcopy(model.get_submodule(module_path)).to_empty(device="cpu", recurse=False)
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            tensor.fill_(seed)  # so that what initialisation leaves alone differs between seeds
        model._init_weights(module)
        value: torch.Tensor = getattr(module, leaf).detach()
        return value


def _is_obsolete(model: torch.nn.Module, name: str) -> bool:
    """Whether transformers says that this checkpoint tensor is to be ignored, or it is a buffer of old versions."""
    patterns = [*(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())]
    patterns += [
        r"rotary_emb\.inv_freq$",
        r"(^|\.)position_ids$",
        r"\.attn\.(masked_)?bias$",
        r"\.attention\.(masked_)?bias$",
    ]
    return any(re.search(pattern, name) for pattern in patterns)


def _to_meta(source: WeightTensor) -> torch.Tensor:
    dtype = TORCH_DTYPES.get(source.dtype)
    if dtype is None:
        raise UnsupportedModelError(
            f"tensor {source.name} of type {source.dtype} cannot be merged into a parameter",
            hint="start from the unquantized checkpoint (BF16, F16 or F32)",
        )
    return torch.empty(concrete_shape(source), dtype=dtype, device="meta")


def _some(names: list[str], limit: int = 5) -> str:
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown}, … ({len(names)} in all)"

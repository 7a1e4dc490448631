"""The two decoders of an encoder-decoder as one graph, `decoder_model_merged`, which transformers.js and optimum load.

    If(use_cache_branch)  then: decoder_with_past_model, else: decoder_model

Names, and what each branch returns, are those of optimum's merged decoders: every input of either graph is an input
and has to be fed; the cached branch returns empty `present.{i}.encoder.*` (batch 0), since the encoder's keys do not
change and passing them through would copy them for every token. Clients keep those of the first call.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from onnxpress.errors import UnsupportedModelError
from onnxpress.graph.io import INLINE_BYTES, SLAB_BYTES
from onnxpress.graph.tensors import FileTensor, concrete_shape

USE_CACHE = "use_cache_branch"
ENCODER_LENGTH = "encoder_sequence_length_out"
"""Length of cached encoder keys: 0 before there are any, hence not `encoder_sequence_length`, the states' own."""


def share_weights(models: Iterable[ir.Model]) -> int:
    """Let equal weights of several graphs be one tensor, so that one file holds them once; returns the bytes saved.

    Equal means dtype, shape and content; contents are read in slabs and compared by their SHA-256.
    """
    known: dict[tuple[ir.DataType, tuple[int, ...], bytes], ir.TensorProtocol] = {}
    digests: dict[object, bytes] = {}
    saved = 0
    for model in models:
        for value in _weights(model):
            tensor = value.const_value
            assert tensor is not None
            place = (tensor.path, tensor.offset, tensor.nbytes) if isinstance(tensor, FileTensor) else id(tensor)
            if place not in digests:
                digests[place] = _digest(tensor)
            first = known.setdefault((tensor.dtype, concrete_shape(tensor), digests[place]), tensor)
            if first is not tensor:
                value.const_value = first
                saved += tensor.nbytes
    return saved


def merge_decoders(decoder: ir.Model, with_past: ir.Model) -> ir.Model:
    """One graph of two branches; the given graphs are left as they are, weights stay lazy.

    Weights that are one tensor (see `share_weights`) become one initializer of the outer graph. Those of up to 1 KiB
    stay in their branch, where shape inference sees them.

    Raises UnsupportedModelError if the cached decoder has an output that the other lacks, or of another dtype.
    """
    outputs = [_Port.of(value) for value in decoder.graph.outputs]
    for value in with_past.graph.outputs:
        if not any(port.name == value.name and port.dtype == value.dtype for port in outputs):
            raise UnsupportedModelError(
                f"the cached decoder returns {value.name}, which the one without cache does not"
            )
    scope = _Scope(outputs)
    first, later = decoder.clone(), with_past.clone()
    without = scope.branch(first, "no_past")
    branches = {"then_branch": scope.branch(later, "with_past"), "else_branch": without}
    condition = ir.Value(name=USE_CACHE, type=ir.TensorType(ir.DataType.BOOL), shape=ir.Shape([1]))
    results = [port.value() for port in outputs]
    choice = ir.node("If", [condition], branches, outputs=results, name=USE_CACHE)
    graph = ir.Graph(
        [*scope.inputs.values(), condition],
        results,
        nodes=[choice],
        initializers=list(scope.initializers.values()),
        opset_imports={**later.opset_imports, **first.opset_imports},
        name="merged",
    )
    versions = [version for version in (first.ir_version, later.ir_version) if version is not None]
    return ir.Model(
        graph,
        ir_version=max(versions),
        producer_name=first.producer_name,
        producer_version=first.producer_version,
        functions=[*{**later.functions, **first.functions}.values()],
        metadata_props=first.metadata_props,
    )


@dataclass(frozen=True)
class _Port:
    """An input or output as the outer graph declares it."""

    name: str
    dtype: ir.DataType
    shape: tuple[int | str | None, ...]

    @classmethod
    def of(cls, value: ir.Value) -> _Port:
        """Lengths of cached keys get names of their own: they differ between the branches, or are 0."""
        assert value.name is not None
        assert value.dtype is not None
        assert value.shape is not None
        shape = [size if isinstance(size, int) else size.value for size in value.shape]
        if ".encoder." in value.name:
            shape[2] = ENCODER_LENGTH
        elif value.name.startswith("present."):
            shape[2] = "past_decoder_sequence_length + decoder_sequence_length"
        return cls(value.name, value.dtype, tuple(shape))

    def value(self) -> ir.Value:
        return ir.Value(name=self.name, type=ir.TensorType(self.dtype), shape=ir.Shape(self.shape))

    def empty(self) -> ir.Node:
        """A constant with the heads and the width of cached keys, for a batch of none."""
        heads, width = (size if isinstance(size, int) else 1 for size in (self.shape[1], self.shape[3]))
        shape = [0, heads, 1, width]
        tensor = ir.tensor(np.empty(shape, self.dtype.numpy()), name=self.name)
        result = ir.Value(name=self.name, type=ir.TensorType(self.dtype), shape=ir.Shape(shape))
        return ir.node("Constant", [], {"value": tensor}, outputs=[result], name=self.name)


class _Scope:
    """The surroundings of both branches: inputs by name, weights by tensor; and what both return."""

    def __init__(self, outputs: Sequence[_Port]) -> None:
        self.inputs: dict[str, ir.Value] = {}
        self.initializers: dict[int, ir.Value] = {}
        self._outputs = outputs
        self._names: set[str] = set()

    def branch(self, model: ir.Model, name: str) -> ir.Graph:
        """The nodes of `model` as a graph without inputs, its values renamed to `name/...`; `model` is used up."""
        graph = model.graph
        made = {value.name: value for value in graph.outputs}
        graph.outputs.clear()
        for value in graph.inputs:
            value.replace_all_uses_with(self._input(_Port.of(value)))
        kept = []
        for key, value in list(graph.initializers.items()):
            del graph.initializers[key]
            tensor = value.const_value
            assert tensor is not None
            if tensor.nbytes > INLINE_BYTES:
                value.replace_all_uses_with(self._initializer(value, tensor))
            else:
                kept.append(value)
        nodes = list(graph)
        graph.remove(nodes)
        for port in self._outputs:
            if port.name not in made:
                nodes.append(port.empty())
                made[port.name] = nodes[-1].outputs[0]
        results = [made[port.name] for port in self._outputs]
        for value in [*kept, *(value for node in nodes for value in node.outputs if value.name != "")]:
            value.name = f"{name}/{value.name}"
        for node in nodes:
            node.name = f"{name}/{node.name}" if node.name else None
        return ir.Graph([], results, nodes=nodes, initializers=kept, name=name)

    def _input(self, port: _Port) -> ir.Value:
        self._names.add(port.name)
        return self.inputs.setdefault(port.name, port.value())

    def _initializer(self, value: ir.Value, tensor: ir.TensorProtocol) -> ir.Value:
        if id(tensor) not in self.initializers:
            name = value.name or "weight"
            while name in self._names:
                name += "_"
            self._names.add(name)
            shape = ir.Shape(concrete_shape(tensor))
            self.initializers[id(tensor)] = ir.Value(
                name=name, type=ir.TensorType(tensor.dtype), shape=shape, const_value=tensor
            )
        return self.initializers[id(tensor)]


def _weights(model: ir.Model) -> Iterator[ir.Value]:
    for value in model.graph.initializers.values():
        if value.const_value is not None and value.const_value.dtype != ir.DataType.STRING:
            yield value


def _digest(tensor: ir.TensorProtocol) -> bytes:
    digest = hashlib.sha256()
    if isinstance(tensor, FileTensor):
        for start in range(0, tensor.nbytes, SLAB_BYTES):
            digest.update(tensor.read(start, min(SLAB_BYTES, tensor.nbytes - start)).data)
    else:
        digest.update(tensor.tobytes())
    return digest.digest()

"""Writes an ONNX graph node by node: no node twice, no idle reshape, constants as initializers, dead nodes left out."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import onnx_ir as ir
import sympy
from torch.utils._sympy import functions as torch_sympy

from onnxpress.errors import UnsupportedModelError
from onnxpress.graph.conventions import MODULE

Dimension: TypeAlias = "int | sympy.Expr"
"""A size: a number, or an expression of the graph's free dimensions, which are symbols with the dimensions' names."""


@dataclass
class _Pending:
    """A node to be, unless nothing needs it in the end."""

    domain: str
    op_type: str
    inputs: tuple[ir.Value | None, ...]
    attributes: Mapping[str, Any]
    outputs: list[ir.Value]
    module: str | None


class GraphWriter:
    """A graph that grows. Operators of the same inputs and attributes are written once (value numbering)."""

    def __init__(self) -> None:
        self.inputs: list[ir.Value] = []
        self.module: str | None = None
        """The torch module that nodes are being written for."""
        self._nodes: list[_Pending] = []
        self._producer: dict[ir.Value, _Pending] = {}
        self._known: dict[Any, tuple[ir.Value, ...]] = {}
        self._constants: dict[Any, ir.Value] = {}
        self._shapes: dict[ir.Value, tuple[Dimension, ...]] = {}
        self._sources: dict[str, tuple[ir.Value, int]] = {}
        self._names: set[str] = set()
        self._counts: dict[str, int] = {}

    def input(
        self, name: str, dtype: ir.DataType, shape: Sequence[Dimension], declared: Sequence[int | str]
    ) -> ir.Value:
        """Add a graph input; `declared` are its dimensions as clients see them, `shape` as the graph computes with
        them. A dimension is read from the first input that has it: what a client hands over as, say, the last layer's
        cache may have any length."""
        value = ir.Value(name=name, shape=ir.Shape(declared), type=ir.TensorType(dtype))
        self._names.add(name)
        self._shapes[value] = tuple(shape)
        self.inputs.append(value)
        for axis, dimension in enumerate(shape):
            if isinstance(dimension, sympy.Symbol):
                self._sources.setdefault(dimension.name, (value, axis))
        return value

    def parameter(self, name: str, dtype: ir.DataType, shape: Sequence[int]) -> ir.Value:
        """A weight that has no value yet."""
        value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))
        self._names.add(name)
        self._shapes[value] = tuple(shape)
        return value

    def constant(self, array: np.ndarray, name: str | None = None) -> ir.Value:
        """An initializer; equal arrays are one."""
        content = np.ascontiguousarray(array).view(np.uint8).data
        key = (array.dtype.name, array.shape, hashlib.sha256(content).digest())
        if key not in self._constants:
            tensor = ir.Tensor(array, name=self._fresh_name(name or "constant"))
            value = ir.Value(
                name=tensor.name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor
            )
            self._constants[key] = value
            self._shapes[value] = array.shape
        return self._constants[key]

    def op(
        self,
        op_type: str,
        *inputs: ir.Value | None,
        domain: str = "",
        shape: Sequence[Dimension] | None = None,
        dtype: ir.DataType | None = None,
        **attributes: Any,
    ) -> ir.Value:
        """A node with one output; attributes that are None are left out. `shape` and `dtype`: of the output, where the
        caller does not describe it later."""
        value = self.ops(op_type, *inputs, outputs=1, domain=domain, **attributes)[0]
        if shape is not None and dtype is not None:
            self.describe(value, shape, dtype)
        return value

    def ops(
        self, op_type: str, *inputs: ir.Value | None, outputs: int, domain: str = "", **attributes: Any
    ) -> tuple[ir.Value, ...]:
        """A node with several outputs."""
        attributes = {name: value for name, value in attributes.items() if value is not None}
        while inputs and inputs[-1] is None:
            inputs = inputs[:-1]
        key = (domain, op_type, tuple(map(id, inputs)), repr(sorted(attributes.items())), outputs)
        if key not in self._known:
            made = [ir.Value(name=self._fresh_name(op_type)) for _ in range(outputs)]
            node = _Pending(domain, op_type, inputs, attributes, made, self.module)
            self._nodes.append(node)
            self._producer.update(dict.fromkeys(made, node))
            self._known[key] = tuple(made)
        return self._known[key]

    def describe(self, value: ir.Value, shape: Sequence[Dimension], dtype: ir.DataType) -> None:
        """Note shape and type of a value."""
        if value not in self._shapes:
            self._shapes[value] = tuple(shape)
            value.shape = ir.Shape([dim if isinstance(dim, int) else str(dim) for dim in shape])
            value.dtype = dtype

    def shape(self, value: ir.Value) -> tuple[Dimension, ...]:
        return self._shapes[value]

    def reshape(self, value: ir.Value, shape: Sequence[Dimension]) -> ir.Value:
        """`value` in another shape, from wherever reshapes of it began: heads that are split off and merged again
        around a fused operator leave nothing behind."""
        wanted = tuple(shape)
        while True:
            if self._shapes[value] == wanted:
                return value
            node = self._producer.get(value)
            if node is None or node.op_type not in _RESHAPES or node.inputs[0] is None:
                break
            value = node.inputs[0]
        assert value.dtype is not None
        target, allowzero = self._target(self._shapes[value], wanted)
        return self.op("Reshape", value, target, allowzero=allowzero, shape=wanted, dtype=value.dtype)

    def _target(self, source: tuple[Dimension, ...], wanted: tuple[Dimension, ...]) -> tuple[ir.Value, int | None]:
        """Reshape's second input, a constant where 0 (as in the input) and one -1 (the rest) can say it, and its
        `allowzero`.

        With -1 no other dimension may be 0, which the length of the past is at the start of a text; where that has to
        be computed, 0 must mean 0.
        """
        sizes: list[Dimension] = [
            0 if axis < len(source) and dim == source[axis] and not isinstance(dim, int) else dim
            for axis, dim in enumerate(wanted)
        ]
        free = [axis for axis, size in enumerate(sizes) if not isinstance(size, int)]
        others = [dim for axis, dim in enumerate(wanted) if axis not in free]
        if len(free) == 1 and not any(may_be_zero(dim) for dim in others):
            sizes[free[0]] = -1
        elif any(may_be_zero(wanted[axis]) for axis in free) or 0 in wanted:
            return self.vector(wanted), 1
        return self.vector(sizes), None

    def transpose(self, value: ir.Value, axes: Sequence[int], shape: Sequence[Dimension]) -> ir.Value:
        """`value` with its axes in another order; transposes of transposes are one."""
        order = list(axes)
        node = self._producer.get(value)
        while node is not None and node.op_type == "Transpose" and node.inputs[0] is not None:
            value, before = node.inputs[0], node.attributes["perm"]
            order = [before[axis] for axis in order]
            node = self._producer.get(value)
        if order == list(range(len(order))):
            return value
        assert value.dtype is not None
        return self.op("Transpose", value, perm=order, shape=shape, dtype=value.dtype)

    def vector(self, sizes: Sequence[Dimension]) -> ir.Value:
        """Sizes as an int64 vector [n], neighbours that are numbers as one constant."""
        if all(isinstance(size, (int, sympy.Integer)) for size in sizes):
            return self.constant(np.array([int(size) for size in sizes], dtype=np.int64))
        parts: list[ir.Value] = []
        numbers: list[int] = []
        for size in [*sizes, None]:
            if isinstance(size, (int, sympy.Integer)):
                numbers.append(int(size))
                continue
            if numbers:
                parts.append(self.constant(np.array(numbers, dtype=np.int64)))
                numbers = []
            if size is not None:
                parts.append(self._computed(size))
        if len(parts) == 1:
            return parts[0]
        return self.op("Concat", *parts, axis=0, shape=[len(sizes)], dtype=ir.DataType.INT64)

    def integer(self, size: Dimension) -> ir.Value:
        """A size as an int64 scalar."""
        if isinstance(size, (int, sympy.Integer)):
            return self.constant(np.array(int(size), dtype=np.int64))
        axes = self.constant(np.array([0], dtype=np.int64))
        return self.op("Squeeze", self._computed(size), axes, shape=[], dtype=ir.DataType.INT64)

    def _computed(self, size: sympy.Expr) -> ir.Value:
        """An expression of dimensions as an int64 vector of one element."""
        if isinstance(size, sympy.Integer):
            return self.constant(np.array([int(size)], dtype=np.int64))
        if isinstance(size, sympy.Symbol):
            if size.name not in self._sources:
                raise UnsupportedModelError(f"the graph needs {size}, which no input has as a dimension")
            source, axis = self._sources[size.name]
            return self.op("Shape", source, start=axis, end=axis + 1, shape=[1], dtype=ir.DataType.INT64)
        if isinstance(size, sympy.Add):
            return self._sum(size)
        parts = [self._computed(part) for part in size.args]
        if isinstance(size, sympy.Pow) and isinstance(size.args[1], sympy.Integer) and size.args[1] > 0:
            return self._folded("Mul", [parts[0]] * int(size.args[1]))
        if isinstance(size, torch_sympy.FloorDiv):  # Div truncates: what is divided is first made divisible
            rest = self._int64("Mod", *parts)
            return self._int64("Div", self._int64("Sub", parts[0], rest), parts[1])
        for kinds, op_type in _ARITHMETIC.items():
            if isinstance(size, kinds):
                return self._folded(op_type, parts)
        raise UnsupportedModelError(f"the size {size} is not computed with integers")

    def _sum(self, size: sympy.Expr) -> ir.Value:
        negative = [term for term in size.args if term.could_extract_minus_sign()]
        positive = [term for term in size.args if term not in negative]
        if not positive:
            return self._folded("Add", map(self._computed, negative))
        result = self._folded("Add", map(self._computed, positive))
        for term in negative:
            result = self._int64("Sub", result, self._computed(-term))
        return result

    def _folded(self, op_type: str, parts: Iterable[ir.Value]) -> ir.Value:
        result, *rest = parts
        for part in rest:
            result = self._int64(op_type, result, part)
        return result

    def _int64(self, op_type: str, *inputs: ir.Value) -> ir.Value:
        return self.op(op_type, *inputs, shape=[1], dtype=ir.DataType.INT64)

    def finish(self, outputs: Mapping[str, ir.Value], opset: int, versions: Mapping[str, int]) -> ir.Graph:
        """The graph that computes `outputs`; what they do not need is left out (but no input is)."""
        named: list[ir.Value] = []
        for name, value in outputs.items():
            if value not in self._producer or value in named:  # an input, a constant, or an output twice
                shape, dtype = self._shapes[value], value.dtype
                assert dtype is not None
                self._known.pop(("", "Identity", (id(value),), "[]", 1), None)
                value = self.op("Identity", value, shape=shape, dtype=dtype)
            value.name = name
            named.append(value)
        needed = set(named)
        live: list[_Pending] = []
        for pending in reversed(self._nodes):
            if needed.intersection(pending.outputs):
                live.append(pending)
                needed.update(value for value in pending.inputs if value is not None)
        nodes = [_made(pending) for pending in reversed(live)]
        made = {value for node in nodes for value in node.outputs}
        given = set(self.inputs)
        initializers = dict.fromkeys(
            value for node in nodes for value in node.inputs if value is not None and value not in made | given
        )
        domains = {"": opset, **{node.domain: versions.get(node.domain, 1) for node in nodes if node.domain}}
        return ir.Graph(
            self.inputs,
            named,
            nodes=nodes,
            initializers=list(initializers),
            opset_imports=domains,
            name="main_graph",
        )

    def _fresh_name(self, stem: str) -> str:
        name = stem
        while name in self._names:
            self._counts[stem] = self._counts.get(stem, 0) + 1
            name = f"{stem}_{self._counts[stem]}"
        self._names.add(name)
        return name


def _made(pending: _Pending) -> ir.Node:
    attributes = ir.convenience.convert_attributes(pending.attributes)
    node = ir.Node(pending.domain, pending.op_type, pending.inputs, attributes, outputs=pending.outputs)
    if pending.module is not None:
        node.metadata_props[MODULE] = pending.module
    return node


def may_be_zero(size: Dimension) -> bool:
    """Whether a dimension can be 0 in a call that makes sense: only a number, or what is past, can."""
    if isinstance(size, int):
        return size == 0
    return any(symbol.name.startswith("past_") for symbol in size.free_symbols)


_RESHAPES = {"Reshape", "Unsqueeze", "Squeeze"}
_ARITHMETIC: dict[tuple[type, ...], str] = {
    (sympy.Mul,): "Mul",
    (torch_sympy.Mod, torch_sympy.PythonMod): "Mod",
    (torch_sympy.Max,): "Max",
    (torch_sympy.Min,): "Min",
}

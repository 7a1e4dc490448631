"""Runs a torch module on tensors without values and writes down every operator as ONNX.

Sizes are symbolic (`torch.fx.experimental.symbolic_shapes`): an operator's arguments say by themselves how they follow
from the graph's free dimensions, so that nothing but calls of operators has to be recorded. What is known while
recording (tables, masks that depend on nothing, positions of patches) is computed by torch and becomes a constant.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.weak import WeakIdKeyDictionary

from onnxpress.exporter.sources.torch_arrays import IR_DTYPES, to_numpy
from onnxpress.exporter.tracing.dimensions import Dimensions
from onnxpress.exporter.tracing.writer import Dimension, GraphWriter

FOLDED = 4096
"""Elements that a constant computed while recording may have."""


class CannotRecord(Exception):
    """The module does something that has no translation; names it."""


Translate = Callable[["Recorder", Any, Any, Any, Any], Sequence[ir.Value | None]]
"""(recorder, operator, what it returned, its arguments, its keyword arguments) -> values of what it returned."""


class Recorder(TorchDispatchMode):
    """While it is entered, calls of operators become nodes of `writer`."""

    def __init__(
        self, module: nn.Module, dimensions: Dimensions, names: Mapping[str, str], translate: Translate
    ) -> None:
        """names: of those tensors of the module's state that stay without values -> their names in the graph."""
        super().__init__()
        self._translate = translate
        self.writer = GraphWriter()
        self.dimensions = dimensions
        self.fake = FakeTensorMode(shape_env=dimensions.environment, allow_non_fake_inputs=True)
        self.fake.cache_enabled = False  # remembering what a call gives takes longer than few repeated calls save
        self._values: Any = WeakIdKeyDictionary()
        """ir.Value of each tensor that has been met."""
        self._constants: Any = WeakIdKeyDictionary()
        """Values of tensors that are known."""
        self._buffers = {id(buffer): name for name, buffer in module.named_buffers() if name not in names}
        self._paused = False
        state = module.state_dict(keep_vars=True)
        for name, renamed in names.items():
            tensor = state[name]
            if tensor not in self._values:  # a tied parameter has several names
                self._values[tensor] = self.writer.parameter(renamed, IR_DTYPES[tensor.dtype], tensor.shape)

    def input(self, name: str, example: Tensor, free: Mapping[int, str]) -> Tensor:
        """A graph input like `example`, with named free dimensions by axis."""
        sizes = [
            self.dimensions.size(free[axis], size) if axis in free else size for axis, size in enumerate(example.shape)
        ]
        tensor = self._empty(sizes, example.dtype)
        declared = [free.get(axis, size) for axis, size in enumerate(example.shape)]
        shape = [self.dimensions[size] for size in sizes]
        self._values[tensor] = self.writer.input(name, IR_DTYPES[example.dtype], shape, declared)
        return tensor

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._paused or func.namespace == "prim":
            return func(*args, **kwargs)
        if func is torch.ops.aten._local_scalar_dense.default:
            known = self.known(args[0])
            if known is None:
                raise CannotRecord("the model decides by the values of its inputs what it computes")
            return known.item()
        made = func(*args, **kwargs)
        results = made if isinstance(made, (tuple, list)) else [made]
        written = args[0] if func._schema.is_mutable else None
        if written is not None:
            self._check_writable(func, written)
        folded = self._folded(func, args, kwargs, results)
        if folded is not None:
            for tensor, value in zip(results, folded, strict=True):
                self._values.pop(tensor, None)
                self._constants[tensor] = value
            return made
        values = self._translate(self, func, made, args, kwargs)
        for tensor, value in zip(results, values, strict=True):
            if value is None:
                continue
            self.writer.describe(value, self.shape(tensor), IR_DTYPES[tensor.dtype])
            self._constants.pop(tensor, None)
            self._values[tensor] = value
        return made

    def _check_writable(self, func: Any, tensor: Tensor) -> None:
        """Writing into a tensor gives it a new value; a tensor that shares its memory would not notice."""
        storage = tensor.untyped_storage()._cdata
        for known in (self._values, self._constants):
            for other in list(known):
                if other is not tensor and isinstance(other, FakeTensor) and other.untyped_storage()._cdata == storage:
                    raise CannotRecord(f"the model writes into part of a tensor ({func})")
        if not isinstance(tensor, FakeTensor):
            raise CannotRecord(f"the model writes into its own state ({func})")

    def _folded(self, func: Any, args: Any, kwargs: Any, results: Sequence[Tensor]) -> list[Tensor] | None:
        """The results where everything that they depend on is known and they are small."""
        leaves = tree_leaves((args, kwargs))
        if any(isinstance(leaf, (torch.SymInt, torch.SymFloat, torch.SymBool)) for leaf in leaves):
            return None
        known: dict[int, Any] = {id(leaf): self.known(leaf) for leaf in leaves if isinstance(leaf, Tensor)}
        if any(value is None for value in known.values()) or torch.Tag.nondeterministic_seeded in func.tags:
            return None
        if any(tensor.numel() > FOLDED for tensor in results) or func.__name__.startswith(("empty", "new_empty")):
            return None
        with unset_fake_temporarily():
            args, kwargs = tree_map_only(Tensor, lambda leaf: known[id(leaf)].clone(), (args, kwargs))
            made = func(*args, **kwargs)
        return list(made) if isinstance(made, (tuple, list)) else [made]

    def known(self, tensor: Tensor) -> Tensor | None:
        """The values of a tensor, if they do not depend on inputs or parameters."""
        if tensor in self._values:
            return None
        return self._constants.get(tensor) if isinstance(tensor, FakeTensor) else tensor

    def value(self, tensor: Tensor | ir.Value) -> ir.Value:
        """The graph's value for a tensor."""
        if isinstance(tensor, ir.Value):
            return tensor
        if tensor in self._values:
            found: ir.Value = self._values[tensor]
            return found
        known = self.known(tensor)
        assert known is not None, "a tensor that no recorded operator made"
        with unset_fake_temporarily():
            return self.writer.constant(to_numpy(known.detach()), self._buffers.get(id(tensor)))

    def _optional(self, tensor: Tensor | ir.Value | None) -> ir.Value | None:
        return None if tensor is None else self.value(tensor)

    def op(self, op_type: str, *inputs: Tensor | ir.Value | None, **attributes: Any) -> ir.Value:
        return self.writer.op(op_type, *map(self._optional, inputs), **attributes)

    def shape(self, sizes: Tensor | Sequence[int | torch.SymInt]) -> tuple[Dimension, ...]:
        """The shape of a tensor, or sizes, in terms of the graph's free dimensions."""
        return tuple(self.dimensions[size] for size in (sizes.shape if isinstance(sizes, Tensor) else sizes))

    def scalar(self, number: Any, dtype: torch.dtype) -> ir.Value:
        """A number, or a size, as a constant or computed scalar of a type."""
        if isinstance(number, torch.SymInt):
            size = self.dimensions[number]
            if isinstance(size, int):
                return self.scalar(size, dtype)
            return self.cast(self.writer.integer(size), dtype)
        if isinstance(number, (torch.SymFloat, torch.SymBool)):
            raise CannotRecord(f"the model computes with {number}, a fraction of a size")
        return self.writer.constant(np.array(number, dtype=IR_DTYPES[dtype].numpy()))

    def cast(self, tensor: Tensor | ir.Value, dtype: torch.dtype) -> ir.Value:
        value = self.value(tensor)
        wanted = IR_DTYPES[dtype]
        if value.dtype == wanted:
            return value
        return self.op("Cast", value, to=wanted.value, shape=self.writer.shape(value), dtype=wanted)

    def dtype(self, tensor: Tensor) -> ir.DataType:
        return IR_DTYPES[tensor.dtype]

    def reshape(self, tensor: Tensor, like: Tensor) -> ir.Value:
        return self.writer.reshape(self.value(tensor), self.shape(like))

    def transpose(self, tensor: Tensor, like: Tensor, axes: Sequence[int]) -> ir.Value:
        return self.writer.transpose(self.value(tensor), axes, self.shape(like))

    def broadcast(self, value: ir.Value, shape: Sequence[Dimension]) -> ir.Value:
        """`value` expanded to a shape."""
        if self.writer.shape(value) == tuple(shape):
            return value
        return self.op("Expand", value, self.writer.vector(shape), shape=shape, dtype=value.dtype)

    def node(
        self,
        domain: str,
        op_type: str,
        inputs: Sequence[Tensor | None],
        attributes: Mapping[str, Any],
        outputs: Sequence[tuple[torch.dtype, Sequence[int | torch.SymInt]]],
    ) -> list[Tensor]:
        """Write a node of any operator and return its outputs: tensors of the types and shapes given."""
        values = self.writer.ops(
            op_type, *map(self._optional, inputs), outputs=len(outputs), domain=domain, **attributes
        )
        made = [self._empty(shape, dtype) for dtype, shape in outputs]
        for tensor, value in zip(made, values, strict=True):
            self.writer.describe(value, self.shape(tensor), IR_DTYPES[tensor.dtype])
            self._values[tensor] = value
        return made

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Nothing that is called inside is recorded."""
        self._paused, before = True, self._paused
        try:
            yield
        finally:
            self._paused = before

    def _empty(self, sizes: Sequence[int | torch.SymInt], dtype: torch.dtype) -> Tensor:
        with self.paused(), self.fake:
            return torch.empty(tuple(sizes), dtype=dtype)


_active: list[Recorder] = []


def active_recorder() -> Recorder:
    """The recorder of the trace that is under way."""
    return _active[-1]


@contextmanager
def recording(recorder: Recorder, module: nn.Module) -> Iterator[None]:
    """Record what is called inside, each node with the name of the submodule of `module` that called it."""
    names = {id(submodule): name for name, submodule in module.named_modules()}
    entered: list[str | None] = []

    def enter(submodule: nn.Module, _: Any) -> None:
        entered.append(recorder.writer.module)
        name = names.get(id(submodule), "")
        if name:
            recorder.writer.module = name

    def leave(*_: Any) -> None:
        recorder.writer.module = entered.pop()

    hooks = [register_module_forward_pre_hook(enter), register_module_forward_hook(leave, always_call=True)]
    _active.append(recorder)
    flags = torch.compiler
    before = flags._is_compiling_flag, flags._is_exporting_flag
    flags._is_compiling_flag = flags._is_exporting_flag = True  # what torch.export tells the modules that ask
    try:
        with torch.no_grad(), enable_python_dispatcher(), recorder.fake, recorder:
            yield
    finally:
        flags._is_compiling_flag, flags._is_exporting_flag = before
        _active.pop()
        for hook in hooks:
            hook.remove()

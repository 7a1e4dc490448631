"""Functions that torch would take apart into more operators than ONNX needs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from onnxpress.exporter.tracing import operators
from onnxpress.exporter.tracing.recorder import active_recorder

_MATMUL = {torch.matmul, Tensor.matmul, Tensor.__matmul__}


class WholeFunctions(TorchFunctionMode):
    """While it is entered, a product of matrices is one operator, a product with a parameter `operators.linear`, and
    `torch.tensor` takes a symbolic size as it is."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _MATMUL and len(args) == 2 and not kwargs and all(tensor.dim() > 1 for tensor in args):
            left, right = args
            shape = (*torch.broadcast_shapes(left.shape[:-2], right.shape[:-2]), left.shape[-2], right.shape[-1])
            return active_recorder().node("", "MatMul", args, {}, [(left.dtype, shape)])[0]
        if func is nn.functional.linear and isinstance(args[1], nn.Parameter) and args[1].dim() == 2:
            return operators.linear(args[0], args[1], args[2] if len(args) > 2 else kwargs.get("bias"))
        if func is torch.tensor and isinstance(args[0], torch.SymInt):
            return torch.full((), args[0], dtype=kwargs.get("dtype", torch.int64))
        return func(*args, **kwargs)

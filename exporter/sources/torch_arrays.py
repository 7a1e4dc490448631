"""Element types and values between torch, numpy and ONNX; bfloat16, which numpy lacks, is ml_dtypes'."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import ml_dtypes
import numpy as np
import onnx_ir as ir
import torch

from onnxpress.arrays import Array

with (
    warnings.catch_warnings()
):  # torch says once per process that arrays over mapped files are read-only: let it be now
    warnings.simplefilter("ignore")
    torch.from_numpy(np.frombuffer(b"read-only", dtype=np.uint8))

TORCH_DTYPES: Mapping[ir.DataType, torch.dtype] = {
    ir.DataType.BOOL: torch.bool,
    ir.DataType.UINT8: torch.uint8,
    ir.DataType.INT8: torch.int8,
    ir.DataType.INT16: torch.int16,
    ir.DataType.INT32: torch.int32,
    ir.DataType.INT64: torch.int64,
    ir.DataType.FLOAT16: torch.float16,
    ir.DataType.BFLOAT16: torch.bfloat16,
    ir.DataType.FLOAT: torch.float32,
    ir.DataType.DOUBLE: torch.float64,
}
IR_DTYPES = {theirs: ours for ours, theirs in TORCH_DTYPES.items()}


def to_torch(array: Array) -> torch.Tensor:
    """The array as a tensor of the same type; shares memory that may be a read-only file: never write to it."""
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def to_numpy(tensor: torch.Tensor) -> Array:
    """The tensor as an array of the same type; bfloat16 becomes ml_dtypes'."""
    is_bfloat16 = tensor.dtype == torch.bfloat16
    array: Array = (tensor.view(torch.int16) if is_bfloat16 else tensor).contiguous().numpy()
    return array.view(ml_dtypes.bfloat16) if is_bfloat16 else array

"""Fingerprints of a graph, its samples and a method, by which an interrupted calibration goes on."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from onnxpress.arrays import Feeds
from onnxpress.graph.io import SLAB_BYTES
from onnxpress.graph.tensors import concrete_shape, rows_of


def fingerprint(model: ir.Model, samples: Sequence[Feeds], method: str) -> str:
    """A digest of every node, every weight and every sample, a slab at a time."""
    digest = hashlib.blake2b(method.encode(), digest_size=16)
    for node in model.graph:
        attributes = sorted(f"{name}={attribute.value}" for name, attribute in node.attributes.items())
        names = [str(value.name) if value is not None else "" for value in (*node.inputs, *node.outputs)]
        digest.update(f"{node.domain}.{node.op_type} {names} {attributes}".encode())
    for name, value in sorted(model.graph.initializers.items()):
        tensor = value.const_value
        if tensor is None:
            continue
        shape = concrete_shape(tensor)
        digest.update(f"{name} {tensor.dtype} {shape}".encode())
        if not shape or tensor.dtype.bitwidth < 8 or tensor.dtype == ir.DataType.STRING:
            digest.update(repr(tensor.numpy()).encode() if tensor.dtype == ir.DataType.STRING else tensor.tobytes())
            continue
        rows, step = rows_of(tensor), max(1, SLAB_BYTES * shape[0] // max(1, tensor.nbytes))
        for start in range(0, shape[0], step):
            digest.update(np.ascontiguousarray(rows(start, min(start + step, shape[0]))).view(np.uint8).data)
    for sample in samples:
        for name, array in sorted(sample.items()):
            digest.update(f"{name} {array.dtype} {array.shape}".encode())
            digest.update(np.ascontiguousarray(array).view(np.uint8).data)
    return digest.hexdigest()

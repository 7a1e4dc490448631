"""What was found for weights that several graphs share, as an encoder-decoder's two decoders do."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping

import numpy as np
import onnx_ir as ir

from onnxpress.graph.anatomy import Product
from onnxpress.graph.anatomy.editing import read_weight

Found = Mapping[str, ir.TensorProtocol]


class FittedOnce:
    """Results by weight, its name and what it holds: fitted in the first graph, they are the same in the others."""

    def __init__(self) -> None:
        self._found: dict[tuple[str, bytes], Found] = {}

    def get(self, product: Product, compute: Callable[[], Found]) -> Found:
        """What `compute` returned for this weight the first time."""
        weight = np.ascontiguousarray(read_weight(product)).view(np.uint8)
        key = product.name, hashlib.blake2b(weight.data, digest_size=16).digest()
        if key not in self._found:
            self._found[key] = compute()
        return self._found[key]

"""Gradients of weights, which come from elsewhere: nothing here differentiates."""

from __future__ import annotations

import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from onnxpress.errors import UsageError
from onnxpress.graph.anatomy import Product


def read_gradients(path: Path, products: Iterable[Product]) -> Mapping[str, Any]:
    """The arrays of an .npz file by name of the weight, each read when it is asked for.

    Raises UsageError where the file cannot be read, or the gradient of a product is missing or of another shape.
    """
    try:
        gradients: Mapping[str, Any] = np.load(path)
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise UsageError(f"cannot read gradients from {path}: {error}", hint="give an .npz file") from error
    for product in products:
        if product.name not in gradients:
            raise UsageError(
                f"{path} has no gradient of {product.name}", hint="name arrays as the graph names its weights"
            )
        shape = gradients[product.name].shape
        if shape != product.features:
            raise UsageError(
                f"the gradient of {product.name} is {list(shape)}; its weight {list(product.features)}",
                hint="gradients are [in, out], as MatMul's weights are",
            )
    return gradients

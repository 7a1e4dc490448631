"""ATen operators as ONNX operators (opset 21), one function each.

A translation takes the recorder, what the operator returned (tensors of the right shape and type, without values), and
the operator's own arguments; it writes nodes and returns a value, or one for each output (None for what is not given).
Names and arguments are those of ATen's `native_functions.yaml`. Imports `exporter.tracing`.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from onnxpress.exporter.aten import elementwise, products, reductions, shapes
from onnxpress.exporter.aten.table import TRANSLATIONS
from onnxpress.exporter.tracing.recorder import CannotRecord, Recorder

__all__ = ["elementwise", "products", "reductions", "shapes", "translate"]


def translate(recorder: Recorder, func: Any, made: Any, args: Any, kwargs: Any) -> list[ir.Value | None]:
    """Write what the operator `func` computes. Raises CannotRecord for one that is not known."""
    operator = func._schema.name.removeprefix("aten::")
    name = operator.removesuffix("_") if func._schema.is_mutable else operator
    overload = func._overloadname
    translation = TRANSLATIONS.get(f"{name}.{overload}", TRANSLATIONS.get(name))
    if translation is None:
        raise CannotRecord(f"no translation of the operator {func} to ONNX")
    try:
        values = translation(recorder, made, *args, **kwargs)
    except TypeError as error:  # an overload with other arguments
        raise CannotRecord(f"no translation of the operator {func} with these arguments") from error
    return list(values) if isinstance(made, (tuple, list)) else [values]

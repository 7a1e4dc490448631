"""Operators that work on each element by itself, with broadcasting and type promotion."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor

from onnxpress.exporter.aten.table import TRANSLATIONS, aten
from onnxpress.exporter.tracing.recorder import CannotRecord, Recorder

FLOATING = (
    *("sqrt:Sqrt", "exp:Exp", "log:Log", "sin:Sin", "cos:Cos", "tan:Tan", "tanh:Tanh", "sigmoid:Sigmoid", "erf:Erf"),
    *("reciprocal:Reciprocal", "asinh:Asinh", "atan:Atan"),
)
"""ATen's name : ONNX's, of functions whose result is a floating-point number; integers are converted first."""
PLAIN = (
    *("abs:Abs", "neg:Neg", "sign:Sign", "relu:Relu", "ceil:Ceil", "floor:Floor", "round:Round", "isnan:IsNaN"),
    *("logical_not:Not", "mish:Mish", "hardswish:HardSwish"),
)
"""Functions whose result has the type of their argument, or is a bool."""
COMPARISONS = ("eq:Equal", "lt:Less", "le:LessOrEqual", "gt:Greater", "ge:GreaterOrEqual")


def operand(r: Recorder, number: Any, dtype: torch.dtype) -> ir.Value:
    """A tensor, or a number, as a value of the type."""
    return r.cast(number, dtype) if isinstance(number, Tensor) else r.scalar(number, dtype)


def common_dtype(first: Any, second: Any) -> torch.dtype:
    """The type in which torch compares or combines two tensors or numbers."""
    plain = [3 if isinstance(number, torch.SymInt) else number for number in (first, second)]
    dtype: torch.dtype = torch.result_type(*plain)
    return dtype


def _floating(op_type: str) -> Callable[..., ir.Value]:
    def translation(r: Recorder, out: Tensor, x: Tensor) -> ir.Value:
        return r.op(op_type, r.cast(x, out.dtype))

    return translation


def _plain(op_type: str) -> Callable[..., ir.Value]:
    def translation(r: Recorder, out: Tensor, x: Tensor) -> ir.Value:
        return r.op(op_type, r.cast(x, torch.bool) if op_type == "Not" else x)

    return translation


def _comparison(op_type: str) -> Callable[..., ir.Value]:
    def translation(r: Recorder, out: Tensor, x: Any, y: Any) -> ir.Value:
        dtype = common_dtype(x, y)
        if dtype == torch.bool and op_type != "Equal":
            dtype = torch.int32
        return r.op(op_type, operand(r, x, dtype), operand(r, y, dtype))

    return translation


for pair in FLOATING:
    TRANSLATIONS[pair.split(":")[0]] = _floating(pair.split(":")[1])
for pair in PLAIN:
    TRANSLATIONS[pair.split(":")[0]] = _plain(pair.split(":")[1])
for pair in COMPARISONS:
    TRANSLATIONS[pair.split(":")[0]] = _comparison(pair.split(":")[1])


@aten("ne")
def not_equal(r: Recorder, out: Tensor, x: Any, y: Any) -> ir.Value:
    equal = _comparison("Equal")(r, out, x, y)
    r.writer.describe(equal, r.shape(out), ir.DataType.BOOL)
    return r.op("Not", equal)


@aten("add")
def add(r: Recorder, out: Tensor, x: Any, y: Any, alpha: Any = 1) -> ir.Value:
    return _linear(r, out, "Add", x, y, alpha)


@aten("sub")
def subtract(r: Recorder, out: Tensor, x: Any, y: Any, alpha: Any = 1) -> ir.Value:
    return _linear(r, out, "Sub", x, y, alpha)


@aten("rsub")
def subtract_from(r: Recorder, out: Tensor, x: Any, y: Any, alpha: Any = 1) -> ir.Value:
    if alpha != 1:
        raise CannotRecord("rsub with alpha")
    return _linear(r, out, "Sub", y, x, 1)


def _linear(r: Recorder, out: Tensor, op_type: str, x: Any, y: Any, alpha: Any) -> ir.Value:
    if out.dtype == torch.bool:
        raise CannotRecord("a sum of bools")
    if alpha != 1 and not isinstance(y, Tensor):
        y, alpha = y * alpha, 1
    second = operand(r, y, out.dtype)
    if alpha != 1:
        second = r.op("Mul", second, r.scalar(alpha, out.dtype), shape=r.writer.shape(second), dtype=second.dtype)
    return r.op(op_type, operand(r, x, out.dtype), second)


@aten("mul")
def multiply(r: Recorder, out: Tensor, x: Any, y: Any) -> ir.Value:
    op_type = "And" if out.dtype == torch.bool else "Mul"
    return r.op(op_type, operand(r, x, out.dtype), operand(r, y, out.dtype))


@aten("div.Tensor", "div.Scalar", "true_divide")
def divide(r: Recorder, out: Tensor, x: Any, y: Any) -> ir.Value:
    return r.op("Div", operand(r, x, out.dtype), operand(r, y, out.dtype))


@aten("div.Tensor_mode", "div.Scalar_mode")
def divide_rounding(r: Recorder, out: Tensor, x: Any, y: Any, rounding_mode: str | None = None) -> ir.Value:
    if rounding_mode is None:
        return divide(r, out, x, y)
    first, second = operand(r, x, out.dtype), operand(r, y, out.dtype)
    if out.is_floating_point():
        quotient = r.op("Div", first, second, shape=r.shape(out), dtype=r.dtype(out))
        if rounding_mode == "floor":
            return r.op("Floor", quotient)
        whole = r.op("Floor", r.op("Abs", quotient))
        return r.op("Mul", r.op("Sign", quotient), whole)
    if rounding_mode == "trunc":  # as ONNX divides integers
        return r.op("Div", first, second)
    rest = r.op("Mod", first, second, shape=r.shape(out), dtype=r.dtype(out))
    return r.op("Div", r.op("Sub", first, rest), second)


@aten("floor_divide")
def divide_floor(r: Recorder, out: Tensor, x: Any, y: Any) -> ir.Value:
    return divide_rounding(r, out, x, y, "floor")


@aten("remainder")
def remainder(r: Recorder, out: Tensor, x: Any, y: Any) -> ir.Value:
    """With the divisor's sign: ONNX's Mod for integers; by its definition for floats, whose Mod has the dividend's."""
    first, second = operand(r, x, out.dtype), operand(r, y, out.dtype)
    if not out.is_floating_point():
        return r.op("Mod", first, second)
    return r.op("Sub", first, r.op("Mul", r.op("Floor", r.op("Div", first, second)), second))


@aten("pow.Tensor_Scalar", "pow.Tensor_Tensor", "pow.Scalar")
def power(r: Recorder, out: Tensor, x: Any, y: Any) -> ir.Value:
    if not isinstance(y, Tensor) and y == 0.5:
        return r.op("Sqrt", r.cast(x, out.dtype))
    return r.op("Pow", operand(r, x, out.dtype), operand(r, y, out.dtype))


@aten("rsqrt")
def reciprocal_root(r: Recorder, out: Tensor, x: Tensor) -> ir.Value:
    root = r.op("Sqrt", r.cast(x, out.dtype), shape=r.shape(out), dtype=r.dtype(out))
    return r.op("Reciprocal", root)


@aten("log1p")
def log_one_plus(r: Recorder, out: Tensor, x: Tensor) -> ir.Value:
    return r.op("Log", r.op("Add", r.cast(x, out.dtype), r.scalar(1, out.dtype)))


@aten("maximum", "max.other")
def maximum(r: Recorder, out: Tensor, x: Tensor, y: Tensor) -> ir.Value:
    return r.op("Max", r.cast(x, out.dtype), r.cast(y, out.dtype))


@aten("minimum", "min.other")
def minimum(r: Recorder, out: Tensor, x: Tensor, y: Tensor) -> ir.Value:
    return r.op("Min", r.cast(x, out.dtype), r.cast(y, out.dtype))


@aten("clamp", "clamp.Tensor")
def clamp(r: Recorder, out: Tensor, x: Tensor, min: Any = None, max: Any = None) -> ir.Value:
    if isinstance(min, Tensor) or isinstance(max, Tensor):
        value = r.cast(x, out.dtype)
        if min is not None:
            value = r.op("Max", value, operand(r, min, out.dtype))
        return value if max is None else r.op("Min", value, operand(r, max, out.dtype))
    limits = [None if limit is None else r.scalar(limit, out.dtype) for limit in (min, max)]
    return r.op("Clip", r.cast(x, out.dtype), *(limits if max is not None else limits[:1]))


@aten("clamp_min")
def clamp_min(r: Recorder, out: Tensor, x: Tensor, limit: Any) -> ir.Value:
    return clamp(r, out, x, limit)


@aten("clamp_max")
def clamp_max(r: Recorder, out: Tensor, x: Tensor, limit: Any) -> ir.Value:
    return clamp(r, out, x, None, limit)


@aten("hardtanh")
def hard_tanh(r: Recorder, out: Tensor, x: Tensor, min: Any = -1, max: Any = 1) -> ir.Value:
    return clamp(r, out, x, min, max)


@aten("gelu")
def gelu(r: Recorder, out: Tensor, x: Tensor, approximate: str = "none") -> ir.Value:
    return r.op("Gelu", x, approximate=approximate)


@aten("silu")
def silu(r: Recorder, out: Tensor, x: Tensor) -> ir.Value:
    return r.op("Mul", x, r.op("Sigmoid", x, shape=r.shape(out), dtype=r.dtype(out)))


@aten("softplus")
def softplus(r: Recorder, out: Tensor, x: Tensor, beta: Any = 1, threshold: Any = 20) -> ir.Value:
    """Beyond the threshold torch takes the argument itself, from which softplus differs by less than exp(-20)."""
    if beta != 1 or threshold < 20:
        raise CannotRecord(f"softplus with beta {beta} and threshold {threshold}")
    return r.op("Softplus", x)


@aten("leaky_relu")
def leaky_relu(r: Recorder, out: Tensor, x: Tensor, negative_slope: Any = 0.01) -> ir.Value:
    return r.op("LeakyRelu", x, alpha=float(negative_slope))


@aten("elu")
def elu(r: Recorder, out: Tensor, x: Tensor, alpha: Any = 1, scale: Any = 1, input_scale: Any = 1) -> ir.Value:
    if scale != 1 or input_scale != 1:
        raise CannotRecord("elu with scales")
    return r.op("Elu", x, alpha=float(alpha))


@aten("hardsigmoid")
def hard_sigmoid(r: Recorder, out: Tensor, x: Tensor) -> ir.Value:
    return r.op("HardSigmoid", x, alpha=1 / 6, beta=0.5)


@aten("where.self", "where.ScalarSelf", "where.ScalarOther", "where.Scalar")
def where(r: Recorder, out: Tensor, condition: Tensor, x: Any, y: Any) -> ir.Value:
    return r.op("Where", r.cast(condition, torch.bool), operand(r, x, out.dtype), operand(r, y, out.dtype))


@aten("masked_fill")
def masked_fill(r: Recorder, out: Tensor, x: Tensor, mask: Tensor, value: Any) -> ir.Value:
    return r.op("Where", mask, operand(r, value, out.dtype), x)


@aten("_to_copy")
def to_copy(r: Recorder, out: Tensor, x: Tensor, **options: Any) -> ir.Value:
    return r.cast(x, out.dtype)


@aten("clone", "detach", "alias", "lift_fresh", "lift_fresh_copy", "contiguous")
def same(r: Recorder, out: Tensor, x: Tensor, **options: Any) -> ir.Value:
    return r.value(x)


def _logical(logical: str, bitwise: str | None) -> Callable[..., ir.Value]:
    def translation(r: Recorder, out: Tensor, x: Any, y: Any) -> ir.Value:
        if out.dtype == torch.bool:
            return r.op(logical, operand(r, x, torch.bool), operand(r, y, torch.bool))
        if bitwise is None:
            raise CannotRecord(f"{logical} of {out.dtype}")
        return r.op(bitwise, operand(r, x, out.dtype), operand(r, y, out.dtype))

    return translation


aten("bitwise_and", "__and__")(_logical("And", "BitwiseAnd"))
aten("bitwise_or", "__or__")(_logical("Or", "BitwiseOr"))
aten("bitwise_xor", "__xor__")(_logical("Xor", "BitwiseXor"))
aten("logical_and")(_logical("And", None))
aten("logical_or")(_logical("Or", None))
aten("logical_xor")(_logical("Xor", None))


@aten("bitwise_not")
def bitwise_not(r: Recorder, out: Tensor, x: Tensor) -> ir.Value:
    return r.op("Not" if out.dtype == torch.bool else "BitwiseNot", x)

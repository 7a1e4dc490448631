"""Reductions that an attention cannot take: what its operator, its rotations, a method or memory do not allow."""

from __future__ import annotations

from onnxpress.errors import UnsupportedModelError, UsageError
from onnxpress.optimizers.heads.maths.request import HeadPlan
from onnxpress.optimizers.heads.sites import HeadSite, table_width


def require_possible(site: HeadSite, plan: HeadPlan, method: str, memory_bytes: int) -> None:
    """Raise UnsupportedModelError, or UsageError where another number would do, naming the layer.

    Args:
        memory_bytes: what calibration may take.
    """
    where, operator = site.block.title, site.attention.node.op_type
    if plan.after[0] != plan.after[1] and operator not in ("GroupQueryAttention", "Attention"):
        raise UnsupportedModelError(
            f"{where}: {operator} wants as many key/value heads as heads; {plan.after[1]} and {plan.after[0]} "
            f"were asked for",
            hint="leave kv_heads out",
        )
    if method == "regress" and plan.merges:
        raise UnsupportedModelError(f"{where}: regress cannot merge key/value heads", hint="use method=least-squares")
    needed = 8 * (plan.dropped[0] * site.value.features[0]) ** 2
    if method == "regress" and plan.drops and needed > memory_bytes:
        raise UnsupportedModelError(
            f"{where}: to regress on what {plan.dropped[0]} heads attend to takes {needed / 1e9:.1f} GB, more than "
            f"the {memory_bytes / 1e9:.1f} GB that calibration may take",
            hint="use method=least-squares",
        )
    rotary = site.attention.rotary
    if rotary is None or not (plan.narrows or plan.merges):
        return
    if table_width(rotary) != site.sizes[2] // 2:
        raise UnsupportedModelError(
            f"{where}: only {table_width(rotary)} of {site.sizes[2] // 2} planes are rotary; keys cannot be "
            f"merged or narrowed yet where the rest is not",
            hint="reduce heads, not head_dim",
        )
    step = 16 if operator == "GroupQueryAttention" else 2
    if plan.narrows and plan.after[2] % step:
        raise UsageError(
            f"{where}: head_dim must be a multiple of {step} where {operator} has rotary positions, not {plan.after[2]}"
        )

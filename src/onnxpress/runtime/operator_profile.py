"""Where the time goes: onnxruntime's profile, summed by operator."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from onnxpress.errors import CorruptFileError

_CONTROL_FLOW = ("If", "Loop", "Scan")


@dataclass(frozen=True)
class OperatorTime:
    operator: str
    calls: int
    milliseconds: float
    share: float
    """Share of the time spent in all operators, 0 to 1."""


def operator_times(*paths: Path) -> list[OperatorTime]:
    """Time in kernels by operator, most first, from the JSON files that `InferenceSession.end_profiling` names.

    Operators with a branch inside are left out: what runs in the branch is there by itself.
    """
    events = []
    for path in paths:
        try:
            events += json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise CorruptFileError(f"{path} is not an onnxruntime profile: {error}") from error
    spent: dict[str, float] = defaultdict(float)
    calls: dict[str, int] = defaultdict(int)
    for event in events:
        if event.get("cat") == "Node" and event.get("name", "").endswith("_kernel_time"):
            operator = event["args"]["op_name"]
            if operator in _CONTROL_FLOW:
                continue
            spent[operator] += event["dur"] / 1e3  # microseconds
            calls[operator] += 1
    total = sum(spent.values()) or 1.0
    order = sorted(spent, key=lambda operator: -spent[operator])
    return [OperatorTime(op, calls[op], spent[op], spent[op] / total) for op in order]

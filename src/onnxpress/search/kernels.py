"""The time that a group takes in a format: measured once on a machine for each kind of group, and kept.

A table is a JSON file that names its machine. One measured on a phone can be given to a search on a desk.

    {"machine": "…", "onnxruntime": "1.31.1", "threads": 2,
     "microseconds": {"quantize-blocks bits=4 block_size=32": {"576x1536+576x1536": {"1": 61.5, "128": 3200.0}}}}
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
from numpy.typing import NDArray

from onnxpress.artifact.manifest import machine
from onnxpress.calibration.calibration import Calibration
from onnxpress.calibration.subgraphs import session_of
from onnxpress.errors import BadInputError, SourceNotFoundError, UnsupportedModelError
from onnxpress.optimizers.base import Context
from onnxpress.optimizers.recipe import PassSpec
from onnxpress.search.formats import FLOAT, Format
from onnxpress.search.groups import Group

TOKENS = (1, 128)
"""Rows of the inputs that are timed: a token that is generated, a prompt."""
CACHE_BYTES = 64 * 2**20
"""More than caches hold: one token reads all weights from memory."""
FIT_OPTIONS = frozenset({"method", "max_error", "include", "exclude", "overrides"})
"""Options that decide about values, not about kernels."""


@dataclass
class KernelTable:
    """Microseconds by kernel, shape and tokens, on one machine."""

    machine: str
    onnxruntime: str
    threads: int
    microseconds: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)

    def get(self, group: Group, format: Format | None, tokens: int) -> float | None:
        """Look up microseconds, None where they are not known; `format` None is float32."""
        return self.microseconds.get(kernel_of(format), {}).get(shape_key(group), {}).get(str(tokens))

    def rows(self) -> list[dict[str, Any]]:
        """List a row for each kernel and shape."""
        return [
            {"kernel": kernel, "shape": shape, **{f"{n} tokens, µs": round(time, 1) for n, time in times.items()}}
            for kernel, shapes in sorted(self.microseconds.items())
            for shape, times in sorted(shapes.items())
            if times
        ]

    def to_json(self) -> str:
        """Write the text of the file."""
        return json.dumps(vars(self), indent=1, sort_keys=True) + "\n"


def kernel_of(format: Format | None) -> str:
    """Name the kernels that a format ends in."""
    if format is None:
        return FLOAT
    return " + ".join(
        " ".join([spec.name, *(f"{key}={value}" for key, value in sorted(spec.options.items()))])
        for spec in map(_without_fit, format.specs)
    )


def _without_fit(spec: PassSpec) -> PassSpec:
    return PassSpec(spec.name, {key: value for key, value in spec.options.items() if key not in FIT_OPTIONS})


def shape_key(group: Group) -> str:
    """`576x1536+576x1536`; with the table that a group looks rows up in: `576x49152@49152x576`."""
    products = "+".join(f"{inputs}x{outputs}" for inputs, outputs in group.shapes)
    return products + (f"@{group.table[0]}x{group.table[1]}" if group.table else "")


def read_kernel_table(path: str | Path) -> KernelTable:
    """Read a table that was given. Raises SourceNotFoundError, BadInputError."""
    path = Path(path)
    if not path.is_file():
        raise SourceNotFoundError(f"no such kernel table: {path}", hint="measure one: onnxpress kernels MODEL -o FILE")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        table = KernelTable(**content)
        times = [float(t) for rows in table.microseconds.values() for row in rows.values() for t in row.values()]
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise BadInputError(f"{path} is no kernel table: {error}") from error
    if not all(np.isfinite(times)) or min(times, default=1) < 0:
        raise BadInputError(f"{path}: times must be finite and not negative")
    return table


def host_table(folder: Path, threads: int | None) -> tuple[KernelTable, Path]:
    """Return this machine's table as far as it was measured, and the file that it is kept in."""
    table = KernelTable(machine(), onnxruntime.__version__, threads or 0)
    name = f"{table.machine} onnxruntime {table.onnxruntime} threads {table.threads}"
    path = folder / f"{''.join(c if c.isalnum() or c in '.-' else '_' for c in name)}.json"
    return (read_kernel_table(path) if path.is_file() else table), path


def complete(
    table: KernelTable,
    groups: Sequence[Group],
    formats: Sequence[Format],
    session_options: Mapping[str, str],
    threads: int | None,
    progress: Callable[[int, int], None] | None = None,
) -> bool:
    """Measure what a table lacks for these groups and formats; return whether there was anything to measure."""
    kinds = {shape_key(group): group for group in groups}
    wanted = {(kernel_of(one), shape): (one, group) for one in (None, *formats) for shape, group in kinds.items()}
    missing = {key: pair for key, pair in wanted.items() if key[1] not in table.microseconds.get(key[0], {})}
    for number, ((kernel, shape), (format, group)) in enumerate(missing.items()):
        table.microseconds.setdefault(kernel, {})[shape] = _measure(group, format, session_options, threads)
        if progress is not None:
            progress(number + 1, len(missing))
    return bool(missing)


def _measure(
    group: Group, format: Format | None, session_options: Mapping[str, str], threads: int | None
) -> dict[str, float]:
    """Measure microseconds by tokens; nothing where the format does not take this kind of group."""
    model = _stand_in(group)
    names = list(model.graph.initializers)
    if format is not None:
        with contextlib.suppress(UnsupportedModelError):
            for graph_pass in [_without_fit(spec).build() for spec in format.specs]:
                samples = [_inputs(group, TOKENS[-1])] if graph_pass.needs_samples else []
                graph_pass.prepare_example(model)
                graph_pass.run(model, Context(Calibration(samples, threads=threads)))
        if any(name in model.graph.initializers for name in names):
            return {}
    scratch = np.zeros(CACHE_BYTES // 8)
    with session_of(model, threads, session_options) as session:
        return {str(n): 1e6 * _seconds(partial(session.run, None, _inputs(group, n)), scratch) for n in TOKENS}


def _seconds(call: Callable[[], Any], scratch: NDArray[np.float64]) -> float:
    """Time the quickest of a few runs, each with the caches full of something else."""
    call()
    times: list[float] = []
    while len(times) < 5 or (sum(times) < 0.1 and len(times) < 15):
        scratch += 1
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)  # others disturb, none helps


def _stand_in(group: Group) -> ir.Model:
    """Make the group with random weights."""
    generator = np.random.default_rng(0)
    weights: list[ir.Value] = []

    def constant(name: str, shape: tuple[int, int]) -> ir.Value:
        array = generator.standard_normal(shape, dtype=np.float32)
        weights.append(_value(name, ir.DataType.FLOAT, shape))
        weights[-1].const_value = ir.tensor(array, name=name)
        return weights[-1]

    inputs = {
        size: _value(f"x{size}", ir.DataType.FLOAT, (None, None, size)) for size in {shape[0] for shape in group.shapes}
    }
    nodes, table = [], None
    if group.table is not None:
        table = constant("table", group.table)
        ids = _value("ids", ir.DataType.INT64, (None, None))
        nodes.append(ir.node("Gather", [table, ids]))
    for number, shape in enumerate(group.shapes):
        if table is not None and group.table == shape[::-1]:
            nodes.append(ir.node("Transpose", [table], {"perm": [1, 0]}))
            weight = nodes[-1].outputs[0]
        else:
            weight = constant(f"weight{number}", shape)
        nodes.append(ir.node("MatMul", [inputs[shape[0]], weight]))
    outputs = [node.outputs[0] for node in nodes if node.op_type != "Transpose"]
    for number, node in enumerate(nodes):
        node.outputs[0].name, node.outputs[0].type = f"y{number}", ir.TensorType(ir.DataType.FLOAT)
    given = [*inputs.values(), *([ids] if group.table is not None else [])]
    graph = ir.Graph(given, outputs, nodes=nodes, initializers=weights, opset_imports={"": 21}, name="kernels")
    return ir.Model(graph, ir_version=10)


def _value(name: str, dtype: ir.DataType, shape: tuple[int | None, ...]) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))


def _inputs(group: Group, tokens: int) -> dict[str, Any]:
    generator = np.random.default_rng(0)
    feeds: dict[str, Any] = {
        f"x{size}": generator.standard_normal((1, tokens, size), dtype=np.float32)
        for size in {shape[0] for shape in group.shapes}
    }
    if group.table is not None:
        feeds["ids"] = generator.integers(0, group.table[0], (1, tokens))
    return feeds

"""The free dimensions of a graph while it is traced: torch's symbolic sizes under the names that clients read."""

from __future__ import annotations

from dataclasses import dataclass

import sympy
import torch
from torch._guards import GuardSource, Source
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, SLoc

from onnxpress.errors import UnsupportedModelError
from onnxpress.exporter.tracing.writer import Dimension


class Dimensions:
    """The free dimensions of a graph: torch's symbolic sizes, and the same as expressions of their names."""

    def __init__(self) -> None:
        self.environment = _Environment(duck_shape=False)
        self._sizes: dict[str, torch.SymInt] = {}
        self._symbols: dict[sympy.Symbol, sympy.Symbol] = {}

    def size(self, name: str, example: int) -> torch.SymInt:
        """The symbolic size of the dimension `name`; the example (2 or more) decides what the module asks of it."""
        if name not in self._sizes:
            source = _Named(name)
            symbol = self.environment.create_symbol(example, source, dynamic_dim=DimDynamic.DYNAMIC)
            self._sizes[name] = self.environment.create_symintnode(symbol, hint=example, source=source)
            self._symbols[symbol] = sympy.Symbol(name, integer=True, positive=True)
        return self._sizes[name]

    def __getitem__(self, size: int | torch.SymInt) -> Dimension:
        """A size in terms of the named dimensions."""
        if isinstance(size, int):
            return size
        expression = self.environment.replace(size.node.expr)
        return int(expression) if expression.is_number else expression.xreplace(self._symbols)

    def check(self) -> None:
        """Raises UnsupportedModelError where the module works with one size of a free dimension only."""
        for name, size in self._sizes.items():
            if isinstance(self[size], int):
                raise UnsupportedModelError(f"the model only takes {name} = {self[size]}")


class _Environment(ShapeEnv):
    """torch's bookkeeping of symbolic sizes, without notes of the line of code that each fact comes from: to tell
    lines of interest it imports half of torch's compiler."""

    def _get_stack_summary(self, is_debug: bool = False, framework_loc: str | None = None) -> tuple[SLoc, str]:
        return SLoc("", None), ""


@dataclass(frozen=True)
class _Named(Source):
    """Where a symbolic size comes from, as torch's bookkeeping wants it."""

    dimension: str

    @property
    def _name_template(self) -> str:
        return self.dimension

    @property
    def guard_source(self) -> GuardSource:
        return GuardSource.CONSTANT

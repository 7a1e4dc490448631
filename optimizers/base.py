"""The contract of a pass.

A pass is onnx_ir's own: an object with `call(model) -> PassResult`, its options being typed constructor arguments.
`Pass` adds a name, whether the result is exact, and a report of what matched and why the rest did not. To add one: a
file here, a test, one line in `registry.py`.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar

import onnx_ir as ir

from onnxpress.graph.report import Report


@dataclass
class PassResult(ir.passes.PassResult):
    """onnx_ir's result with the report of the pass."""

    report: Report = field(default_factory=Report)


class Pass(ir.passes.InPlacePass):
    """Base of all passes: subclasses implement `apply(model, report)`.

    `exact` passes must keep every output to floating-point rounding; the driver verifies both kinds, to different
    tolerances. A pass that matched nothing is an error in the driver unless the recipe marks it optional.
    """

    name: ClassVar[str]
    """As in recipes and on the command line, words joined by hyphens."""
    exact: ClassVar[bool] = True
    needs_anatomy: ClassVar[bool] = False
    """Whether it edits the transformer that the anatomy finds, which takes graphs in the form of our own exports."""
    gives_form: ClassVar[bool] = False
    """Whether it brings graphs to that form, so that what was recognised in them before does not count."""

    def call(self, model: ir.Model) -> PassResult:
        report = Report()
        self.apply(model, report)
        return PassResult(model, modified=bool(report.matched), report=report)

    def prepare_example(self, model: ir.Model) -> None:
        """Give a graph with random weights, on which kernels are to be timed, values that the pass takes.

        Nothing has to be done unless it depends on the values whether it takes them.
        """

    @abstractmethod
    def apply(self, model: ir.Model, report: Report) -> None:
        """Edit `model` in place and note in `report` what was matched and what was skipped, with the reason."""

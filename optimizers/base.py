"""The contract of a pass.

A pass is an object whose options are typed constructor arguments, and which edits a graph when it is run with a
`Context`: what it may look at besides the graph. `Pass` adds a name, what the pass needs, whether its result is exact,
a report of what matched and why the rest did not, and a hook for what follows beside the graph. To add one: a file
here, a test, one line in `registry.py`.

A pass is onnx_ir's, too: `call(model) -> PassResult` runs it without a context.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import onnx_ir as ir

from onnxpress.artifact.artifact import Artifact
from onnxpress.calibration.calibration import Calibration
from onnxpress.calibration.known_results import KnownResults
from onnxpress.graph.report import Report


@dataclass(frozen=True)
class Context:
    """All that a pass may look at besides the graph that it edits."""

    calibration: Calibration = field(default_factory=Calibration)
    """Samples of the graph, for passes that say `needs_samples`."""
    reference: ir.Model | None = None
    """The same graph before any pass, for passes that say `needs_reference`: what quality is measured against. Its
    weights are lazy; it must not be edited."""
    artifact: Artifact | None = None
    """What the graph belongs to; None outside of a build."""
    known: KnownResults = field(default_factory=KnownResults)
    """Results of earlier runs, to be taken instead of computed and added to; one for all graphs of a model."""


@dataclass
class PassResult(ir.passes.PassResult):
    """onnx_ir's result with the report of the pass."""

    report: Report = field(default_factory=Report)


class Pass(ir.passes.InPlacePass):
    """Base of all passes: subclasses implement `apply(model, context, report)`.

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
    needs_reference: ClassVar[bool] = False
    wanted_rows: int = 4
    wanted_length: int = 64
    """Rows of samples, and tokens in each, that do for this pass where the user does not say how many to take."""

    @property
    def needs_samples(self) -> bool:
        """Whether this pass, with its options, looks at activations."""
        return False

    def run(self, model: ir.Model, context: Context | None = None) -> PassResult:
        """Edit a graph in place."""
        report = Report()
        self.apply(model, Context() if context is None else context, report)
        return PassResult(model, modified=bool(report.matched), report=report)

    def call(self, model: ir.Model) -> PassResult:
        """Edit a graph in place with nothing else to look at, as onnx_ir runs its passes."""
        return self.run(model)

    def follow(self, artifact: Artifact, folder: Path) -> Artifact:
        """Let what lies beside the graphs follow them: called after the pass has edited all graphs of an artifact.

        Args:
            artifact: the one that the pass was given as `Context.artifact`.
            folder: for new files; it does not exist yet.

        Returns:
            The artifact with other files or another config; by default `artifact` itself: nothing has to follow.
        """
        return artifact

    def prepare_example(self, model: ir.Model) -> None:
        """Give a graph with random weights, on which kernels are to be timed, values that the pass takes.

        Nothing has to be done unless it depends on the values whether it takes them.
        """

    @abstractmethod
    def apply(self, model: ir.Model, context: Context, report: Report) -> None:
        """Edit `model` in place and note in `report` what was matched and what was skipped, with the reason."""

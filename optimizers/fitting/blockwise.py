"""Fit weights block by block: the one loop of all passes whose result for a weight is kept.

A graph is walked through, and in each segment weights are fitted in stages: those of a stage together, from what the
segment shows by then, and each is put into the graph before the next stage looks. Results are kept: in files, so that
a walk that was killed goes on, and in `Context.known`, for the other graphs of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from typing import Protocol, TypeVar

import onnx_ir as ir

from onnxpress.arrays import Array, Arrays, Doubles
from onnxpress.calibration.calibration import NO_SAMPLES, Calibration
from onnxpress.calibration.feeds import token_count
from onnxpress.calibration.known_results import Result, digest_of
from onnxpress.calibration.walk import FeedMode, WalkStep
from onnxpress.errors import BadInputError
from onnxpress.graph.anatomy import Segment
from onnxpress.graph.linear import Linear, group_by_activation
from onnxpress.graph.report import Report
from onnxpress.optimizers.base import Context, Pass
from onnxpress.optimizers.fitting.statistics import Gram

FEWEST_TOKENS = 256
"""Fewer say next to nothing about the correlations of hundreds of channels."""
ERROR = "error"
"""The part of a result that goes to the report: |x·Ŵ − x·W|² / |x·W|² on the samples."""


class Fittable(Protocol):
    """A thing that is fitted: a product, or what ends in one."""

    @property
    def name(self) -> str:
        """The name of the weight."""

    @property
    def weight(self) -> ir.Value: ...


Fitted = TypeVar("Fitted", bound=Fittable)


def fit_blockwise(
    model: ir.Model,
    context: Context,
    report: Report,
    *,
    fit: str,
    options: object,
    stages: Callable[[Segment], Iterable[Sequence[Fitted]]],
    solve: Callable[[WalkStep, Sequence[Fitted]], Mapping[str, Arrays]],
    put: Callable[[Fitted, Result], None],
    feed: FeedMode = "modified",
    by_product: bool = False,
    once: bool = True,
) -> None:
    """Fit what `stages` names and hand each result to `put`, which edits the graph.

    Args:
        fit: names what is fitted: the pass.
        options: all that a result depends on besides graph and samples, as its repr tells.
        stages: of a segment, what is fitted together, in order.
        solve: computes the results of a stage, by weight; what is called `error` goes to the report.
        feed, by_product: see `Walk`.
        once: take a known result for a weight that was fitted before, as in another graph.
    """
    walk = context.calibration.walk(model, feed=feed, method=f"{fit} by block {options!r}", by_product=by_product)
    for step in walk:
        for number, targets in enumerate(stages(step.segment)):
            results, fresh = dict[str, Result](), list[Fitted]()
            digests = {target.name: digest_of(target.weight) for target in targets} if once else {}
            for target in targets:
                known = context.known.find(fit, target.name, digests[target.name]) if once else None
                if known is None:
                    fresh.append(target)
                else:
                    results[target.name] = known
            if fresh:
                tensors = step.results(str(number), partial(_flat, solve, step, fresh))
                for target in fresh:
                    result = results[target.name] = _parts(tensors, target.name)
                    if once:
                        context.known.add(fit, target.name, digests[target.name], result)
                    if ERROR in result:
                        report.measure(target.name, float(result[ERROR].numpy()[0]))
            for target in targets:
                put(target, results[target.name])


def _flat(
    solve: Callable[[WalkStep, Sequence[Fitted]], Mapping[str, Arrays]], step: WalkStep, targets: Sequence[Fitted]
) -> dict[str, Array]:
    """Results as a file holds them, by `weight#part`."""
    return {f"{name}#{part}": array for name, parts in solve(step, targets).items() for part, array in parts.items()}


def _parts(tensors: Result, name: str) -> Result:
    prefix = f"{name}#"
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}


def as_tensors(arrays: Arrays) -> Result:
    """A result that nothing had to be observed for."""
    return {part: ir.tensor(array) for part, array in arrays.items()}


def by_input(linears: Collection[Linear]) -> Callable[[Segment], list[list[Linear]]]:
    """Stages of products that read one activation, in the order in which they run."""

    def stages(segment: Segment) -> list[list[Linear]]:
        nodes = set(segment.nodes)
        return list(group_by_activation(linear for linear in linears if linear.node in nodes).values())

    return stages


def by_segment(targets: Mapping[str, Sequence[Fitted]]) -> Callable[[Segment], list[list[Fitted]]]:
    """Stages of one weight each, by the title of the segment."""
    return lambda segment: [[target] for target in targets.get(segment.title, ())]


def second_moments(step: WalkStep, linears: Sequence[Linear]) -> Doubles:
    """E[x xᵀ] [in, in] of the activation that products read."""
    gram = Gram(linears[0].shape[0], str(linears[0].activation.name))
    step.observe({gram.tensor: [gram]})
    return gram.matrix()


def lacks_samples(graph_pass: Pass, model: ir.Model, context: Context, report: Report, count: int) -> bool:
    """Whether a pass needs samples and has none for this graph; the report says so for what it would have fitted."""
    if not graph_pass.needs_samples or context.calibration.fits(model):
        return False
    report.skip(NO_SAMPLES, count)
    return True


def require_tokens(calibration: Calibration, method: str, alternative: str) -> None:
    """Raise BadInputError where samples are too few to tell how channels vary together."""
    tokens = token_count(calibration.samples)
    if 0 < tokens < FEWEST_TOKENS:
        raise BadInputError(
            f"{method} has {tokens} tokens to calibrate with; it needs at least {FEWEST_TOKENS}",
            hint=f"give a longer text with --calibration, or choose {alternative}, which needs none",
        )

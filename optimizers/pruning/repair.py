"""repair: fit what other passes left of a model to the outputs of the untouched one, block by block.

Runs the reference's blocks over its own hidden states and the current model's over the ones that it has by then, and
fits the products that write to the residual stream, attention's `o` and the feed-forward's `down`, so that the stream
becomes the reference's again:

    x · W  ≈  (stream of the reference after the product) − (stream of the current model before it)

So each product makes up for what its own block lost and for the drift that the blocks before it left. Ridge and prior
are chosen by the error on tokens that were not fitted to; a product that does no better on them stays as it is. Tokens
are weighted as in `fitting.moments`. Memory: a block of each model, and the statistics of one product.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import onnx_ir as ir

from onnxpress.arrays import Arrays, Doubles
from onnxpress.calibration.calibration import NO_SAMPLES, Calibration
from onnxpress.calibration.fingerprint import fingerprint
from onnxpress.calibration.known_results import Result
from onnxpress.calibration.walk import WalkStep
from onnxpress.errors import UnsupportedModelError
from onnxpress.graph.anatomy import Anatomy, Block, Product, anatomy_of
from onnxpress.graph.anatomy.editing import read_weight, require_editable, set_bias, set_weight
from onnxpress.graph.conventions import LAYERS
from onnxpress.graph.linear import selected
from onnxpress.graph.report import Report
from onnxpress.optimizers.base import Context, Pass
from onnxpress.optimizers.fitting.blockwise import by_segment, fit_blockwise
from onnxpress.optimizers.fitting.residual import Addition, addition_of
from onnxpress.optimizers.fitting.ridge import fit
from onnxpress.optimizers.fitting.targets import Minus, Plus, Regression, Target

RIDGES = (0.001, 0.01, 0.1, 1.0)
Part = Literal["attention", "feed-forward"]
PARTS: tuple[Part, ...] = ("attention", "feed-forward")


@dataclass(frozen=True)
class Repairable:
    """A product that writes to the residual stream, and the reference's."""

    current: Product
    reference: Product
    here: Addition
    there: Addition
    block: str
    """The title of the reference's block."""

    @property
    def name(self) -> str:
        return self.current.name

    @property
    def weight(self) -> ir.Value:
        return self.current.weight


class Repair(Pass):
    """Fit the products that end attention and feed-forward to the outputs of the untouched model."""

    name = "repair"
    exact = False
    needs_anatomy = True
    needs_samples = True
    needs_reference = True
    wanted_rows = 32
    wanted_length = 512

    def __init__(
        self,
        ridges: Sequence[float] = RIDGES,
        priors: Sequence[Literal["current", "zero"]] = ("current", "zero"),
        bias: bool = True,
        parts: Sequence[Part] = PARTS,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
    ) -> None:
        """
        Args:
            ridges: how strongly weights are drawn to a prior, to choose from by held-out error; in parts of each
                input channel's second moment.
            priors: what weights may be drawn to: `current`, those they are, or `zero`.
            bias: fit the bias as well, where a product has one.
            parts: which products: those that end `attention`, those that end `feed-forward`, or both.
            include: patterns of weight names to fit; none: all.
            exclude: patterns of weight names to leave alone.
        """
        if not ridges or min(ridges) <= 0:
            raise ValueError(f"ridges are one or more numbers above 0, not {list(ridges)}")
        if not priors or not parts:
            raise ValueError("give at least one of priors, and of parts")
        self.ridges, self.priors, self.bias, self.parts = tuple(ridges), tuple(priors), bias, tuple(parts)
        self.include, self.exclude = tuple(include), tuple(exclude)

    def apply(self, model: ir.Model, context: Context, report: Report) -> None:
        reference, calibration = context.reference, context.calibration
        if reference is None:
            report.skip("no reference: there is nothing to repair towards")
            return
        current = anatomy_of(model)
        matches = match_blocks(model, current, anatomy_of(reference))
        products = {block.title: self._products(block, matches[block.title], report) for block in current.blocks}
        if not any(products.values()):
            return
        if not calibration.fits(model) or not calibration.fits(reference):
            report.skip(NO_SAMPLES, sum(map(len, products.values())))
            return
        theirs = _ReferenceWalk(reference, calibration)
        options = (self.ridges, self.priors, self.bias, self.parts, self.include, self.exclude)
        fit_blockwise(
            model,
            context,
            report,
            fit=self.name,
            options=(*options, fingerprint(reference, (), "")),
            stages=by_segment(products),
            solve=partial(self._solve, reference=theirs, memory=calibration.memory_bytes),
            put=partial(_put, report),
        )

    def _products(self, block: Block, there: Block, report: Report) -> list[Repairable]:
        """The products to repair in a block, in the order in which they run; the rest goes to the report."""
        products = []
        for ours, product in _writers(block, there):
            if ours is None or product is None:
                report.skip("a product without a counterpart in the reference")
                continue
            if _part(block, ours) not in self.parts or not selected(ours.name, self.include, self.exclude):
                report.skip("excluded")
                continue
            try:
                require_editable(ours)
            except UnsupportedModelError as error:
                report.skip(str(error).replace(ours.name, "a weight"))
                continue
            if ours.features[1] != product.features[1]:
                raise UnsupportedModelError(
                    f"{ours.name} writes {ours.features[1]} features, the reference's {product.features[1]}",
                    hint="repair before the pass that changes the hidden size",
                )
            here, other = addition_of(block, ours), addition_of(there, product)
            if bool(here.terms) != bool(other.terms):
                report.skip("joins the residual stream in another way than in the reference")
                continue
            products.append(Repairable(ours, product, here, other, there.title))
        return products

    def _solve(
        self, step: WalkStep, products: Sequence[Repairable], *, reference: _ReferenceWalk, memory: int
    ) -> dict[str, Arrays]:
        """`errors` [2], held-out, before and after, in parts of the stream; `weight` and `bias` where they change."""
        (product,) = products
        ours = product.current
        bias = _bias(ours) if self.bias and ours.bias is not None else None
        regression = _observe(product, step, reference.at(product.block), memory, intercept=bias is not None)
        weight = read_weight(ours).astype(np.float64)
        if bias is not None:
            weight = np.concatenate([weight, bias[None]])
        priors = {"current": weight, "zero": np.zeros_like(weight)}
        fitted = fit(
            regression.fit, regression.held_out, weight, {name: priors[name] for name in self.priors}, self.ridges
        )
        scale = 1 / max(regression.held_out.tokens, 1)
        result = {"errors": np.array([fitted.before * scale, fitted.after * scale])}
        if fitted.prior is not None:
            after = fitted.weight.astype(np.float32)
            result["weight"] = after[: ours.features[0]]
            if bias is not None:
                result["bias"] = after[-1]
        return {product.name: result}


class _ReferenceWalk:
    """The reference's blocks, run over its own hidden states as far as they are asked for.

    It is run again when a walk goes on after being killed: nothing of it is kept.
    """

    def __init__(self, reference: ir.Model, calibration: Calibration) -> None:
        self._steps = iter(calibration.walk(reference, feed="original"))
        self._step: WalkStep | None = None

    def at(self, title: str) -> WalkStep:
        """The block of that title, not before the one asked for last."""
        while self._step is None or self._step.title != title:
            self._step = next(self._steps)
        return self._step


def _observe(product: Repairable, step: WalkStep, there: WalkStep, memory: int, *, intercept: bool) -> Regression:
    """The sums of a regression of the reference's stream, less the current one, on what the product reads."""
    ours, name = product.current, str(product.current.activation.name)
    target = Target(memory)
    try:
        there.observe({str(value.name): [Plus(target)] for value in (product.reference.output, *product.there.terms)})
        if product.there.bias is not None:
            target.shift(product.there.bias)
        regression = Regression(target, target.lengths(), ours.features, name, intercept=intercept)
        if product.here.bias is not None:
            target.shift(-product.here.bias)
        if ours.bias is not None and not intercept:
            target.shift(-_bias(ours))
        wanted: dict[str, list[Any]] = {str(value.name): [Minus(target)] for value in product.here.terms}
        step.observe({**wanted, name: [regression]})
    finally:
        target.close()
    return regression


def _put(report: Report, product: Repairable, result: Result) -> None:
    before, after = (float(value) for value in result["errors"].numpy())
    report.measure(product.name, after)
    report.measure(f"{product.name} (before)", before)
    if "weight" not in result:
        report.skip("no better on held-out tokens")
        return
    set_weight(product.current, result["weight"])
    if "bias" in result:
        set_bias(product.current, result["bias"].numpy())
    report.match("product")


def match_blocks(model: ir.Model, current: Anatomy, reference: Anatomy) -> dict[str, Block]:
    """The reference's block of each of the current ones, by title.

    One to one where there are as many; otherwise as passes that removed layers recorded. UnsupportedModelError if none
    did.
    """
    if [block.title for block in current.blocks] == [block.title for block in reference.blocks]:
        return {block.title: block for block in reference.blocks}
    recorded = json.loads(model.metadata_props.get(LAYERS, "{}"))
    blocks = {block.title: block for block in reference.blocks}
    matches = {}
    for block in current.blocks:
        stack, _, _ = block.title.rpartition(".")
        origins = recorded.get(stack)
        index = origins[block.segment.layer] if origins else block.segment.layer
        title = f"{stack}.{index}"
        if title not in blocks or (not origins and _depth(current, stack) != _depth(reference, stack)):
            raise UnsupportedModelError(
                f"{stack} has {_depth(current, stack)} layers, the reference {_depth(reference, stack)}, and nothing "
                "tells which is which",
                hint="repair an artifact made by passes that record the layers they keep",
            )
        matches[block.title] = blocks[title]
    return matches


def _depth(anatomy: Anatomy, stack: str) -> int:
    return sum(block.title.rpartition(".")[0] == stack for block in anatomy.blocks)


def _writers(block: Block, there: Block) -> Iterator[tuple[Product | None, Product | None]]:
    """Products that end attentions and feed-forward, each with the reference's."""
    if len(block.attentions) == len(there.attentions):
        for attention, other in zip(block.attentions, there.attentions, strict=True):
            yield attention.output, other.output
    if block.feed_forward is not None:
        yield block.feed_forward.down, there.feed_forward.down if there.feed_forward is not None else None


def _part(block: Block, product: Product) -> Part:
    is_down = block.feed_forward is not None and product is block.feed_forward.down
    return "feed-forward" if is_down else "attention"


def _bias(product: Product) -> Doubles:
    assert product.bias is not None
    assert product.bias.const_value is not None
    return np.asarray(product.bias.const_value.numpy(), np.float64)

"""repair: fit what other passes left of a model to the outputs of the untouched one, block by block.

Runs the reference's blocks over its own hidden states and the current model's over the ones that it has by then, and
fits the products that write to the residual stream, attention's `o` and the feed-forward's `down`, so that the stream
becomes the reference's again:

    x · W  ≈  (stream of the reference after the product) − (stream of the current model before it)

So each product makes up for what its own block lost and for the drift that the blocks before it left. Ridge and prior
are chosen by the error on tokens that were not fitted to; a product that does no better on them stays as it is. Tokens
are weighted as in `structure/moments.py`. Memory: a block of each model, and the statistics of one product.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from onnxpress.calibration.calibration import NO_SAMPLES
from onnxpress.calibration.fingerprint import fingerprint
from onnxpress.calibration.walk import Step
from onnxpress.errors import UnsupportedModelError
from onnxpress.graph.anatomy import Anatomy, Block, Product, anatomy_of
from onnxpress.graph.anatomy.editing import read_weight, require_editable, set_bias, set_weight
from onnxpress.graph.conventions import LAYERS
from onnxpress.graph.linear import selected
from onnxpress.graph.report import Report
from onnxpress.optimizers.calibrated_pass import CalibratedPass
from onnxpress.optimizers.fitting.fitted_once import FittedOnce
from onnxpress.optimizers.fitting.residual import Addition, addition_of
from onnxpress.optimizers.fitting.ridge import fit
from onnxpress.optimizers.fitting.targets import Minus, Plus, Regression, Target

RIDGES = (0.001, 0.01, 0.1, 1.0)
Part = Literal["attention", "feed-forward"]
PARTS: tuple[Part, ...] = ("attention", "feed-forward")


@dataclass(frozen=True)
class Pair:
    """A product that writes to the residual stream, and the reference's."""

    current: Product
    reference: Product
    here: Addition
    there: Addition


class Repair(CalibratedPass):
    """Fit the products that end attention and feed-forward to the outputs of the untouched model."""

    name = "repair"
    exact = False
    needs_anatomy = True
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
            ridges: to choose from by held-out error; in parts of each input channel's second moment.
            priors: what weights may be drawn to: those they are, or zero.
            bias: fit the bias as well, where a product has one.
            parts: which products.
            include: patterns of weight names; none: all.
            exclude: patterns of those to leave alone.
        """
        if not ridges or min(ridges) <= 0:
            raise ValueError(f"ridges are one or more numbers above 0, not {list(ridges)}")
        if not priors or not parts:
            raise ValueError("give at least one of priors, and of parts")
        self.ridges, self.priors, self.bias, self.parts = tuple(ridges), tuple(priors), bias, tuple(parts)
        self.include, self.exclude = tuple(include), tuple(exclude)
        self._known = FittedOnce()

    def apply(self, model: ir.Model, report: Report) -> None:
        if self.reference is None:
            report.skip("no reference: there is nothing to repair towards")
            return
        current, reference = anatomy_of(model), anatomy_of(self.reference)
        matches = match_blocks(model, current, reference)
        pairs = {block.title: self._pairs(block, matches[block.title], report) for block in current.blocks}
        if not any(pairs.values()):
            return
        if not self.calibration.fits(model) or not self.calibration.fits(self.reference):
            report.skip(NO_SAMPLES, sum(map(len, pairs.values())))
            return
        origin = fingerprint(self.reference, (), "")
        options = (self.ridges, self.priors, self.bias, self.parts, self.include, self.exclude)
        # The reference is run again when a walk goes on after being killed: nothing of it is kept.
        theirs = iter(self.calibration.walk(self.reference, feed="original"))
        for step in self.calibration.walk(model, method=f"{self.name} {options} {origin}"):
            if pairs.get(step.title):
                there = _advance(theirs, matches[step.title].title)
                for pair in pairs[step.title]:
                    self._repair(pair, step, there, report)

    def _pairs(self, block: Block, there: Block, report: Report) -> list[Pair]:
        """What to repair in a block, in the order in which it runs; the rest goes to the report."""
        pairs = []
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
            pair = Pair(ours, product, addition_of(block, ours), addition_of(there, product))
            if bool(pair.here.terms) != bool(pair.there.terms):
                report.skip("joins the residual stream in another way than in the reference")
                continue
            pairs.append(pair)
        return pairs

    def _repair(self, pair: Pair, step: Step, there: Step, report: Report) -> None:
        key = f"product{pair.current.name}".replace("/", "_")
        compute = partial(self._solve, pair, step, there)
        found = self._known.get(pair.current, partial(step.results, key, compute))
        before, after = (float(value) for value in found["errors"].numpy())
        report.measure(pair.current.name, after)
        report.measure(f"{pair.current.name} (before)", before)
        if "weight" not in found:
            report.skip("no better on held-out tokens")
            return
        set_weight(pair.current, found["weight"])
        if "bias" in found:
            set_bias(pair.current, found["bias"].numpy())
        report.match("product")

    def _solve(self, pair: Pair, step: Step, there: Step) -> dict[str, NDArray[Any]]:
        """`errors` [2], held-out, before and after, in parts of the stream; `weight` and `bias` where they change."""
        ours, product = pair.current, pair.reference
        bias = _bias(ours) if self.bias and ours.bias is not None else None
        target = Target(self.calibration.memory_bytes)
        name = str(ours.activation.name)
        try:
            there.observe({str(value.name): [Plus(target)] for value in (product.output, *pair.there.terms)})
            if pair.there.bias is not None:
                target.shift(pair.there.bias)
            regression = Regression(target, target.lengths(), ours.features, name, intercept=bias is not None)
            if pair.here.bias is not None:
                target.shift(-pair.here.bias)
            if ours.bias is not None and bias is None:
                target.shift(-_bias(ours))
            wanted: dict[str, list[Any]] = {str(value.name): [Minus(target)] for value in pair.here.terms}
            step.observe({**wanted, name: [regression]})
        finally:
            target.close()
        weight = read_weight(ours).astype(np.float64)
        if bias is not None:
            weight = np.concatenate([weight, bias[None]])
        priors = {"current": weight, "zero": np.zeros_like(weight)}
        found = fit(
            regression.fit, regression.held_out, weight, {name: priors[name] for name in self.priors}, self.ridges
        )
        scale = 1 / max(regression.held_out.tokens, 1)
        arrays: dict[str, NDArray[Any]] = {"errors": np.array([found.before * scale, found.after * scale])}
        if found.prior is not None:
            fitted = found.weight.astype(np.float32)
            arrays["weight"] = fitted[: ours.features[0]]
            if bias is not None:
                arrays["bias"] = fitted[-1]
        return arrays


def match_blocks(model: ir.Model, current: Anatomy, reference: Anatomy) -> dict[str, Block]:
    """The reference's block of each of the current ones, by title.

    One to one where there are as many; otherwise as passes that removed layers recorded. UnsupportedModelError if none
    did.
    """
    if [block.title for block in current.blocks] == [block.title for block in reference.blocks]:
        return {block.title: block for block in reference.blocks}
    recorded = json.loads(model.metadata_props.get(LAYERS, "{}"))
    blocks = {block.title: block for block in reference.blocks}
    found = {}
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
        found[block.title] = blocks[title]
    return found


def _depth(anatomy: Anatomy, stack: str) -> int:
    return sum(block.title.rpartition(".")[0] == stack for block in anatomy.blocks)


def _writers(block: Block, there: Block) -> Iterator[tuple[Product | None, Product | None]]:
    """Products that end attentions and feed-forward, each with the reference's."""
    if len(block.attentions) == len(there.attentions):
        for one, other in zip(block.attentions, there.attentions, strict=True):
            yield one.output, other.output
    if block.feed_forward is not None:
        yield block.feed_forward.down, there.feed_forward.down if there.feed_forward is not None else None


def _part(block: Block, product: Product) -> Part:
    is_down = block.feed_forward is not None and product is block.feed_forward.down
    return "feed-forward" if is_down else "attention"


def _bias(product: Product) -> NDArray[np.float64]:
    assert product.bias is not None
    assert product.bias.const_value is not None
    return np.asarray(product.bias.const_value.numpy(), np.float64)


def _advance(steps: Iterator[Step], title: str) -> Step:
    """The reference's step of that title; those before it are run on the way."""
    return next(step for step in steps if step.title == title)

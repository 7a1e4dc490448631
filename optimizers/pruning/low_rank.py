"""low-rank: a product x W becomes (x A) B where that saves parameters (ASVD, SVD-LLM; see `maths.low_rank`).

B stays in the weight's initializer, under its name; A is `<name>.reduce.weight`. To passes that come after, both are
products like any others.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from onnxpress.arrays import Arrays, Doubles
from onnxpress.calibration.known_results import Result
from onnxpress.calibration.walk import WalkStep
from onnxpress.graph.anatomy import Product, find_products
from onnxpress.graph.anatomy.editing import set_weight
from onnxpress.graph.edits import add_constant
from onnxpress.graph.linear import Linear, chosen_linears, is_shared, read_rows
from onnxpress.graph.report import Report
from onnxpress.optimizers.base import Context, Pass
from onnxpress.optimizers.fitting.blockwise import (
    as_tensors,
    by_input,
    fit_blockwise,
    lacks_samples,
    second_moments,
)
from onnxpress.optimizers.pruning.maths.low_rank import allocate, break_even, factors, spectrum_of

REDUCE = ".reduce.weight"


class LowRank(Pass):
    """Replace products by two thinner ones each."""

    name = "low-rank"
    exact = False
    needs_anatomy = True

    def __init__(
        self,
        rank: int | None = None,
        ratio: float | None = None,
        method: Literal["activation", "svd"] = "activation",
        allocation: Literal["uniform", "global"] = "uniform",
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        min_features: int = 32,
    ) -> None:
        """
        Args:
            rank: the rank of every product; those that it would not make smaller are left alone.
            ratio: instead of a rank, the share of the parameters of the chosen products that is kept.
            method: activation: least error on the samples; svd: of the weights alone.
            allocation: how `ratio` is spread. uniform: the same share of each product; global: ranks where they hold
                most of what their product makes.
            include: patterns of weight names to split; none: all.
            exclude: patterns of weight names to leave alone.
            min_features: products with fewer inputs or outputs are left alone.
        """
        if (rank is None) == (ratio is None):
            raise ValueError("give either rank or ratio")
        if rank is not None and rank < 1:
            raise ValueError(f"rank must be positive, not {rank}")
        if ratio is not None and not 0 < ratio < 1:
            raise ValueError(f"ratio must lie between 0 and 1, not {ratio}")
        if method not in ("activation", "svd"):
            raise ValueError(f"method must be activation or svd, not {method}")
        if allocation not in ("uniform", "global") or (allocation == "global" and ratio is None):
            raise ValueError("allocation must be uniform or, with a ratio, global")
        self.rank, self.ratio, self.method, self.allocation = rank, ratio, method, allocation
        self.include, self.exclude, self.min_features = tuple(include), tuple(exclude), min_features

    @property
    def needs_samples(self) -> bool:
        return self.method == "activation"

    def apply(self, model: ir.Model, context: Context, report: Report) -> None:
        linears = self._chosen(model, report)
        if not linears:
            return
        if lacks_samples(self, model, context, report, len(linears)):
            return
        spectra = self._spectra(model, context, linears, report)
        shapes = [linear.shape for linear in linears]
        ranks = self._ranks([spectra[linear.name]["energies"].numpy() for linear in linears], shapes)
        products = {product.node: product for product in find_products(model.graph)}
        for linear, rank in zip(linears, ranks, strict=True):
            if rank is None or rank > break_even(linear.shape):
                report.skip("two products would be no smaller")
                continue
            energies = spectra[linear.name]["energies"].numpy()
            report.measure(linear.name, float(energies[rank:].sum() / max(energies.sum(), np.finfo(float).tiny)))
            _split(model.graph, products[linear.node], linear, spectra[linear.name]["directions"].numpy(), rank)
            report.match("products split in two")

    def _chosen(self, model: ir.Model, report: Report) -> list[Linear]:
        linears = []
        for linear in chosen_linears(model.graph, report, self.include, self.exclude, self.min_features):
            before = linear.activation.producer()
            source = before.inputs[1] if before is not None and len(before.inputs) > 1 else None
            if linear.name.endswith(REDUCE) or (source is not None and str(source.name).endswith(REDUCE)):
                report.skip("of low rank already")
            elif is_shared(linear, [linear]):
                report.skip("weight is shared")
            else:
                linears.append(linear)
        return linears

    def _ranks(self, energies: Sequence[NDArray[np.float64]], shapes: Sequence[tuple[int, int]]) -> list[int | None]:
        if self.rank is not None:
            return [self.rank for _ in shapes]
        assert self.ratio is not None
        if self.allocation == "global":
            return allocate(energies, shapes, self.ratio * sum(rows * columns for rows, columns in shapes))
        return [max(1, int(self.ratio * rows * columns / (rows + columns))) for rows, columns in shapes]

    def _spectra(
        self, model: ir.Model, context: Context, linears: Sequence[Linear], report: Report
    ) -> dict[str, Result]:
        """`energies` and `directions` by weight."""
        if not self.needs_samples:
            return {linear.name: as_tensors(_spectrum(linear, None)) for linear in linears}
        spectra: dict[str, Result] = {}
        fit_blockwise(
            model,
            context,
            report,
            fit=self.name,
            options=sorted(linear.name for linear in linears),
            stages=by_input(linears),
            solve=_solve,
            put=lambda linear, result: spectra.update({linear.name: result}),
            feed="original",
        )
        return spectra


def _solve(step: WalkStep, linears: Sequence[Linear]) -> dict[str, Arrays]:
    """Spectra of products that read one activation, by weight."""
    moments = second_moments(step, linears)
    return {linear.name: _spectrum(linear, moments) for linear in linears}


def _spectrum(linear: Linear, moments: Doubles | None) -> Arrays:
    spectrum = spectrum_of(read_rows(linear).T, moments)
    return {"energies": spectrum.energies, "directions": spectrum.directions.astype(np.float32)}


def _split(graph: ir.Graph, product: Product, linear: Linear, directions: NDArray[np.floating], rank: int) -> None:
    """Put a product with A before the one that now multiplies by B."""
    reducing, expanding = factors(read_rows(linear).T, directions, rank)
    name = re.sub(r"\.weight$", "", linear.name) + REDUCE
    constant = add_constant(graph, name, reducing.astype(np.float32))
    activation = linear.activation
    node = ir.node("MatMul", [activation, constant], name=f"{linear.node.name}/reduce")
    value = node.outputs[0]
    value.name, value.type = f"{linear.node.outputs[0].name}/reduce", activation.type
    if activation.shape is not None:
        value.shape = ir.Shape([*list(activation.shape)[:-1], rank])
    graph.insert_before(linear.node, node)
    set_weight(product, expanding.astype(np.float32))
    linear.node.replace_input_with(0, value)

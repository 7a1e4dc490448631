"""Fused operators in graphs that others exported.

onnxscript's fusions for onnxruntime know what torch's current exporter writes; rules of our own find normalisations,
rotary embeddings, activations, and attention as torch's older exporter writes it, and go first on its graphs. Nothing
here packs or folds a large weight. Fusions that slow a CPU down are left out: biases in Gelu, skip normalisations (a
pass of their own), and the packed Attention operator, whose products could not be quantized.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import ClassVar

import onnx_ir as ir
from onnx_ir.passes import common
from onnxscript.rewriter.ort_fusions import (
    cos_sin_cache,
    gqa,
    mha,
    mha_scale,
    rms_normalization,
    rotary_embedding,
    sdpa,
    sdpa_via_mha,
    shape_optimization,
)

from onnxpress.graph.anatomy.layers import TORCH_SCOPES
from onnxpress.graph.conventions import MICROSOFT
from onnxpress.graph.report import Report
from onnxpress.graph.sizes import forget_unnamed
from onnxpress.optimizers.base import Context, Pass
from onnxpress.optimizers.fusion.clean_up import CleanUp
from onnxpress.optimizers.fusion.decomposed.packed_products import split_packed_heads
from onnxpress.optimizers.fusion.fuse_attention import fuse_attention
from onnxpress.optimizers.fusion.fuse_gelu import FuseGelu
from onnxpress.optimizers.fusion.fuse_norm import fuse_norms
from onnxpress.optimizers.fusion.fuse_partial_rotary import fuse_partial_rotary
from onnxpress.optimizers.fusion.fuse_rotary import fuse_rotary
from onnxpress.optimizers.fusion.name_weights import name_weights
from onnxpress.optimizers.fusion.split_skip_norm import split_skip_norms
from onnxpress.optimizers.fusion.unflatten import drop_empty_slices, join_slices, turn_tables, unflatten_products

_RULES: list[Callable[[ir.Model], object]] = [
    rms_normalization.fuse_rms_normalization,
    rotary_embedding.fuse_rotary_embedding,
    cos_sin_cache.fuse_cos_sin_cache,
    rotary_embedding.fuse_partial_rotary_embedding,
    lambda model: sdpa.fuse_sdpa(model, apply_shape_inference=True),
    gqa.fuse_gqa,
    mha.fuse_mha1,
    mha.fuse_mha2,
    mha_scale.fuse_mha_scale,
    sdpa_via_mha.replace_sdpa_by_mha,
]
"""onnxscript's, in the order in which one builds on another."""

_REWRITTEN = (
    "empty slices",
    "heads packed side by side",
    "names of weights",
    "products of flat matrices",
    "rotations of a part of each head",
    "slices as one split",
    "sum and normalisation",
    "tables",
)
"""What is brought to our form without being fused."""


class FuseForeign(Pass):
    """Fuse attention, rotary embeddings, normalisations and activations, whoever exported them, and bring the rest to
    the form of our own exports: weights have their checkpoint's names, sums and normalisations are two operators,
    products are of what they come from, embeddings are tables [vocabulary, hidden].

    Does not modify the model's signature. Reports per operator what was fused, and what is left that looks as if it
    could have been.
    """

    name: ClassVar[str] = "fuse-foreign"
    gives_form: ClassVar[bool] = True

    def apply(self, model: ir.Model, context: Context, report: Report) -> None:
        details = Report()
        name_weights(model.graph, details)
        split_skip_norms(model, details)
        turn_tables(model.graph, details)
        before = _fused_operators(model)
        CleanUp()(model)
        common.ShapeInferencePass()(model)
        shape_optimization.rules.apply_to_model(model)
        for _ in range(2):  # sizes that the graph computes follow from shapes that were found before
            unflatten_products(model.graph, details)
            CleanUp()(model)
            _infer_shapes(model)
            drop_empty_slices(model.graph, details)
            join_slices(model.graph, details)
        CleanUp()(model)
        _infer_shapes(model)
        split_packed_heads(model.graph, details)
        fuse_norms(model, details)
        if not _by_current_exporter(model.graph):  # onnxscript's would split and merge heads around what they find
            _fuse_heads(model, early := Report())
            details.matched.update(early.matched)
            common.TopologicalSortPass()(model)
            common.RemoveUnusedNodesPass()(model)
        for rule in _RULES:
            rule(model)
        common.InlinePass()(model)  # what a rule found for another that found nothing in the end
        _fuse_heads(model, details)
        unflatten_products(model.graph, details)
        FuseGelu().apply(model, context, details)
        common.TopologicalSortPass()(model)  # a rule may put what it adds before what that reads
        CleanUp()(model)
        report.skipped.update(details.skipped)
        report.matched.update(_fused_operators(model) - before)
        report.matched.update({what: details.matched[what] for what in _REWRITTEN if details.matched[what]})
        _report_leftovers(model, report)


def _by_current_exporter(graph: ir.Graph) -> bool:
    """Whether torch's current exporter wrote a graph, which onnxscript's rules know."""
    return any(TORCH_SCOPES in node.metadata_props for node in graph)


def _fuse_heads(model: ir.Model, report: Report) -> None:
    """Rotary embeddings and attention as torch's older exporter writes them."""
    fuse_rotary(model, report)
    fuse_partial_rotary(model.graph, report)
    fuse_attention(model, report)


def _infer_shapes(model: ir.Model) -> None:
    forget_unnamed(model.graph)
    common.ShapeInferencePass()(model)


def _fused_operators(model: ir.Model) -> Counter[str]:
    """The fused operators in a graph."""
    return Counter(
        node.op_type
        for graph in model.graphs()
        for node in graph
        if node.domain == MICROSOFT or node.op_type in ("SimplifiedLayerNormalization", "LayerNormalization", "Gelu")
    )


def _report_leftovers(model: ir.Model, report: Report) -> None:
    """Operators that fused graphs do not have."""
    for graph in model.graphs():
        for node in graph:
            if node.op_type == "ReduceMean":
                report.skip("normalisation in an unknown form (ReduceMean left)")

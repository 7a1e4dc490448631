"""Structural reductions for tests of what comes after them: graphs edited by hand, and the same as a pass.

Tiny graphs for tests of all that runs one come from `tiny_graphs`, graphs as text and a pass's checks from `passes`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType

import numpy as np
import onnx_ir as ir
import pytest

from onnxpress.graph.anatomy import Attention, anatomy_of
from onnxpress.graph.anatomy.editing import forget_shapes, keep_weight, set_heads
from onnxpress.graph.report import Report
from onnxpress.optimizers import registry
from onnxpress.optimizers.base import Context, Pass

from .passes import check, exported, graph, listing, rng, run
from .tiny_graphs import make_decoder, make_encoder

__all__ = ["check", "exported", "graph", "listing", "make_decoder", "make_encoder", "rng", "run"]


def cut(model: ir.Model, *, kv_heads: int = 0, width: int = 0, only: int | None = None) -> None:
    """Keep the first `kv_heads` groups of heads, and the first `width` features of feed-forward networks; 0 keeps all.

    only: in this layer alone.
    """
    anatomy = anatomy_of(model)
    forget_shapes(anatomy)
    for index, block in enumerate(anatomy.blocks):
        if only is not None and index != only:
            continue
        for attention in block.attentions if kv_heads else ():
            _cut_heads(attention, kv_heads)
        if width and block.feed_forward is not None:
            kept, inner = np.arange(width), block.feed_forward.down.features[0]
            for product in block.feed_forward.products[:-1]:
                parts = product.features[1] // inner  # 2 where gate and up are packed
                keep_weight(product, None, np.concatenate([kept + inner * part for part in range(parts)]))
            keep_weight(block.feed_forward.down, kept, None)


def _cut_heads(attention: Attention, kv_heads: int) -> None:
    assert attention.heads is not None
    assert attention.kv_heads is not None
    assert attention.head_dim is not None
    assert attention.key is not None
    assert attention.value is not None
    assert attention.output is not None
    heads = attention.heads // attention.kv_heads * kv_heads
    queries, keys = np.arange(heads * attention.head_dim), np.arange(kv_heads * attention.head_dim)
    keep_weight(attention.query, None, queries)
    keep_weight(attention.key, None, keys)
    keep_weight(attention.value, None, keys)
    keep_weight(attention.output, queries, None)
    set_heads(attention, heads, kv_heads, attention.head_dim)


class Cut(Pass):
    """`cut` as a pass that is called `cut`."""

    name = "cut"
    exact = False

    def __init__(self, kv_heads: int = 0, width: int = 0, only: int = -1) -> None:
        self.options = {"kv_heads": kv_heads, "width": width, "only": None if only < 0 else only}

    def apply(self, model: ir.Model, context: Context, report: Report) -> None:
        cut(model, **self.options)  # type: ignore[arg-type]
        report.match("cut")


@pytest.fixture(name="cut")
def cut_fixture() -> Callable[..., None]:
    return cut


@pytest.fixture
def cutting_pass(monkeypatch: pytest.MonkeyPatch) -> str:
    """The name under which `Cut` can be named in recipes for as long as the test runs."""
    module = ModuleType("onnxpress_test_cut")
    module.Cut = Cut  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(registry.PASSES, "cut", f"{module.__name__}:Cut")
    return "cut"

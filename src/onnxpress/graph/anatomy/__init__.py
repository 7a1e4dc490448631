"""The map from a graph to the transformer in it, and edits of what it finds.

`map.anatomy_of(model)` finds it in our exports at any stage and in graphs of others that keep layer names.
Imports `graph`.
"""

from __future__ import annotations

from onnxpress.graph.anatomy.layers import Segment, split_layers
from onnxpress.graph.anatomy.map import Anatomy, Attention, Block, FeedForward, anatomy_of
from onnxpress.graph.anatomy.products import Product, find_products

__all__ = [
    "Anatomy",
    "Attention",
    "Block",
    "FeedForward",
    "Product",
    "Segment",
    "anatomy_of",
    "find_products",
    "split_layers",
]

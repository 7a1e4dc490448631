"""Names that parts of onnxpress agree on: of graphs, operators, metadata and layers.

What one part writes into a graph and another looks for is written down here, once.
"""

from __future__ import annotations

import re

ENCODER, DECODER, DECODER_WITH_PAST = "encoder_model", "decoder_model", "decoder_with_past_model"
"""Names of the graphs of an encoder-decoder, as stems of their files; the names are optimum's."""
DECODER_MERGED = "decoder_model_merged"
"""Both decoders in one graph: made when an artifact is written, see `onnxpress.graph.merged_decoder`."""

MICROSOFT = "com.microsoft"
"""The domain of onnxruntime's own operators."""

MODULE = "onnxpress.module"
"""Metadata of a node: the qualified name of the innermost torch module that it came from."""
LAYERS = "onnxpress.layers"
"""Metadata of a graph, JSON: for each stack that was cut the original index of every layer that is left, such as
{"model.layers": [0, 1, 3]}."""
MERGED = "onnxpress.merged"
"""The same for layers whose weights were added to another's: {"model.layers": {"1": [2]}}."""

ROTARY_TABLES = ("cos_cache", "sin_cache")
"""How the names of rotary embeddings' tables end: initializers that are no weights."""

_LAYER = re.compile(r"(?:^|.*?[./])(?:layers?|h|blocks?)[./](\d+)(?=[./])")


def layer_of(name: str | None) -> tuple[str, int] | None:
    """(`model.layers`, 3) for anything named after a layer."""
    match = _LAYER.match(name or "")
    if match is None:
        return None
    stack = match[0][: match.start(1) - 1].strip("/").replace("/", ".")
    return stack, int(match[1])


def layer_index(name: str | None) -> int | None:
    """The index of the layer that a node or weight belongs to, by its name."""
    found = layer_of(name)
    return found[1] if found else None

"""Structure cut in the plain ways: no samples, no repair. SOURCE TARGET CUT METHOD SIZE

CUT heads, METHOD:
    first      keep the first SIZE query heads (of every key/value head, where these are fewer)
    norm       those whose part of the output projection is largest
    average    query, key and value become means of neighbours, the output projection their sum
    literal    the founding formula as it stands: all four times a matrix [heads, SIZE] that averages
    random     the same with a random matrix
CUT width, of feed-forward networks, METHOD:
    first, average, literal, random    the same with channels; up and gate being averaged, down summed

SOURCE and TARGET are folders with onnx/model.onnx. Only the methods are independent of onnxpress: nothing of its passes
is used, but its map of the graph says which weights are which. Runs in onnxpress's environment.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from onnxpress.graph.anatomy import Attention, FeedForward, Product, anatomy_of
from onnxpress.graph.anatomy.editing import forget_shapes, read_weight, set_bias, set_heads, set_weight
from onnxpress.graph.io import load_graph, save_graph

Floats = NDArray[np.float64]


def averaging(before: int, after: int) -> Floats:
    """[before, after]: each new one is the mean of its share of the old ones, parts of one counting as such."""
    edges = np.linspace(0, before, after + 1)
    places = np.arange(before)[:, None]
    overlap = np.minimum(places + 1, edges[None, 1:]) - np.maximum(places, edges[None, :-1])
    matrix = np.maximum(overlap, 0)
    return np.asarray(matrix / matrix.sum(0))


def picking(kept: NDArray[np.int64], before: int) -> Floats:
    return np.eye(before)[:, kept]


def matrices(method: str, before: int, after: int, seed: int, loudness: Floats) -> tuple[Floats, Floats]:
    """What the producing side is multiplied by, and the consuming side: [before, after] each."""
    if method in ("first", "norm"):
        order = np.arange(before) if method == "first" else np.argsort(-loudness, kind="stable")
        matrix = picking(np.sort(order[:after]), before)
        return matrix, matrix
    if method == "random":
        matrix = np.random.default_rng(seed).uniform(size=(before, after))
        matrix /= matrix.sum(0)
        return matrix, matrix
    mean = averaging(before, after)
    if method == "literal":
        return mean, mean
    if method == "average":
        return mean, mean * (before / after)  # what was split between two counts in parts, in all as often as before
    raise SystemExit(f"no method {method!r}")


def mix(weight: Floats, matrix: Floats, size: int) -> Floats:
    """[..., before · size] times a [before, after] matrix over its groups of `size` features."""
    grouped = weight.reshape(*weight.shape[:-1], len(matrix), size)
    return np.asarray(np.einsum("...hd,hk->...kd", grouped, matrix).reshape(*weight.shape[:-1], -1))


def put(product: Product, weight: Floats, bias: Floats | None) -> None:
    set_weight(product, weight.astype(np.float32))
    if bias is not None:
        set_bias(product, bias.astype(np.float32))


def bias_of(product: Product) -> Floats | None:
    if product.bias is None or product.bias.const_value is None:
        return None
    return np.asarray(product.bias.const_value.numpy(), np.float64)


def produce(product: Product, matrix: Floats, size: int) -> None:
    bias = bias_of(product)
    weight = mix(np.asarray(read_weight(product), np.float64), matrix, size)
    put(product, weight, None if bias is None else mix(bias, matrix, size))


def consume(product: Product, matrix: Floats, size: int) -> None:
    put(product, mix(np.asarray(read_weight(product), np.float64).T, matrix, size).T, None)


def cut_heads(attention: Attention, method: str, after: int, seed: int) -> None:
    heads, kv_heads, size = attention.heads, attention.kv_heads, attention.head_dim
    query, key, value, output = attention.query, attention.key, attention.value, attention.output
    if not (heads and kv_heads and size and key and value and output) or attention.packed:
        raise SystemExit("attention of unknown shape, or packed")
    if after % kv_heads and kv_heads != heads:
        raise SystemExit(f"{after} query heads cannot share {kv_heads} key/value heads")
    blocks = np.asarray(read_weight(output), np.float64).reshape(heads, -1)
    loudness = np.linalg.norm(blocks, axis=1)
    if kv_heads == heads or method in ("literal", "random"):
        into, out = matrices(method, heads, after, seed, loudness)
    else:  # neighbours of one key/value head each, as all others read something else
        group, left = heads // kv_heads, after // kv_heads
        parts = [
            matrices(method, group, left, seed, loudness[start : start + group]) for start in range(0, heads, group)
        ]
        into, out = (block_diagonal([part[side] for part in parts]) for side in (0, 1))
    produce(query, into, size)
    if kv_heads == heads:
        produce(key, into, size)
        produce(value, into, size)
    consume(output, out, size)
    set_heads(attention, after, after if kv_heads == heads else kv_heads, size)


def block_diagonal(parts: list[Floats]) -> Floats:
    rows, columns = (sum(part.shape[axis] for part in parts) for axis in (0, 1))
    whole = np.zeros((rows, columns))
    row = column = 0
    for part in parts:
        whole[row : row + part.shape[0], column : column + part.shape[1]] = part
        row, column = row + part.shape[0], column + part.shape[1]
    return whole


def cut_width(network: FeedForward, method: str, after: int, seed: int) -> None:
    before = network.down.features[0]
    loudness = np.linalg.norm(np.asarray(read_weight(network.down), np.float64), axis=1)
    into, out = matrices(method, before, after, seed, loudness)
    for product in network.products:
        if product is not network.down:
            produce(product, into, 1)
    consume(network.down, out, 1)


def main() -> None:
    source, target, cut, method, size = Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:5], int(sys.argv[5])
    model = load_graph(source / "onnx" / "model.onnx")
    anatomy = anatomy_of(model)
    for number, block in enumerate(anatomy.blocks):
        if cut == "width":
            if block.feed_forward is None:
                raise SystemExit(f"{block.title} has no plain feed-forward network")
            cut_width(block.feed_forward, method, size, number)
        else:
            cut_heads(block.attentions[0], method, size, number)
    forget_shapes(anatomy)
    target.mkdir(parents=True, exist_ok=True)
    for path in source.glob("*.json"):
        if path.name != "artifact.json":
            shutil.copy(path, target)
    (target / "onnx").mkdir(exist_ok=True)
    save_graph(model, target / "onnx" / "model.onnx", external_data="model.onnx_data")


if __name__ == "__main__":
    main()

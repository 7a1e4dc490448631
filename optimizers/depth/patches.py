"""A linear map that makes up for layers that were removed, fitted to what the untouched model computes there.

The graph is cut already. It is walked through beside the untouched one: where a run of layers was removed after layer
p, layer p sees its input as it is by now, and the target is what the untouched model had behind the run. So a patch
also makes up for what earlier cuts lost.

fold      nothing is added to the graph. The `down` of layer p is refitted: x_p + act · Δ should be the target. Where
          the layer ends in a LayerNorm (BERT), that takes over gain and bias of the last one removed, and the
          target is what it has to read.
product   x + x · A behind layer p: one product hidden × hidden. Exact where the run of layers is linear.

Each token counts by the inverse of its target's square, since what follows normalizes it: a few tokens are a thousand
times as large as the others.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from onnxpress.arrays import Floats
from onnxpress.calibration.calibration import Calibration
from onnxpress.calibration.walk import WalkStep
from onnxpress.errors import UnsupportedModelError
from onnxpress.graph.anatomy import Block, Product, anatomy_of
from onnxpress.graph.anatomy.editing import read_weight, set_bias, set_weight
from onnxpress.graph.edits import add_constant
from onnxpress.graph.report import Report
from onnxpress.optimizers.depth.maths import CrossValidatedRegression, before_norm
from onnxpress.optimizers.depth.removal import stacks_of
from onnxpress.optimizers.depth.rows import Each
from onnxpress.optimizers.fitting.statistics import TINY

PatchForm = Literal["fold", "product"]
LEAST = 1e-6
"""Smallest share of the mean square that a token's own square is taken to be."""


@dataclass(frozen=True)
class Gap:
    """Layers that were removed from between two that stay, or from the start."""

    after: int
    """The layer that they followed, by its number in the cut graph; -1 for the embeddings."""
    last: int
    """The last of them, by its number in the untouched graph."""


@dataclass
class Patches:
    """New weights, for every graph that has these layers."""

    folded: dict[int, dict[str, Any]] = field(default_factory=dict)
    """By layer of the cut graph: `weight` of its down, and perhaps `bias`, `gain` and `shift` of its last norm."""
    products: dict[int, Any] = field(default_factory=dict)
    """A [hidden, hidden], by layer of the cut graph; -1 for the embeddings."""


def fit_patches(
    model: ir.Model,
    untouched: ir.Model,
    stack: str,
    gaps: Sequence[Gap],
    form: PatchForm,
    calibration: Calibration,
    report: Report,
) -> Patches:
    """Fit a patch for every gap and put it into `model`, which is cut.

    Raises UnsupportedModelError where a layer's `down` cannot be refitted, naming it.
    """
    patches = Patches()
    wanted = {gap.after: gap for gap in gaps}
    if form == "fold":
        if wanted.pop(-1, None):
            report.skip(f"no layer before the first of {stack} to fold a patch into")
        for block in stacks_of(anatomy_of(model))[stack]:
            if _index(block) in wanted:
                _End(block)  # raises before the long work
    else:  # patches that are zero, each to be replaced before what comes after it is looked at
        width = _width(stacks_of(anatomy_of(untouched))[stack][0])
        apply_products(model, stack, {place: np.zeros((width, width), np.float32) for place in wanted})
    blocks = {block.title: block for block in stacks_of(anatomy_of(model))[stack]}
    targets = _targets(untouched, stack, [gap.last for gap in wanted.values()], calibration)
    norms = _last_norms(untouched, stack) if form == "fold" else {}
    method = f"reduce-depth {form} {sorted((gap.after, gap.last) for gap in wanted.values())}"
    for step in calibration.walk(model, method=method):
        if step.title not in blocks:
            continue
        block = blocks[step.title]
        for place in (-1, 0) if _index(block) == 0 else (_index(block),):
            if place not in wanted:
                continue
            solution = step.results(str(place), partial(_fit, step, block, wanted[place], targets, form, norms))
            error = float(solution["error"].numpy()[0])
            report.measure(block.title if place >= 0 else f"before {stack}", error)
            if error >= 1.0:
                report.skip(f"no linear map makes up for the layers after {block.title} on unseen tokens")
            if form == "fold":
                patches.folded[place] = {name: tensor for name, tensor in solution.items() if name != "error"}
                apply_folded(block, patches.folded[place])
            else:
                patches.products[place] = solution["matrix"].numpy()
                weight = model.graph.initializers[patch_name(stack, place)]
                weight.const_value = ir.tensor(patches.products[place], name=weight.name)
    return patches


def patch_name(stack: str, number: int) -> str:
    """The weight of the product behind a layer, or before the first one."""
    return f"{stack}.{max(number, 0)}.patch{'_before' if number < 0 else ''}.weight"


def _width(block: Block) -> int:
    states = block.outputs[0].shape or block.hidden[0].shape
    width = states[-1] if states is not None else None
    if not isinstance(width, int):
        raise UnsupportedModelError(f"{block.title} makes states of unknown width", hint="patch=fold")
    return width


def apply(model: ir.Model, stack: str, patches: Patches) -> None:
    """Put patches that were fitted to another graph of the same layers into a graph that is cut."""
    for block in stacks_of(anatomy_of(model))[stack]:
        if _index(block) in patches.folded:
            apply_folded(block, patches.folded[_index(block)])
    apply_products(model, stack, patches.products)


def apply_folded(block: Block, folded: Mapping[str, ir.TensorProtocol]) -> None:
    end = _End(block)
    set_weight(end.down, folded["weight"])
    if "bias" in folded:
        set_bias(end.down, folded["bias"].numpy())
    if end.norm is not None and "gain" in folded:
        for value, name in zip(end.norm.inputs[1:3], ("gain", "shift"), strict=True):
            assert value is not None
            tensor = ir.tensor(folded[name].numpy(), name=value.name)
            value.const_value = tensor


def apply_products(model: ir.Model, stack: str, products: Mapping[int, NDArray[np.floating]]) -> None:
    """x + x · A in place of the states x that a layer makes (-1: that the first one reads)."""
    if not products:
        return
    graph = model.graph
    blocks = stacks_of(anatomy_of(model))[stack]
    for number, matrix in products.items():
        states = blocks[number].outputs[0] if number >= 0 else blocks[0].hidden[0]
        name = patch_name(stack, number).removesuffix(".weight")
        weight = add_constant(graph, f"{name}.weight", np.ascontiguousarray(matrix, dtype=np.float32))
        product = ir.node("MatMul", [states, weight], name=f"{name}/MatMul")
        total = ir.node("Add", [states, product.outputs[0]], name=f"{name}/Add")
        product.outputs[0].name, value = f"{name}/product", total.outputs[0]
        users = [(user, index) for user, index in states.uses() if user is not product and user is not total]
        if number < 0:
            inside = {node for block in blocks for node in block.nodes}
            users = [(user, index) for user, index in users if user in inside]
        for user, index in users:
            user.replace_input_with(index, value)
        value.name, value.type, value.shape = f"{name}/sum", states.type, states.shape
        product.outputs[0].type, product.outputs[0].shape = states.type, states.shape
        if states.is_graph_output():
            graph.outputs[graph.outputs.index(states)] = value
            states.name, value.name = f"{name}/states", states.name
        producer = states.producer()
        assert producer is not None
        graph.insert_after(producer, [product, total])


class _End:
    """How a layer ends: its down, what is added to that, and a norm behind the sum if there is one."""

    def __init__(self, block: Block) -> None:
        if block.feed_forward is None:
            raise UnsupportedModelError(
                f"{block.title} has no plain feed-forward network to fold a patch into", hint="patch=product"
            )
        self.down: Product = block.feed_forward.down
        self.norm: ir.Node | None = None
        (output,) = block.outputs
        value = self.down.output
        while value is not output:
            users = [user for user, _ in value.uses()]
            if len(users) == 1 and users[0].op_type == "Add" and self.norm is None:
                value = users[0].outputs[0]
            elif len(users) == 1 and users[0].op_type == "LayerNormalization" and users[0].outputs[0] is output:
                self.norm, value = users[0], output
            else:
                raise UnsupportedModelError(
                    f"what {self.down.name} makes is not simply added to the hidden states", hint="patch=product"
                )
        if self.norm is not None and (len(self.norm.inputs) < 3 or self.norm.inputs[2] is None):
            raise UnsupportedModelError(f"the norm that ends {block.title} has no bias", hint="patch=product")
        self.reads = self.norm.inputs[0] if self.norm is not None else output


def _index(block: Block) -> int:
    return int(block.title.rpartition(".")[2])


def _last_norms(untouched: ir.Model, stack: str) -> dict[int, tuple[Floats, Floats]]:
    """(gain, bias) of the LayerNorm that each layer ends in; none for layers that end in a sum."""
    found = {}
    for block in stacks_of(anatomy_of(untouched))[stack]:
        node = block.outputs[0].producer()
        if node is None or node.op_type != "LayerNormalization" or len(node.inputs) < 3:
            continue
        arrays = [value.const_value.numpy() for value in node.inputs[1:3] if value is not None and value.const_value]
        if len(arrays) == 2:
            found[_index(block)] = (arrays[0], arrays[1])
    return found


def _targets(
    untouched: ir.Model, stack: str, layers: Sequence[int], calibration: Calibration
) -> Iterator[tuple[int, dict[int, Floats]]]:
    """(layer, what it makes by sample), for some layers of the untouched graph in their order."""
    places = {
        block.title: (_index(block), str(block.outputs[0].name)) for block in stacks_of(anatomy_of(untouched))[stack]
    }
    for step in calibration.walk(untouched, feed="original"):
        layer, name = places.get(step.title, (-1, ""))
        if layer in layers:
            rows: dict[int, Floats] = {}
            step.observe({name: [Each(rows.__setitem__)]})
            yield layer, rows


def _fit(
    step: WalkStep,
    block: Block,
    gap: Gap,
    targets: Iterator[tuple[int, dict[int, Floats]]],
    form: PatchForm,
    last_norms: Mapping[int, tuple[Floats, Floats]],
) -> dict[str, NDArray[Any]]:
    wanted = next(rows for layer, rows in targets if layer == gap.last)
    if form == "product":
        stack, graph = block.title.rpartition(".")[0], step.walk.model.graph
        ((product, _),) = graph.initializers[patch_name(stack, gap.after)].uses()
        assert product.inputs[0] is not None
        return _fit_product(step, str(product.inputs[0].name), wanted)
    return _fit_down(step, block, gap, wanted, last_norms)


def _fit_product(step: WalkStep, states: str, wanted: Mapping[int, Floats]) -> dict[str, NDArray[Any]]:
    regression = CrossValidatedRegression()

    def take(sample: int, x: Floats) -> None:
        target = wanted[sample].astype(np.float64)
        regression.update(x, target - x, token_weights(target))

    step.observe({states: [Each(take)]})
    patch = regression.solve()
    return {"matrix": patch.matrix.astype(np.float32), "error": np.array([patch.error])}


def _fit_down(
    step: WalkStep,
    block: Block,
    gap: Gap,
    wanted: Mapping[int, Floats],
    last_norms: Mapping[int, tuple[Floats, Floats]],
) -> dict[str, NDArray[Any]]:
    end = _End(block)
    assert end.reads is not None
    norm = last_norms.get(gap.last) if end.norm is not None else None
    if end.norm is not None and norm is None:
        raise UnsupportedModelError(f"layer {gap.last} does not end in a LayerNorm as {block.title} does")
    regression, acts, biased = CrossValidatedRegression(), dict[int, Floats](), end.down.bias is not None

    def take(sample: int, current: Floats) -> None:
        act = acts.pop(sample)
        target = wanted[sample].astype(np.float64) if norm is None else before_norm(wanted[sample], current, *norm)
        x = np.concatenate([act, np.ones_like(act[:, :1])], axis=1) if biased else act
        regression.update(x, target - current, token_weights(target))

    # What the norm reads comes after the activations of the same sample.
    step.observe({str(end.down.activation.name): [Each(acts.__setitem__)], str(end.reads.name): [Each(take)]})
    patch = regression.solve()
    weight = read_weight(end.down)
    solution: dict[str, NDArray[Any]] = {"error": np.array([patch.error])}
    solution["weight"] = (weight + patch.matrix[: len(weight)]).astype(np.float32)
    if end.down.bias is not None:
        assert end.down.bias.const_value is not None
        solution["bias"] = (end.down.bias.const_value.numpy() + patch.matrix[-1]).astype(np.float32)
    if norm is not None:
        solution["gain"], solution["shift"] = norm[0].astype(np.float32), norm[1].astype(np.float32)
    return solution


def token_weights(target: NDArray[np.floating]) -> NDArray[np.float64]:
    """1 / |target|² of each row of [rows, features], that of next to empty rows being limited."""
    squares = np.einsum("ij,ij->i", target, target).astype(np.float64)
    return np.asarray(1.0 / np.maximum(squares, max(LEAST * squares.mean(), TINY)))

"""integer-prompts: a second way through products in 4-bit blocks, for prompts.

MatMulNBits reads few bytes, which is what one token waits for; with hundreds of rows it is slower than float32. So
beside each product an `If` on the number of tokens puts another over the same bytes: expand the blocks to int8 with one
scale per output, quantize each row of the activation, multiply in integers.

Expanding uses quantized additions, onnxruntime's fastest operators on bytes (BitwiseAnd and DequantizeLinear take 5 to
10 times as long). With P = 16 h + l a byte that holds two codes, exact since no quotient is a tie:

    h = round(P / 16 − 15 / 32)      l = P − 16 h      w₈ = round((code − zero point) · m / R)

m in −127 … 127 is the multiplier of the block (`scale_type = "int8"` of quantize-blocks) and R the largest
|code − zero point|, 8 or, with zero points, 15. The product's scale is R times the unit of the multipliers, so that w₈
is off by half of R / 127 times the largest scale of its output.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from onnxpress.graph.conventions import MICROSOFT
from onnxpress.graph.edits import add_constant
from onnxpress.graph.report import Report
from onnxpress.optimizers.base import Context, Pass
from onnxpress.optimizers.quantization.quantize_dynamic import quantize_rows

POINTWISE = frozenset("Add Div Erf Gelu HardSwish Identity Mul Relu Sigmoid Silu Softplus Split Sub Swish Tanh".split())
"""What may stand between two products of one branch, in any operator set."""


class IntegerPrompts(Pass):
    """Put products in 4-bit blocks into the branch for few tokens of an `If`, integer products into the other.

    Products that only pointwise operators separate, such as those of an MLP, share an `If`: one costs a token some ten
    microseconds. Nothing is added to the file but nodes: both branches read the same initializers. MatMulNBits keeps
    codes in an order of its own, so that their bytes in the file become resident, too, with the first long prompt.
    """

    name = "integer-prompts"
    exact = False

    def __init__(
        self, min_tokens: int = 128, min_weights: int = 1_000_000, tokens: str = "input_ids", saturates: bool = False
    ) -> None:
        """
        Args:
            min_tokens: from so many tokens on, all rows of a batch together, products are integer ones; 0: never.
            min_weights: products that could share an `If` are left alone if they have fewer weights together: it
                would not be worth its time.
            tokens: name of the graph input [batch, sequence] whose tokens are counted.
            saturates: whether uint8 · int8 products overflow 16 bits on the target's CPU, as on x86 without VNNI; then
                only min_tokens = 0 is taken. Profiles say it.
        """
        if saturates and min_tokens:
            raise ValueError("integer products overflow here and destroy the output; use min_tokens = 0")
        self.min_tokens, self.min_weights, self.tokens = min_tokens, min_weights, tokens

    def apply(self, model: ir.Model, context: Context, report: Report) -> None:
        graph = model.graph
        runs = []
        for run in _runs(graph, report):
            products = [node for node in run if _is_product(node)]
            if sum(map(_weights, products)) < self.min_weights:
                report.skip("too few weights for an If", len(products))
            else:
                runs.append((run, len(products)))
        count = sum(products for _, products in runs)
        tokens = next((value for value in graph.inputs if value.name == self.tokens), None)
        if not self.min_tokens:
            report.skip("min_tokens is 0", count)
        elif tokens is None:
            report.skip(f"no input {self.tokens}", count)
        elif runs:
            switch = _Switch(graph, tokens, self.min_tokens)
            for number, (run, _) in enumerate(runs):
                _branch(graph, run, switch, f"prompt{number}")
            report.match(f"integer products from {self.min_tokens} tokens on", count)


def _runs(graph: ir.Graph, report: Report) -> list[list[ir.Node]]:
    """Consecutive nodes, the first and last of them products with an integer twin, the others pointwise or such, too.

    Consecutive in a sorted graph: no path leaves a run and comes back.
    """
    runs: list[list[ir.Node]] = [[]]
    for node in graph:
        reason = _obstacle(node) if _is_product(node) else None
        if reason is not None:
            report.skip(reason)
        starts = _is_product(node) and reason is None
        if starts or (runs[-1] and node.op_type in POINTWISE):
            runs[-1].append(node)
        else:
            runs.append([])
    for run in runs:
        while run and not _is_product(run[-1]):
            run.pop()
    return [run for run in runs if run]


def _is_product(node: ir.Node) -> bool:
    return node.domain == MICROSOFT and node.op_type == "MatMulNBits"


def _weights(product: ir.Node) -> int:
    return product.attributes.get_int("K", 0) * product.attributes.get_int("N", 0)


def _obstacle(node: ir.Node) -> str | None:
    """Why a product in blocks has no integer twin, if it has none."""
    features, block_size = (node.attributes.get_int(name, 0) for name in ("K", "block_size"))
    codes, scales, zero_points, order = (_input(node, position) for position in (1, 2, 3, 4))
    if node.attributes.get_int("bits", 4) != 4:
        return "not in 4-bit blocks"
    if features % block_size:
        return "last block padded"
    if scales is None or _factors(scales) is None:
        return 'scales are not of the type "int8"'
    if codes is None or codes.const_value is None or (zero_points is not None and zero_points.const_value is None):
        return "weight is not constant"
    if zero_points is not None and zero_points.dtype != ir.DataType.UINT8:
        return "zero points are not whole"
    return None if order is None else "inputs are in another order"


def _input(node: ir.Node, position: int) -> ir.Value | None:
    return node.inputs[position] if position < len(node.inputs) else None


def _factors(scales: ir.Value) -> tuple[ir.Value, ir.Value] | None:
    """The multipliers [out, blocks] int8 and their unit [out, 1] behind scales, as quantize-blocks writes them."""
    product = scales.producer()
    if product is None or product.op_type != "Mul" or product.inputs[0] is None or product.inputs[1] is None:
        return None
    cast, unit = product.inputs[0].producer(), product.inputs[1]
    multipliers = cast.inputs[0] if cast is not None and cast.op_type == "Cast" else None
    if multipliers is None or multipliers.const_value is None or unit.const_value is None:
        return None
    return (multipliers, unit) if multipliers.const_value.dtype == ir.DataType.INT8 else None


class _Switch:
    """Values that all branches share: whether there are many tokens, and shapes known only when the graph runs."""

    def __init__(self, graph: ir.Graph, tokens: ir.Value, min_tokens: int) -> None:
        self.graph, self.start = graph, graph[0]
        size = ir.node("Size", [tokens])
        question = ir.node("GreaterOrEqual", [size.outputs[0], self._constant("min_tokens", min_tokens)])
        graph.insert_before(self.start, [size, question])
        self.many = question.outputs[0]
        """A scalar bool."""
        self._late: dict[tuple[int, ...], ir.Value] = {}

    def late(self, shape: tuple[int, ...]) -> ir.Value:
        """A shape that the runtime does not know to be constant, so that it does not fold what depends on it."""
        if shape not in self._late:
            value = self._constant("x".join(map(str, shape)), shape)
            node = ir.node("Where", [self.many, value, value])
            self.graph.insert_before(self.start, node)
            self._late[shape] = node.outputs[0]
        return self._late[shape]

    def _constant(self, name: str, value: Any) -> ir.Value:
        return add_constant(self.graph, f"integer_prompts.{name}", np.array(value, np.int64))


def _branch(graph: ir.Graph, run: Sequence[ir.Node], switch: _Switch, prefix: str) -> None:
    """Move a run into a branch of an If whose other branch does the same in integers.

    Names within begin with `prefix`: they must differ from all names of the graph around, and there being thousands
    they should be short.
    """
    inside = set(run)
    made = [value for node in run for value in node.outputs]
    leaving = [v for v in made if v.is_graph_output() or any(user not in inside for user, _ in v.uses())]
    outputs = [ir.Value(name=value.name, shape=value.shape, type=value.type) for value in leaving]
    integers = _Branch(prefix)
    twins: dict[ir.Value | None, ir.Value | None] = {}
    rows: dict[ir.Value, Sequence[ir.Value]] = {}
    for node in run:
        inputs = [twins.get(value, value) for value in node.inputs]
        if not _is_product(node):
            copy = ir.Node(node.domain, node.op_type, inputs, node.attributes.values(), num_outputs=len(node.outputs))
            integers.graph.append(copy)
            twins.update(zip(node.outputs, copy.outputs, strict=True))
            continue
        activation = inputs[0]
        assert activation is not None
        if activation not in rows:
            nodes, rows[activation] = quantize_rows(activation, integers.constant)
            integers.graph.extend(nodes)
        twins[node.outputs[0]] = _product(integers, node, rows[activation], switch)
    for place, node in enumerate(integers.graph):
        for position, value in enumerate(node.outputs):
            value.name = f"{prefix}.{place}" + (f".{position}" if position else "")
    branch = ir.Node("", "If", [switch.many], outputs=outputs, name=f"{prefix}.if")
    graph.insert_before(run[0], branch)
    for value, output in zip(leaving, outputs, strict=True):
        for user, position in list(value.uses()):
            if user not in inside:
                user.replace_input_with(position, output)
        for position, result in enumerate(graph.outputs):
            if result is value:
                graph.outputs[position] = output
        value.name = f"{prefix}.blocks.{output.name}"
    for node in run:
        graph.remove(node)
    blocks = ir.Graph([], leaving, nodes=run, name=f"{prefix}.blocks")
    for value in leaving:
        twin = twins[value]
        assert twin is not None
        twin.shape, twin.type = value.shape, value.type
        integers.graph.outputs.append(twin)
    branch.attributes.add(ir.AttrGraph("then_branch", integers.graph))
    branch.attributes.add(ir.AttrGraph("else_branch", blocks))


def _product(make: _Branch, node: ir.Node, rows: Sequence[ir.Value], switch: _Switch) -> ir.Value:
    """Compute what a MatMulNBits does, in integers, for an activation that is quantized already."""
    features, outputs, size = (node.attributes.get_int(name, 0) for name in ("K", "N", "block_size"))
    codes, scales, zero_points, bias = (_input(node, position) for position in (1, 2, 3, 5))
    assert codes is not None
    assert scales is not None
    factors = _factors(scales)
    assert factors is not None
    blocks = features // size
    # Expanded anew for each prompt: int8 weights would take twice the memory of the codes.
    pairs = make.unpack(codes, switch.late((outputs, features // 2, 1)))
    centred, zero_point, reach = make("Reshape", pairs, make.shape(blocks, size, outputs)), make.int8(8), 8
    if zero_points is not None:
        halves = make.unpack(zero_points, switch.late((outputs, -(-blocks // 2), 1)))
        middles = make("Reshape", halves, make.shape(-1, 1, outputs))
        if blocks % 2:
            middles = make("Slice", middles, make.shape(0), make.shape(blocks))
        less = [middles, make.number(-1), make.int8(0), make.number(1), make.int8(0)]
        centred = make("QLinearAdd", centred, make.number(1), make.int8(0), *less, domain=MICROSOFT)
        zero_point, reach = make.int8(0), 15
    multipliers = make("Reshape", make("Transpose", factors[0], perm=[1, 0]), make.shape(blocks, 1, outputs))
    times = [multipliers, make.number(1), make.int8(0), make.number(reach), make.int8(0)]
    expanded = make("QLinearMul", centred, make.number(1), zero_point, *times, domain=MICROSOFT)
    weight = make("Reshape", expanded, make.shape(features, outputs))
    scale = make("Mul", make("Reshape", factors[1], make.shape(outputs)), make.number(reach))
    bytes_, step, middle, row_scale = rows
    product = make("MatMulIntegerToFloat", bytes_, weight, step, scale, middle, domain=MICROSOFT)
    result = make("Mul", product, row_scale)
    return result if bias is None else make("Add", result, bias)


class _Branch:
    """A graph within the graph while it is made. Its constants are its own: what it reads from outside costs time."""

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        self.graph = ir.Graph([], [], nodes=[], name=prefix)

    def __call__(self, operator: str, *inputs: ir.Value, domain: str = "", **attributes: Any) -> ir.Value:
        node = ir.node(operator, inputs, attributes, domain=domain)
        self.graph.append(node)
        return node.outputs[0]

    def unpack(self, packed: ir.Value, shape: ir.Value) -> ir.Value:
        """Bytes of two 4-bit codes, reshaped to [n, bytes, 1] -> int8 codes [bytes, 2, n], the low one first."""
        pairs = self("Transpose", self("Reshape", packed, shape), perm=[1, 2, 0])
        zero, one = self.constant("u0", np.array(0, np.uint8)), self.number(1)
        minus = [zero, self.number(1 / 32), self.constant("u15", np.array(15, np.uint8)), one, zero]  # (0 − 15) / 32
        high = self("QLinearAdd", pairs, self.number(1 / 16), zero, *minus, domain=MICROSOFT)
        less = [high, self.number(-16), zero, one, zero]
        low = self("QLinearAdd", pairs, one, zero, *less, domain=MICROSOFT)
        return self("Cast", self("Concat", low, high, axis=1), to=ir.DataType.INT8)

    def shape(self, *sizes: int) -> ir.Value:
        return self.constant("s" + "x".join(map(str, sizes)), np.array(sizes, np.int64))

    def number(self, value: float) -> ir.Value:
        return self.constant(f"f{value:g}", np.array(value, np.float32))

    def int8(self, value: int) -> ir.Value:
        return self.constant(f"i{value}", np.array(value, np.int8))

    def constant(self, name: str, array: NDArray[Any]) -> ir.Value:
        """An initializer of the branch; the same for the same name."""
        return add_constant(self.graph, f"{self.prefix}.{name}", array)

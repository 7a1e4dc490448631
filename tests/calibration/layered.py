"""A small transformer without attention, and a walk over it that can be killed: run as a program by test_resume."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from onnxpress.arrays import Floats
from onnxpress.calibration.walk import Walk, WalkStep
from onnxpress.graph.anatomy import Product, find_products

WIDTH, INNER, WORDS = 8, 16, 20


def layered(depth: int, seed: int = 0) -> ir.Model:
    """Embedding, `depth` blocks h + down(relu(up(h))), head; every block also reads a table of positions."""
    rng = np.random.default_rng(seed)
    lines = ["e = Gather (table, input_ids)", "t = Cast <to = 1> (attention_mask)", "p = Unsqueeze (t, last)"]
    weights: dict[str, NDArray[Any]] = {
        "table": rng.standard_normal((WORDS, WIDTH)).astype(np.float32),
        "last": np.array([-1]),
        "head.weight": rng.standard_normal((WIDTH, WORDS)).astype(np.float32),
    }
    state = "e"
    for i in range(depth):
        for name, shape in (("up", (WIDTH, INNER)), ("down", (INNER, WIDTH))):
            weights[f"model.layers.{i}.{name}.weight"] = (rng.standard_normal(shape) / 4).astype(np.float32)
        lines += [
            f"a{i} = MatMul ({state}, up{i})",
            f"r{i} = Relu (a{i})",
            f"d{i} = MatMul (r{i}, down{i})",
            f"m{i} = Mul (d{i}, p)",
            f"h{i} = Add ({state}, m{i})",
        ]
        state = f"h{i}"
    lines.append(f"logits = MatMul ({state}, head)")
    inputs = "int64[batch_size, sequence_length] input_ids, int64[batch_size, sequence_length] attention_mask"
    given = [f"float[{WORDS}, {WIDTH}] table", "int64[1] last", f"float[{WIDTH}, {WORDS}] head"]
    given += [f"float[{WIDTH}, {INNER}] up{i}, float[{INNER}, {WIDTH}] down{i}" for i in range(depth)]
    text = f"""
        <ir_version: 10, opset_import: ["": 21]>
        agraph ({inputs}, {", ".join(given)}) => (float[batch_size, sequence_length, {WORDS}] logits) {{
            {chr(10).join(lines)}
        }}"""
    model = ir.from_onnx_text(text)
    for value in list(model.graph.inputs)[2:]:
        model.graph.inputs.remove(value)
        name = str(value.name)
        for kind in ("up", "down"):
            name = f"model.layers.{name.removeprefix(kind)}.{kind}.weight" if name.startswith(kind) else name
        value.name = "head.weight" if name == "head" else name
        value.const_value = ir.tensor(weights[value.name], name=value.name)
        model.graph.register_initializer(value)
    return model


def samples(count: int = 3, length: int = 6, seed: int = 0) -> list[dict[str, NDArray[np.int64]]]:
    """Batches of two rows, the second padded on the right by one token more each time."""
    rng = np.random.default_rng(seed)
    found = []
    for number in range(count):
        mask = np.ones((2, length), np.int64)
        mask[1, length - 1 - number % (length - 1) :] = 0
        found.append({"input_ids": rng.integers(0, WORDS, (2, length)), "attention_mask": mask})
    return found


class Rows:
    """Keeps every row."""

    def __init__(self) -> None:
        self.parts: list[Floats] = []

    def update(self, x: Floats, sample: int) -> None:
        self.parts.append(x.copy())

    @property
    def all(self) -> Floats:
        return np.concatenate(self.parts)


def products(step: WalkStep) -> list[Product]:
    return list(find_products(step.segment.nodes))


def centre(walk: Walk, note: Any = None) -> None:
    """A method for the tests: subtract from each block's `down` what the mean of its input makes of it."""
    for step in walk:
        for product in products(step):
            if step.segment.layer is None or ".down." not in product.name:
                continue

            def compute(step: WalkStep = step, product: Product = product) -> dict[str, Floats]:
                rows = Rows()
                step.observe({str(product.activation.name): [rows]})
                if note is not None:
                    note(step.segment.layer)
                assert product.weight.const_value is not None
                return {product.name: product.weight.const_value.numpy() - rows.all.mean(axis=0)[:, None] / 8}

            product.weight.const_value = step.results("weight", compute)[product.name]


def main() -> None:
    """`python layered.py FOLDER DEPTH FATAL`: notes the layers that it computes; stops dead in layer FATAL."""
    folder, depth, fatal = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])

    def note(layer: int) -> None:
        with (folder / "computed.txt").open("a") as file:
            file.write(f"{layer}\n")
        if layer == fatal:
            import os
            import signal

            os.kill(os.getpid(), signal.SIGKILL)

    centre(Walk(layered(depth), samples(), folder=folder / "walk", method="centre"), note)


if __name__ == "__main__":
    main()

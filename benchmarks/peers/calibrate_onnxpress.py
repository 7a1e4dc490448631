"""Walk through a graph block by block and keep the Gram matrix of what each product reads: FOLDER ROWS LENGTH."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from onnxpress.calibration.walk import Walk
from onnxpress.graph.anatomy import find_products
from onnxpress.graph.io import load_graph
from onnxpress.optimizers.fitting.statistics import Gram


def main() -> None:
    folder, rows, length = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    model = load_graph(next(folder.rglob("model*.onnx")))
    generator = np.random.default_rng(0)
    ids = [generator.integers(0, 1000, (1, length)) for _ in range(rows)]
    samples = [{"input_ids": row, "attention_mask": np.ones_like(row)} for row in ids]
    for step in Walk(model, samples, memory_bytes=1 << 26):
        grams = {
            str(product.activation.name): Gram(product.features[0], product.name)
            for product in find_products(step.segment.nodes)
            if step.segment.layer is not None
        }
        step.observe({name: [gram] for name, gram in grams.items()})


if __name__ == "__main__":
    main()

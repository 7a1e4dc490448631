"""How many weights of a float32 graph are zero. FOLDER; prints JSON: zeros, and weights in all matrices."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

from onnxpress.graph.io import load_graph


def main() -> None:
    model = load_graph(next(Path(sys.argv[1]).rglob("*.onnx")))
    tensors = [value.const_value for value in model.graph.initializers.values()]
    matrices = [tensor.numpy() for tensor in tensors if tensor is not None and len(tensor.shape) == 2]
    zeros = sum(int(np.count_nonzero(matrix == 0)) for matrix in matrices)
    print(json.dumps({"zeros": zeros, "weights": sum(matrix.size for matrix in matrices)}))


if __name__ == "__main__":
    main()

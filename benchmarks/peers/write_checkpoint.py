"""Write a model, however it is named, as a Hugging Face folder. usage: write_checkpoint.py MODEL FOLDER

Runs in onnxpress's environment.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from onnxpress.exporter.sources.source import Checkpoint, resolve_source


def main() -> None:
    model, folder = sys.argv[1], Path(sys.argv[2])
    checkpoint = resolve_source(model, progress=print)
    assert isinstance(checkpoint, Checkpoint)
    folder.mkdir(parents=True, exist_ok=True)
    for name, path in checkpoint.files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, folder / name)
    config = {key: value for key, value in checkpoint.config.items() if key != "quantization_config"}
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "float32"}), encoding="utf-8")
    weights = {
        name: np.ascontiguousarray(tensor.numpy().astype(np.float32)) for name, tensor in checkpoint.tensors.items()
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


if __name__ == "__main__":
    main()

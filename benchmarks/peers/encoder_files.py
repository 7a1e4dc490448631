"""Make the files that encoder.py compares. usage: encoder_files.py MODEL FOLDER (in onnxpress's environment)

FOLDER/checkpoint (Hugging Face), FOLDER/onnx/model.onnx (float32), u8/model.onnx and s8/model.onnx (onnxruntime's own
dynamic quantization of it, weights per channel), sentences.json (token ids).
"""

from __future__ import annotations

import json
import sys
from importlib.resources import files
from pathlib import Path

from onnxruntime.quantization import QuantType, quantize_dynamic
from tokenizers import Tokenizer

from onnxpress import pipeline


def main() -> None:
    model, folder = sys.argv[1], Path(sys.argv[2])
    exported = pipeline.export(model, output=folder / "fp32").path
    graph = next((exported / "onnx").glob("*.onnx"))
    for name, weights in (("u8", QuantType.QUInt8), ("s8", QuantType.QInt8)):
        (folder / name).mkdir(exist_ok=True)
        options = {"DefaultTensorType": 1}  # FLOAT: the tool infers no types through contrib operators
        quantize_dynamic(
            graph, folder / name / "model.onnx", weight_type=weights, per_channel=True, extra_options=options
        )
    tokenizer = Tokenizer.from_file(str(exported / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(128)
    lines = (files("onnxpress") / "sentences.txt").read_text(encoding="utf-8").splitlines()
    sentences = [tokenizer.encode(line).ids for line in lines if line.strip() and not line.startswith("#")]
    (folder / "sentences.json").write_text(json.dumps(sentences), encoding="utf-8")


if __name__ == "__main__":
    main()

"""transformers.exporters as a contender. usage: export_transformers.py CHECKPOINT FOLDER

Runs in onnxpress's environment.
"""

from __future__ import annotations

import sys

import torch
from transformers import AutoModelForCausalLM
from transformers.exporters.configs import OnnxConfig
from transformers.exporters.exporter_onnx import OnnxExporter


def main() -> None:
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
    ids = torch.arange(1, 9)[None].repeat(2, 1)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    OnnxExporter().export_for_generation(model, inputs, OnnxConfig(dynamic=True)).save_pretrained(sys.argv[2])


if __name__ == "__main__":
    main()

"""A random model as optimum exports it to ONNX, with a cache. usage: optimum_export.py FOLDER CONFIG

CONFIG is the configuration of a decoder as JSON, `model_type` included. Runs in an environment of its own: optimum-onnx
needs an older transformers.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from optimum.exporters.onnx import main_export
from transformers import AutoConfig, AutoModelForCausalLM

folder = Path(sys.argv[1])
torch.manual_seed(0)
model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**json.loads(sys.argv[2])))
for parameter in model.parameters():  # biases and gains that a graph must not lose
    if parameter.dim() == 1:
        parameter.data += 0.1 * torch.randn_like(parameter)
model.save_pretrained(folder / "checkpoint")
main_export(str(folder / "checkpoint"), folder / "onnx", task="text-generation-with-past", do_validation=False)

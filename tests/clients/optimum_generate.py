"""Greedy generation with optimum's onnxruntime classes. usage: optimum_generate.py FOLDER REQUEST

REQUEST is JSON: {"ids": [[int]], "mask": [[int]], "steps": int, "merged": bool}. Prints the tokens of each row as JSON,
the start token included. Runs in an environment of its own: optimum-onnx needs an older transformers.
"""

from __future__ import annotations

import json
import sys

import torch
from optimum.onnxruntime import ORTModelForSeq2SeqLM

request = json.loads(sys.argv[2])
model = ORTModelForSeq2SeqLM.from_pretrained(sys.argv[1], subfolder="onnx", use_merged=request["merged"])
assert model.decoder.is_merged == request["merged"]
tokens = model.generate(
    torch.tensor(request["ids"]),
    attention_mask=torch.tensor(request["mask"]),
    max_new_tokens=request["steps"],
    do_sample=False,
    num_beams=1,
)
print(json.dumps(tokens.tolist()))

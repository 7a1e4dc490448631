"""Greedy decoding with onnxruntime and numpy alone. usage: plain_onnxruntime.py FOLDER REQUEST

REQUEST is JSON: {"prompts": [[int]], "steps": int}; prompts of different lengths are padded on the left. Prints the new
tokens of each row as JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime


def generate(folder: Path, prompts: list[list[int]], steps: int) -> list[list[int]]:
    session = onnxruntime.InferenceSession(next(folder.glob("onnx/*.onnx")))
    rows, length = len(prompts), max(map(len, prompts))
    ids = np.array([[0] * (length - len(prompt)) + prompt for prompt in prompts])
    mask = np.array([[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    past = {
        node.name: np.zeros((rows, node.shape[1], 0, node.shape[3]), np.float32)
        for node in session.get_inputs()
        if node.name.startswith("past_key_values.")
    }
    new: list[np.ndarray] = []
    for _ in range(steps):
        logits, *present = session.run(None, {"input_ids": ids, "attention_mask": mask, **past})
        past = dict(zip(past, present, strict=True))
        ids = logits[:, -1].argmax(-1)[:, None]
        mask = np.concatenate([mask, np.ones((rows, 1), np.int64)], axis=1)
        new.append(ids)
    return np.concatenate(new, axis=1).tolist()


if __name__ == "__main__":
    request = json.loads(sys.argv[2])
    print(json.dumps(generate(Path(sys.argv[1]), request["prompts"], request["steps"])))
    assert "onnxpress" not in sys.modules

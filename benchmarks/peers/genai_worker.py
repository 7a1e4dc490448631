"""onnxruntime-genai as a contender. usage: genai_worker.py FOLDER THREADS

FOLDER holds genai_config.json and the graph that it names. Runs in its own environment with onnxruntime-genai.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnxruntime_genai as og
from protocol import Handler, serve


class Model:
    def __init__(self, folder: str, threads: int) -> None:
        config = og.Config(folder)
        config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}))
        self.model = og.Model(config)

    def generator(self, length: int) -> og.Generator:
        parameters = og.GeneratorParams(self.model)
        parameters.set_search_options(do_sample=False, max_length=length, min_length=length)
        return og.Generator(self.model, parameters)

    def prefill(self, tokens: list[int]) -> dict[str, Any]:
        generator = self.generator(len(tokens) + 1)
        start = time.perf_counter()
        generator.append_tokens(np.array([tokens], dtype=np.int32))
        return {"seconds": time.perf_counter() - start}

    def steps(self, tokens: list[int], following: list[int]) -> dict[str, Any]:
        """Seconds of each single-token step after `tokens`, fed with `following`."""
        generator = self.generator(len(tokens) + len(following) + 1)
        generator.append_tokens(np.array([tokens], dtype=np.int32))
        seconds = []
        for token in following:
            start = time.perf_counter()
            generator.append_tokens(np.array([[token]], dtype=np.int32))
            seconds.append(time.perf_counter() - start)
        return {"seconds": seconds}

    def log_probabilities(self, tokens: list[int], path: str) -> dict[str, Any]:
        """Write float32 [len(tokens), vocabulary] log-probabilities to `path` (.npy)."""
        generator = self.generator(len(tokens) + 1)
        generator.append_tokens(np.array([tokens], dtype=np.int32))
        logits = generator.get_output("logits")[0].astype(np.float32)
        logits -= logits.max(-1, keepdims=True)
        np.save(path, logits - np.log(np.exp(logits).sum(-1, keepdims=True)))
        return {}


def load() -> Mapping[str, Handler]:
    model = Model(sys.argv[1], int(sys.argv[2]))
    return {"prefill": model.prefill, "decode": model.steps, "log_probabilities": model.log_probabilities}


if __name__ == "__main__":
    serve(load)

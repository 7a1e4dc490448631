"""onnxpress's own runner as a contender. usage: onnxpress_worker.py PATH THREADS

PATH is an artifact folder or an ONNX file. Runs in onnxpress's environment.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
from protocol import Handler, serve

from onnxpress.opening import open_model
from onnxpress.runtime import DecoderSession


class Model:
    def __init__(self, path: str, threads: int) -> None:
        session = open_model(path, threads=threads).model
        if not isinstance(session, DecoderSession):
            raise TypeError(f"{path} is not a decoder")
        self.session = session

    def prefill(self, tokens: list[int]) -> dict[str, Any]:
        start = time.perf_counter()
        self.session.prefill(np.array([tokens]))
        return {"seconds": time.perf_counter() - start}

    def steps(self, tokens: list[int], following: list[int]) -> dict[str, Any]:
        """Seconds of each single-token step after `tokens`, fed with `following`."""
        self.session.prefill(np.array([tokens]))
        seconds = []
        for token in following:
            start = time.perf_counter()
            self.session.decode(np.array([[token]]))
            seconds.append(time.perf_counter() - start)
        return {"seconds": seconds}

    def log_probabilities(self, tokens: list[int], path: str) -> dict[str, Any]:
        """Write float32 [len(tokens), vocabulary] log-probabilities to `path` (.npy).

        Graphs that compute the last logits only are fed token by token.
        """
        if self.session.last_only:
            parts = [self.session.prefill(np.array([tokens[:1]]))]
            parts += [self.session.decode(np.array([[token]])) for token in tokens[1:]]
            logits = np.concatenate(parts, axis=1)[0]
        else:
            logits = self.session.prefill(np.array([tokens]))[0]
        logits = logits - logits.max(-1, keepdims=True)
        np.save(path, logits - np.log(np.exp(logits).sum(-1, keepdims=True)))
        return {}


def load() -> Mapping[str, Handler]:
    model = Model(sys.argv[1], int(sys.argv[2]))
    return {"prefill": model.prefill, "decode": model.steps, "log_probabilities": model.log_probabilities}


if __name__ == "__main__":
    serve(load)

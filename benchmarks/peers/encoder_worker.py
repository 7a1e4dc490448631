"""An encoder as a contender. usage: encoder_worker.py KIND PATH THREADS

KIND torch: PATH is a Hugging Face folder; onnx: an ONNX file or an artifact. Runs in onnxpress's environment. Sentences
are token ids without padding; embeddings are masked means, normalized.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from protocol import Handler, serve

Embed = Callable[[NDArray[np.int64]], NDArray[np.float32]]


def torch_model(path: str, threads: int) -> Embed:
    import torch
    from transformers import AutoModel

    torch.set_num_threads(threads)
    model = AutoModel.from_pretrained(path, dtype=torch.float32).eval()

    @torch.inference_mode()
    def embed(ids: NDArray[np.int64]) -> NDArray[np.float32]:
        tokens = torch.from_numpy(ids)
        hidden = model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).last_hidden_state
        return np.asarray(hidden.mean(1).numpy())

    return embed


def onnx_model(path: str, threads: int) -> Embed:
    from onnxpress.evaluation.opening import open_model
    from onnxpress.runtime.sessions import EncoderSession

    session = open_model(path, threads=threads).model
    assert isinstance(session, EncoderSession)
    return lambda ids: session.embed(ids)


def load() -> Mapping[str, Handler]:
    kind, path, threads = sys.argv[1], sys.argv[2], int(sys.argv[3])
    embed = (torch_model if kind == "torch" else onnx_model)(path, threads)

    def latency(tokens: list[int], runs: int) -> dict[str, Any]:
        ids, seconds = np.array([tokens]), []
        for _ in range(runs):
            start = time.perf_counter()
            embed(ids)
            seconds.append(time.perf_counter() - start)
        return {"seconds": seconds}

    def embeddings(sentences: list[list[int]]) -> dict[str, Any]:
        vectors = np.concatenate([embed(np.array([ids])) for ids in sentences])
        return {"vectors": (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).tolist()}

    return {"latency": latency, "embeddings": embeddings}


if __name__ == "__main__":
    serve(load)

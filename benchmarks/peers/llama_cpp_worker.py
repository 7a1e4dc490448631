"""llama.cpp as a contender. usage: llama_cpp_worker.py MODEL.gguf THREADS

Runs in its own environment with llama-cpp-python. Uses the C API directly, so that the binding's Python costs nothing.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Mapping

import llama_cpp
import numpy as np
from numpy.typing import NDArray
from protocol import Handler, decoder_handlers, serve

CONTEXT = 1024


class Model:
    def __init__(self, path: str, threads: int) -> None:
        llama_cpp.llama_backend_init()
        # Keep a reference: llama.cpp calls it for as long as the process lives.
        self.silent = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(self.silent, ctypes.c_void_p(0))
        self.model = llama_cpp.llama_model_load_from_file(path.encode(), llama_cpp.llama_model_default_params())
        if not self.model:
            raise RuntimeError(f"llama.cpp cannot load {path}")
        parameters = llama_cpp.llama_context_default_params()
        parameters.n_ctx = CONTEXT
        parameters.n_batch = parameters.n_ubatch = 512
        parameters.n_threads = parameters.n_threads_batch = threads
        self.context = llama_cpp.llama_init_from_model(self.model, parameters)
        self.memory = llama_cpp.llama_get_memory(self.context)
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))

    def reset(self, room: int) -> None:
        llama_cpp.llama_memory_clear(self.memory, True)

    def append(self, tokens: list[int]) -> None:
        array = (llama_cpp.llama_token * len(tokens))(*tokens)
        if llama_cpp.llama_decode(self.context, llama_cpp.llama_batch_get_one(array, len(tokens))):
            raise RuntimeError("llama_decode failed")
        llama_cpp.llama_get_logits_ith(self.context, -1)  # waits for the computation

    def logits(self, tokens: list[int]) -> NDArray[np.float32]:
        self.reset(len(tokens))
        batch = llama_cpp.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = token, i, 1, 0, True
        if llama_cpp.llama_decode(self.context, batch):
            raise RuntimeError("llama_decode failed")
        pointer = llama_cpp.llama_get_logits(self.context)
        logits = np.ctypeslib.as_array(pointer, shape=(len(tokens), self.vocabulary)).astype(np.float32)
        llama_cpp.llama_batch_free(batch)
        return logits


def load() -> Mapping[str, Handler]:
    return decoder_handlers(Model(sys.argv[1], int(sys.argv[2])))


if __name__ == "__main__":
    serve(load)

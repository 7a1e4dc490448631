"""onnxruntime-genai as a contender. usage: genai_worker.py FOLDER THREADS

FOLDER holds genai_config.json and the graph that it names. Runs in its own environment with onnxruntime-genai.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping

import numpy as np
import onnxruntime_genai as og
from numpy.typing import NDArray
from protocol import Handler, decoder_handlers, serve


class Model:
    def __init__(self, folder: str, threads: int) -> None:
        config = og.Config(folder)
        config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}))
        self.model = og.Model(config)

    def reset(self, room: int) -> None:
        self.generator = None  # its cache goes before the next one comes
        parameters = og.GeneratorParams(self.model)
        parameters.set_search_options(do_sample=False, max_length=room, min_length=room)
        self.generator = og.Generator(self.model, parameters)

    def append(self, tokens: list[int]) -> None:
        self.generator.append_tokens(np.array([tokens], dtype=np.int32))

    def logits(self, tokens: list[int]) -> NDArray[np.float32]:
        self.reset(len(tokens) + 1)
        self.append(tokens)
        return np.asarray(self.generator.get_output("logits")[0], np.float32)


def load() -> Mapping[str, Handler]:
    return decoder_handlers(Model(sys.argv[1], int(sys.argv[2])))


if __name__ == "__main__":
    serve(load)

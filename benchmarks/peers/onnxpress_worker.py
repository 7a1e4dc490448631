"""onnxpress's own runner as a contender. usage: onnxpress_worker.py PATH THREADS

PATH is an artifact folder, or an ONNX file or folder of anyone's. Runs in onnxpress's environment.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from protocol import Handler, decoder_handlers, serve

from onnxpress.evaluation.opening import open_model
from onnxpress.runtime.decoder import DecoderSession


class Model:
    def __init__(self, path: str, threads: int) -> None:
        self.path, self.threads = path, threads
        self.session = self.full = self._open()

    def _open(self, *, all_logits: bool = False) -> DecoderSession:
        session = open_model(self.path, threads=self.threads, all_logits=all_logits).model
        if not isinstance(session, DecoderSession):
            raise TypeError(f"{self.path} is not a decoder")
        return session

    def reset(self, room: int) -> None:
        self.session.reset()

    def append(self, tokens: list[int]) -> None:
        step = self.session.decode if self.session.length else self.session.prefill
        step(np.array([tokens]))

    def logits(self, tokens: list[int]) -> NDArray[np.float32]:
        """Read as a prompt: a graph that was cut to its last logits is opened again without the cut."""
        if self.full.last_only:
            self.full = self._open(all_logits=True)
        logits: NDArray[np.float32] = self.full.prefill(np.array([tokens]))[0]
        if len(logits) != len(tokens):
            raise ValueError(f"{self.path} computes its last logits only")
        return logits


def load() -> Mapping[str, Handler]:
    return decoder_handlers(Model(sys.argv[1], int(sys.argv[2])))


if __name__ == "__main__":
    serve(load)

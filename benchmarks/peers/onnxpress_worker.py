"""onnxpress's own runner as a contender. usage: onnxpress_worker.py PATH THREADS

PATH is an artifact folder or an ONNX file. Runs in onnxpress's environment.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from protocol import Handler, decoder_handlers, serve

from onnxpress.decoder_session import DecoderSession
from onnxpress.opening import open_model


class Model:
    def __init__(self, path: str, threads: int) -> None:
        session = open_model(path, threads=threads).model
        if not isinstance(session, DecoderSession):
            raise TypeError(f"{path} is not a decoder")
        self.session = session

    def reset(self, room: int) -> None:
        self.session.reset()

    def append(self, tokens: list[int]) -> None:
        step = self.session.decode if self.session.length else self.session.prefill
        step(np.array([tokens]))

    def logits(self, tokens: list[int]) -> NDArray[np.float32]:
        """Graphs that compute the last logits only are fed token by token."""
        ids = np.array([tokens])
        if not self.session.last_only:
            return self.session.prefill(ids)[0]
        parts = [self.session.prefill(ids[:, :1])]
        parts += [self.session.decode(ids[:, i : i + 1]) for i in range(1, len(tokens))]
        return np.concatenate(parts, axis=1)[0]


def load() -> Mapping[str, Handler]:
    return decoder_handlers(Model(sys.argv[1], int(sys.argv[2])))


if __name__ == "__main__":
    serve(load)

"""How a benchmark talks to a contender: JSON lines over pipes, so that different environments can take turns.

A worker is a script started as `python worker.py ARGUMENTS`. It loads its model, writes `{"load_s": seconds, ...}` and
then answers one request per line until its input closes. It runs in every
environment: standard library only, and numpy where a decoder is measured.

Requests: `{"do": NAME, **arguments}` -> `{...}`, or `{"error": message}`. `memory` is answered here for all of them.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

Handler = Callable[..., dict[str, Any]]


class Decoder(Protocol):
    """What a runtime has to offer to be measured as a decoder."""

    def reset(self, room: int) -> None:
        """Forget everything; at most `room` tokens will follow."""

    def append(self, tokens: list[int]) -> None:
        """Append `tokens` and wait for the logits of the last one."""

    def logits(self, tokens: list[int]) -> Any:
        """A numpy array, float32 [len(tokens), vocabulary], for a sequence of its own."""


def decoder_handlers(model: Decoder) -> dict[str, Handler]:
    """`prefill`, `decode`, `log_probabilities`: the same requests and the same clock for every runtime."""

    def timed(tokens: list[int]) -> float:
        start = time.perf_counter()
        model.append(tokens)
        return time.perf_counter() - start

    def prefill(tokens: list[int]) -> dict[str, Any]:
        model.reset(len(tokens) + 1)
        return {"seconds": timed(tokens)}

    def decode(tokens: list[int], following: list[int]) -> dict[str, Any]:
        """Seconds of each single-token step after `tokens`, fed with `following`."""
        model.reset(len(tokens) + len(following) + 1)
        model.append(tokens)
        return {"seconds": [timed([token]) for token in following]}

    def log_probabilities(tokens: list[int], path: str) -> dict[str, Any]:
        """Write float32 [len(tokens), vocabulary] log-probabilities to `path` (.npy)."""
        import numpy as np

        logits = model.logits(tokens)
        logits = logits - logits.max(-1, keepdims=True)
        np.save(path, logits - np.log(np.exp(logits).sum(-1, keepdims=True)))
        return {}

    return {"prefill": prefill, "decode": decode, "log_probabilities": log_probabilities}


def peak_rss_bytes() -> int:
    """Largest resident set of this process so far (VmHWM; mapped files that were touched are counted)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no VmHWM in /proc/self/status")


def serve(load: Callable[[], Mapping[str, Handler]]) -> None:
    """Run `load`, then answer requests from standard input with the handlers that it returned.

    Whatever libraries print goes to standard error; standard output carries answers only.
    """
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    sys.stdout = sys.stderr

    def answer(content: Mapping[str, Any]) -> None:
        answers.write(json.dumps(content) + "\n")

    try:
        start = time.perf_counter()
        handlers = load()
        answer({"load_s": time.perf_counter() - start})
    except Exception as error:  # the driver reports it: a worker has no other way to say what went wrong
        traceback.print_exc()
        answer({"error": f"{type(error).__name__}: {error}"})
        return
    for line in sys.stdin:
        request = json.loads(line)
        name = request.pop("do")
        try:
            answer({"peak_rss_bytes": peak_rss_bytes()} if name == "memory" else handlers[name](**request))
        except Exception as error:
            traceback.print_exc()
            answer({"error": f"{type(error).__name__}: {error}"})

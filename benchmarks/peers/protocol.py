"""How a benchmark talks to a contender: JSON lines over pipes, so that different environments can take turns.

A worker is a script started as `python worker.py ARGUMENTS`. It loads its model, writes `{"load_s": seconds, ...}` and
then answers one request per line until its input closes. Standard library only: this file runs in every environment.

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
from typing import Any

Handler = Callable[..., dict[str, Any]]


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

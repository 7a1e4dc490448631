"""Speed and memory of a graph, measured in a process of its own so that the peak is the model's.

`peak_rss_bytes` is the kernel's high-water mark of that process (VmHWM): Python and onnxruntime (about 50 MB), the
weights as far as they are mapped or copied, the cache and the arena. `getrusage` would not do: its figure survives
`exec` and includes the parent.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from onnxpress.errors import OnnxpressError, SourceNotFoundError
from onnxpress.evaluation.opening import find_graphs, only_graph, open_model
from onnxpress.runtime.memory import peak_rss_bytes
from onnxpress.runtime.operator_profile import OperatorTime, operator_times
from onnxpress.runtime.session_options import check_session_options
from onnxpress.runtime.sessions import EncoderDecoderSession


@dataclass(frozen=True)
class Benchmark:
    """The time and memory that a model takes on this machine; a figure is None where it does not apply."""

    kind: str
    size_bytes: int
    """Bytes of the graph's files, external data included."""
    load_s: float
    peak_rss_bytes: int
    threads: int | None
    prefill_tokens_per_s: float | None = None
    """Best of the repeats, on a prompt of `prompt` tokens, batch 1."""
    prompt: int | None = None
    decode_ms_per_token: Mapping[str, float] = field(default_factory=dict)
    """Median, by number of tokens in the cache."""
    latency_ms: float | None = None
    """Median of one run of an encoder (128 tokens, batch 1) or of any other graph."""
    operators: Sequence[OperatorTime] = ()
    """Where the time goes, if asked for."""

    def to_dict(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if value not in (None, {}, ())}


def benchmark(
    what: str | Path,
    *,
    prompt: int = 512,
    context: Sequence[int] = (16, 256, 512),
    threads: int | None = None,
    repeats: int = 3,
    session_options: Mapping[str, str] | None = None,
    profile: bool = False,
    timeout: float | None = 1800,
) -> Benchmark:
    """Measure an artifact folder or an ONNX file in a fresh Python process.

    `session_options` replace those of the artifact. `profile` adds a pass under onnxruntime's profiler, after the
    figures were taken. Raises the errors of opening the model, as the child met them.
    """
    if session_options is not None:
        check_session_options(session_options)
    path = Path(what)
    if not path.exists():
        raise SourceNotFoundError(f"no such file or folder: {path}")
    request = {
        "path": str(path.absolute()),
        "prompt": prompt,
        "context": list(context),
        "threads": threads,
        "repeats": repeats,
        "session_options": session_options if session_options is None else dict(session_options),
        "profile": profile,
    }
    command = [sys.executable, "-m", "onnxpress.evaluation.benchmark", json.dumps(request)]
    try:
        child = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
    except subprocess.TimeoutExpired as error:
        raise OnnxpressError(f"the benchmark of {path} did not end in {timeout:.0f} s") from error
    try:
        answer = json.loads(child.stdout.splitlines()[-1])
    except (IndexError, ValueError) as error:
        reason = (child.stderr.strip().splitlines() or [f"exit code {child.returncode}"])[-1]
        raise OnnxpressError(f"the benchmark of {path} ended early: {reason}") from error
    if "error" in answer:
        from onnxpress import errors

        raise getattr(errors, answer["error"])(answer["message"], hint=answer["hint"])
    answer["operators"] = [OperatorTime(**row) for row in answer["operators"]]
    return Benchmark(**answer)


def size_bytes(path: Path) -> int:
    """Bytes of a graph and its external data, or of all graphs of a folder."""
    graphs = find_graphs(path) if path.is_dir() else [path]
    files = {file for graph in graphs for file in (graph, *graph.parent.glob(f"{graph.name}[._]data*"))}
    return sum(file.stat().st_size for file in files)


def run_request(request: Mapping[str, Any]) -> dict[str, Any]:
    """The child's work: everything in `Benchmark` for one request."""
    path = Path(request["path"])
    options = {"threads": request["threads"], "session_options": request["session_options"]}
    start = time.perf_counter()
    opened = open_model(path, **options)
    result: dict[str, Any] = {"kind": opened.kind, "load_s": time.perf_counter() - start, "threads": request["threads"]}
    asked = (request["prompt"], request["context"], max(1, request["repeats"]))
    run, figures = opened.speed(*asked)
    result |= figures
    result |= {"peak_rss_bytes": peak_rss_bytes(), "size_bytes": size_bytes(path), "operators": []}
    if request["profile"]:
        del opened, run
        with tempfile.TemporaryDirectory() as folder:
            graph = only_graph(path) if path.is_dir() else path
            profiled = open_model(graph, **options, profile_prefix=f"{folder}/profile")
            profiled.speed(*asked[:2], 1)[0]()
            model = profiled.model
            sessions = model.sessions if isinstance(model, EncoderDecoderSession) else [model.session]
            times = operator_times(*(Path(session.end_profiling()) for session in sessions))
            result["operators"] = [asdict(row) for row in times]
    return result


def _main() -> None:
    try:
        answer = run_request(json.loads(sys.argv[1]))
    except OnnxpressError as error:
        answer = {"error": type(error).__name__, "message": str(error), "hint": error.hint}
    sys.stdout.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    _main()

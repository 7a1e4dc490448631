"""Programs that use optimum run in an environment of its own: optimum-onnx needs an older transformers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def in_optimum(script: str, *arguments: object) -> str:
    """Run a script of this folder there; returns what it prints."""
    command = [_python(), HERE / script, *arguments]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(command, capture_output=True, text=True, env={**environment, "HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def _python() -> str:
    """The Python of the environment that the benchmarks measure optimum in; made on first use."""
    program = "import common, export_cost; print(common.environment('optimum-onnx', export_cost.OPTIMUM))"
    benchmarks = HERE.parents[1] / "benchmarks"
    done = subprocess.run([sys.executable, "-c", program], cwd=benchmarks, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()[-1]

"""What the benchmarks share: environments for peers, measured processes, contenders that take turns, tables.

Standard library only: a child's peak memory as the kernel counts it (ru_maxrss) is never less than what its parent held
when it was started, so the driver stays small and leaves heavy work to processes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PEERS = HERE / "peers"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "onnxpress" / "benchmarks"
MODEL = "smollm2-135m-instruct"
Row = dict[str, Any]


def parser(description: str) -> argparse.ArgumentParser:
    """With the options that all benchmarks have."""
    result = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--json", type=Path, help="write the results to this file")
    result.add_argument("--markdown", type=Path, help="write the tables to this file, in Markdown")
    result.add_argument("--repeats", type=int, default=3, help="rounds in which the contenders take turns (default 3)")
    result.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="threads of every contender")
    result.add_argument("--only", nargs="+", metavar="NAME", help="only contenders whose names contain one of these")
    result.add_argument("--find-links", metavar="FOLDER", help="wheels for the peers, before PyPI is asked")
    return result


def wanted(name: str, only: Sequence[str] | None) -> bool:
    return not only or any(part.lower() in name.lower() for part in only)


def environment(name: str, packages: Sequence[str], find_links: str | None = None) -> str:
    """The Python of a virtual environment that holds exactly `packages` (pinned) and what they need.

    Made on first use, in the cache folder; another list makes another environment. torch comes from a CPU build.
    """
    folder = CACHE / "environments" / f"{name}-{hashlib.sha256(' '.join(packages).encode()).hexdigest()[:8]}"
    python = folder / "bin" / "python"
    if (folder / "complete").exists():
        return str(python)
    print(f"preparing {name}: {', '.join(packages)}", file=sys.stderr)
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
    install = [str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    if find_links:
        install += ["--find-links", find_links]
    torch = [package for package in packages if package.startswith("torch==")]
    if torch:
        local = subprocess.run([*install, f"{torch[0]}+cpu"], capture_output=True)
        if local.returncode:
            subprocess.run([*install, *torch, "--extra-index-url", "https://download.pytorch.org/whl/cpu"], check=True)
    subprocess.run([*install, *packages], check=True)
    (folder / "complete").touch()
    return str(python)


@dataclass(frozen=True)
class Measured:
    """A process that ran to its end."""

    seconds: float
    peak_rss_bytes: int
    """Largest resident set of the process or of any child it waited for (ru_maxrss)."""
    output: str


def measured(command: Sequence[str | Path], *, env: Mapping[str, str] | None = None) -> Measured:
    """Run `command`; raises RuntimeError with the end of its output if it fails."""
    log = CACHE / f"output-{os.getpid()}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as out:
        start = time.perf_counter()
        process = subprocess.Popen(
            [str(part) for part in command], stdout=out, stderr=subprocess.STDOUT, env={**os.environ, **(env or {})}
        )
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
    output = log.read_text(encoding="utf-8", errors="replace")
    log.unlink()
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{command[0]} … ended with {process.returncode}:\n{output[-2000:]}")
    return Measured(seconds, usage.ru_maxrss * 1024, output)


class Worker:
    """A contender in a process of its own; see peers/protocol.py."""

    def __init__(self, name: str, command: Sequence[str | Path], row: Row) -> None:
        self.name, self.row = name, row
        self.log = CACHE / f"worker-{os.getpid()}-{hashlib.sha256(name.encode()).hexdigest()[:6]}.log"
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [str(part) for part in command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
            )
        self.load_s = float(self._answer()["load_s"])

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """One request; raises RuntimeError if the worker could not do it."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        answer: dict[str, Any] = json.loads(line) if line else {"error": "the process ended"}
        if "error" in answer:
            tail = self.log.read_text(encoding="utf-8", errors="replace")[-1500:]
            raise RuntimeError(f"{self.name}: {answer['error']}\n{tail}")
        return answer

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()
        self.log.unlink(missing_ok=True)


def in_turns(
    contenders: Sequence[Worker], rounds: int, work: Callable[[Worker], Mapping[str, list[float]]]
) -> dict[str, dict[str, list[float]]]:
    """Every contender does its work once per round, one after the other: what disturbs the machine disturbs them all.

    Returns the samples by contender and measure.
    """
    samples: dict[str, dict[str, list[float]]] = {worker.name: {} for worker in contenders}
    for number in range(rounds):
        for worker in contenders if number % 2 == 0 else reversed(contenders):
            print(f"round {number + 1} of {rounds}: {worker.name}", file=sys.stderr)
            for measure, values in work(worker).items():
                samples[worker.name].setdefault(measure, []).extend(values)
    return samples


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


def file_bytes(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)


def slug(model: str) -> str:
    """A name for files made from `model`."""
    return f"{Path(model).stem}-{hashlib.sha256(model.encode()).hexdigest()[:8]}"


def machine() -> str:
    name = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            name = line.split(":", 1)[1].strip()
            break
    return f"{name}, {os.cpu_count()} cores"


def markdown(rows: Sequence[Row]) -> str:
    """A Markdown table; columns are the keys of all rows, in order of appearance."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [[_cell(row.get(column)) for column in columns] for row in rows]
    widths = [max(len(line[i]) for line in [columns, *cells]) for i in range(len(columns))]

    def line(values: Sequence[str]) -> str:
        return "| " + " | ".join(value.ljust(width) for value, width in zip(values, widths, strict=True)) + " |"

    return "\n".join([line(columns), line(["-" * width for width in widths]), *map(line, cells)])


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2 if abs(value) >= 0.1 else 4
        return f"{value:.{digits}f}"
    return str(value)


def report(title: str, tables: Mapping[str, Sequence[Row]], arguments: argparse.Namespace) -> None:
    """Print the tables, and write them where the options say."""
    text = "\n\n".join(f"### {name}\n\n{markdown(rows)}" for name, rows in tables.items() if rows)
    command = f"python benchmarks/{Path(sys.argv[0]).name} {' '.join(sys.argv[1:])}".strip()
    page = f"## {title}\n\n{machine()}; `{command}`\n\n{text}\n"
    print(page)
    if arguments.markdown:
        arguments.markdown.write_text(page, encoding="utf-8")
    if arguments.json:
        content = {"title": title, "machine": machine(), "command": command, "tables": dict(tables)}
        arguments.json.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def checkpoint_folder(model: str = MODEL) -> Path:
    """`model` as a Hugging Face folder with float32 weights in model.safetensors, which every exporter can read."""
    folder = CACHE / "checkpoints" / slug(model)
    if not (folder / "complete").exists():
        measured([sys.executable, PEERS / "write_checkpoint.py", model, folder])
        (folder / "complete").touch()
    return folder

"""What an export costs: wall time and peak memory, from a checkpoint on disk to a saved float32 graph with a cache.

    python benchmarks/export_cost.py            SmolLM2-135M, against onnxruntime-genai, optimum-onnx, transformers
    python benchmarks/export_cost.py --large    also random 3B (24 layers) and 7B (48 layers) checkpoints in bfloat16,
                                                against copying their files; needs 60 GB of disk (--scale shrinks them)

Wall time includes interpreter start and imports, and writing everything to the disk (sync). Memory is the kernel's
ru_maxrss of the largest process of the tool; mapped files count as far as they are resident.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import common
from common import CACHE, PEERS, Measured, Row
from decoder import GENAI_BUILDER

OPTIMUM = ["torch==2.13.0", "optimum-onnx[onnxruntime]==0.1.0", "transformers==4.57.6"]
LARGE = {"3B, 24 layers": (24, 3072, 9216), "7B, 48 layers": (48, 3584, 9728)}
"""layers, hidden size, intermediate size: 5.5 and 13.7 GB in bfloat16."""
SCRATCH = CACHE / "scratch"
BLUEPRINTS = CACHE / "blueprints"
"""onnxpress's own cache during this benchmark: emptied before each run that is to know nothing of the architecture."""
SEEN = "onnxpress, architecture seen before"


def timed(command: Sequence[str | Path], *, seen: bool = False) -> Measured:
    """Run a command that writes SCRATCH, from a clean start to everything on the disk."""
    shutil.rmtree(SCRATCH, ignore_errors=True)
    SCRATCH.parent.mkdir(parents=True, exist_ok=True)
    if not seen:
        shutil.rmtree(BLUEPRINTS, ignore_errors=True)
    os.sync()
    start = time.perf_counter()
    result = common.measured(command, env={"HF_HUB_OFFLINE": "1", "ONNXPRESS_CACHE": str(BLUEPRINTS)})
    os.sync()
    return Measured(time.perf_counter() - start, result.peak_rss_bytes, result.output)


def commands(checkpoint: Path, find_links: str | None, only: Sequence[str] | None) -> dict[str, list[str | Path]]:
    """How each contender exports `checkpoint` to SCRATCH."""
    ours: list[str | Path] = [sys.executable]
    found: dict[str, list[str | Path]] = {"onnxpress": [*ours, PEERS / "export_onnxpress.py", checkpoint, SCRATCH]}
    if common.wanted(SEEN, only):
        found[SEEN] = found["onnxpress"]
    if common.wanted("onnxpress, verified", only):
        found["onnxpress, verified"] = [*ours, "-m", "onnxpress.cli", "export", checkpoint, "-o", SCRATCH]
    if common.wanted("onnxruntime-genai builder", only):
        builder = [
            common.environment("genai-builder", GENAI_BUILDER, find_links),
            "-m",
            "onnxruntime_genai.models.builder",
        ]
        options = ["-m", checkpoint, "-o", SCRATCH, "-p", "fp32", "-e", "cpu", "-c", CACHE / "hub"]
        found["onnxruntime-genai builder"] = [*builder, *options]
    if common.wanted("optimum-onnx", only):
        python = Path(common.environment("optimum-onnx", OPTIMUM, find_links))
        task = ["--task", "text-generation-with-past"]
        found["optimum-onnx"] = [
            python.parent / "optimum-cli",
            "export",
            "onnx",
            "-m",
            older(checkpoint),
            *task,
            SCRATCH,
        ]
    if common.wanted("transformers.exporters", only):
        found["transformers.exporters"] = [*ours, PEERS / "export_transformers.py", checkpoint, SCRATCH]
    return found


def older(checkpoint: Path) -> Path:
    """The checkpoint as transformers 4 reads it: same weights, settings under their older names."""
    folder = checkpoint.with_name(f"{checkpoint.name}-transformers4")
    folder.mkdir(exist_ok=True)
    for path in checkpoint.iterdir():
        target = folder / path.name
        if path.name == "config.json":
            config = json.loads(path.read_text())
            config["rope_theta"] = config.get("rope_parameters", {}).get("rope_theta", 10000.0)
            target.write_text(json.dumps({**config, "torch_dtype": config.get("dtype")}))
        elif path.name == "tokenizer_config.json":
            content = json.loads(path.read_text())
            target.write_text(json.dumps({**content, "tokenizer_class": "PreTrainedTokenizerFast"}))
        elif not target.exists():
            os.link(path, target)
    return folder


def small(rounds: int, find_links: str | None, only: Sequence[str] | None) -> list[Row]:
    found = commands(common.checkpoint_folder(), find_links, only)
    runs: dict[str, list[Measured]] = {name: [] for name in found}
    sizes: dict[str, int] = {}
    for number in range(rounds):
        for name, command in found.items():
            print(f"round {number + 1} of {rounds}: {name}", file=sys.stderr)
            runs[name].append(timed(command, seen=name == SEEN))
            sizes[name] = common.file_bytes(SCRATCH)
    rows: list[Row] = []
    for name, samples in runs.items():
        row: Row = {"exporter": name, "wall s": common.median([run.seconds for run in samples])}
        row["peak RSS GB"] = max(run.peak_rss_bytes for run in samples) / 1e9
        rows.append({**row, "written MB": sizes[name] / 1e6})
    base = next((row["wall s"] for row in rows if row["exporter"] == "onnxruntime-genai builder"), None)
    return [{**row, "time / genai builder": row["wall s"] / base} for row in rows] if base else rows


def large(rounds: int, scale: float) -> list[Row]:
    rows: list[Row] = []
    for name, (layers, hidden, intermediate) in LARGE.items():
        width = max(128, round(hidden * scale / 128) * 128)
        inner = max(128, round(intermediate * scale / 128) * 128)
        checkpoint = CACHE / "random" / f"{layers}-{width}-{inner}"
        shutil.rmtree(checkpoint, ignore_errors=True)
        generator = PEERS / "random_checkpoint.py"
        common.measured([sys.executable, generator, checkpoint, str(layers), str(width), str(inner)])
        size = common.file_bytes(checkpoint)
        exports, copies = [], []
        for _ in range(rounds):
            copies.append(timed(["cp", "-r", "--reflink=never", checkpoint, SCRATCH]).seconds)
            exports.append(timed([sys.executable, PEERS / "export_onnxpress.py", checkpoint, SCRATCH]))
        written = common.file_bytes(SCRATCH)
        seconds, copy = common.median([run.seconds for run in exports]), common.median(copies)
        row: Row = {"checkpoint": name, "GB": size / 1e9, "written GB": written / 1e9}
        row |= {"copy s": copy, "export s": seconds, "export / copy": seconds / copy}
        row["per byte written"] = seconds / written / (copy / size)
        rows.append({**row, "peak RSS GB": max(run.peak_rss_bytes for run in exports) / 1e9})
        shutil.rmtree(checkpoint)
    return rows


def main() -> None:
    parser = common.parser(__doc__ or "")
    parser.add_argument("--large", action="store_true", help="also the random 3B and 7B checkpoints")
    parser.add_argument("--scale", type=float, default=1.0, help="shrink the widths of the random checkpoints")
    arguments = parser.parse_args()
    tables = {"SmolLM2-135M": small(arguments.repeats, arguments.find_links, arguments.only)}
    if arguments.large:
        tables["Random checkpoints, bfloat16 to float32"] = large(arguments.repeats, arguments.scale)
    shutil.rmtree(SCRATCH, ignore_errors=True)
    common.report("Cost of an export", tables, arguments)


if __name__ == "__main__":
    main()

"""What an export costs: wall time and peak memory, from a checkpoint on disk to a saved float32 graph with a cache.

    python benchmarks/export_cost.py            SmolLM2-135M, against onnxruntime-genai, optimum-onnx, transformers
    python benchmarks/export_cost.py --large    random 3B (12 and 24 layers) and 7B (48 layers) checkpoints in bfloat16,
                                                against copying their files; needs 40 GB of disk (--scale shrinks them)

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
from contenders import GENAI_BUILDER

OPTIMUM = ["torch==2.13.0", "optimum-onnx[onnxruntime]==0.1.0", "transformers==4.57.6"]
LARGE = {"12 layers": (12, 3072, 9216), "3B, 24 layers": (24, 3072, 9216), "7B, 48 layers": (48, 3584, 9728)}
"""layers, hidden size, intermediate size: 2.9, 5.5 and 13.7 GB in bfloat16. The first shows what depth costs."""
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
    """Random checkpoints in bfloat16: their files copied, exported as they are, and exported in float32."""
    rows: list[Row] = []
    for name, (layers, hidden, intermediate) in LARGE.items():
        width = max(1, round(hidden * scale / 512)) * 512  # a multiple of its 4 key-value heads of 128
        inner = max(128, round(intermediate * scale / 128) * 128)
        checkpoint = CACHE / "random" / f"{layers}-{width}-{inner}"
        shutil.rmtree(checkpoint, ignore_errors=True)
        generator = PEERS / "random_checkpoint.py"
        common.measured([sys.executable, generator, checkpoint, str(layers), str(width), str(inner)])
        size = common.file_bytes(checkpoint)
        export: list[str | Path] = [sys.executable, PEERS / "export_onnxpress.py", checkpoint, SCRATCH]
        found: dict[str, tuple[list[str | Path], bool]] = {
            "cp": (["cp", "-r", "--reflink=never", checkpoint, SCRATCH], False),
            "export --dtype auto": ([*export, "auto"], False),
            "the same, architecture seen before": ([*export, "auto"], True),
            "export --dtype float32": ([*export, "float32"], False),
        }
        runs: dict[str, list[Measured]] = {what: [] for what in found}
        written: dict[str, int] = {}
        for number in range(rounds):
            for what, (command, seen) in found.items():
                print(f"{name}, round {number + 1} of {rounds}: {what}", file=sys.stderr)
                runs[what].append(timed(command, seen=seen))
                written[what] = common.file_bytes(SCRATCH)
                shutil.rmtree(SCRATCH)
        copy = common.median([run.seconds for run in runs["cp"]])
        for what, samples in runs.items():
            seconds = common.median([run.seconds for run in samples])
            row: Row = {"checkpoint": f"{name}, {size / 1e9:.1f} GB", "": what, "written GB": written[what] / 1e9}
            row |= {"wall s": seconds, "time / cp": seconds / copy}
            rows.append({**row, "peak RSS GB": max(run.peak_rss_bytes for run in samples) / 1e9})
        shutil.rmtree(checkpoint)
    return rows


def main() -> None:
    parser = common.parser(__doc__ or "")
    parser.add_argument("--large", action="store_true", help="random checkpoints of 3B and 7B instead of SmolLM2")
    parser.add_argument("--scale", type=float, default=1.0, help="shrink the widths of the random checkpoints")
    arguments = parser.parse_args()
    tables: dict[str, list[Row]] = {}
    if arguments.large:
        tables["Random checkpoints in bfloat16"] = large(arguments.repeats, arguments.scale)
    else:
        tables["SmolLM2-135M"] = small(arguments.repeats, arguments.find_links, arguments.only)
    shutil.rmtree(SCRATCH, ignore_errors=True)
    common.report("Cost of an export", tables, arguments)


if __name__ == "__main__":
    main()

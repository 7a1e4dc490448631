"""Encoders side by side: torch, onnxruntime in float32, its dynamic quantization, and onnxpress's artifact.

    python benchmarks/encoder.py [--model NAME] [--artifact DIR]

One run, taking turns; cosines are against torch, on the sentences that onnxpress evaluates with by default.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Mapping
from pathlib import Path

import common
from common import CACHE, PEERS, Row, Worker

TOKENS = 128
RUNS = 30


def files(model: str) -> Path:
    folder = CACHE / "encoders" / common.slug(model)
    if not (folder / "sentences.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        common.measured([sys.executable, PEERS / "encoder_files.py", model, folder])
    return folder


def latency(worker: Worker) -> Mapping[str, list[float]]:
    generator = random.Random(0)
    tokens = [generator.randrange(1000, 20000) for _ in range(TOKENS)]
    return {"latency": worker.ask("latency", tokens=tokens, runs=RUNS)["seconds"]}


def cosines(worker: Worker, reference: list[list[float]], sentences: list[list[int]]) -> list[float]:
    vectors = worker.ask("embeddings", sentences=sentences)["vectors"]
    return [
        sum(a * b for a, b in zip(mine, theirs, strict=True)) for mine, theirs in zip(vectors, reference, strict=True)
    ]


def main() -> None:
    parser = common.parser(__doc__ or "")
    parser.add_argument("--model", default="all-minilm-l6-v2", help="an encoder, however it is named")
    parser.add_argument("--artifact", type=Path, help="onnxpress's artifact (default: build it)")
    arguments = parser.parse_args()
    folder, checkpoint = files(arguments.model), common.checkpoint_folder(arguments.model)
    if arguments.artifact is None:
        arguments.artifact = CACHE / "artifacts" / common.slug(arguments.model)
        build = [sys.executable, "-m", "onnxpress.cli", "build", arguments.model, "-o", arguments.artifact]
        common.measured(build)
    paths = {
        "torch": ("torch", checkpoint, checkpoint / "model.safetensors"),
        "onnxruntime fp32": ("onnx", folder / "fp32", folder / "fp32" / "onnx"),
        "quantize_dynamic u8": ("onnx", folder / "u8" / "model.onnx", folder / "u8"),
        "quantize_dynamic s8": ("onnx", folder / "s8" / "model.onnx", folder / "s8"),
        "onnxpress": ("onnx", arguments.artifact, arguments.artifact / "onnx"),
    }
    workers = [
        Worker(name, [sys.executable, PEERS / "encoder_worker.py", kind, path, str(arguments.threads)], {})
        for name, (kind, path, _) in paths.items()
        if name == "torch" or common.wanted(name, arguments.only)
    ]
    for worker in workers:
        latency(worker)
    samples = common.in_turns(workers, arguments.repeats, latency)
    peaks = {worker.name: worker.ask("memory")["peak_rss_bytes"] / 1e6 for worker in workers}
    sentences = json.loads((folder / "sentences.json").read_text(encoding="utf-8"))
    reference = workers[0].ask("embeddings", sentences=sentences)["vectors"]
    rows: list[Row] = []
    for worker in workers:
        found = cosines(worker, reference, sentences)
        row: Row = {"contender": worker.name, "MB": common.file_bytes(paths[worker.name][2]) / 1e6}
        row["latency ms"] = 1e3 * common.median(samples[worker.name]["latency"])
        row["peak RSS MB"] = peaks[worker.name]
        rows.append({**row, "cosine mean": f"{sum(found) / len(found):.4f}", "cosine min": f"{min(found):.4f}"})
        worker.close()
    fp32 = next((row["latency ms"] for row in rows if row["contender"] == "onnxruntime fp32"), None)
    if fp32:
        rows = [{**row, "times as fast as fp32": fp32 / row["latency ms"]} for row in rows]
    title = f"Encoders: {arguments.model}, {TOKENS} tokens, batch 1, {arguments.threads} threads"
    common.report(title, {"Speed, size, fidelity": rows}, arguments)


if __name__ == "__main__":
    main()

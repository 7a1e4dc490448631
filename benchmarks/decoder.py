"""Decoders side by side: llama.cpp, onnxruntime-genai and onnxpress's artifacts, in one run, taking turns.

    python benchmarks/decoder.py                                    builds the default artifact and `smallest`
    python benchmarks/decoder.py --artifact mine=DIR --text FILE    adds an artifact; measures quality on a text, too

All start from the weights in one GGUF, as float32. llama.cpp's files are made by its own quantizer; its package is
compiled for this CPU on first use (minutes). onnxruntime-genai runs what its own builder makes. Every
contender keeps its defaults, except for the number of threads.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import common
from common import CACHE, MODEL, PEERS, Row, Worker

LLAMA_CPP = ["llama-cpp-python==0.3.36"]
GENAI = ["onnxruntime-genai==0.18.0", "onnxruntime==1.31.1", "numpy>=2"]
GENAI_BUILDER = [*GENAI, "torch==2.13.0", "transformers==5.23.0", "onnx-ir==1.1.0", "onnx==1.23.2", "tqdm"]
GGUF_FORMATS = ("Q4_0", "Q4_1", "Q4_K_M", "Q8_0")
PROMPT = 512
CONTEXTS = (16, 256, 512)
STEPS = 24
WINDOWS, WINDOW = 4, 512


def gguf(model: str, name: str, find_links: str | None) -> Path:
    """The GGUF `model` in another format, made by llama.cpp's quantizer; F32 holds what a quantized one stands for."""
    python = common.environment("llama-cpp", LLAMA_CPP, find_links)
    folder = CACHE / "gguf" / common.slug(model)
    path = folder / f"{name}.gguf"
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    source = model if name == "F32" else gguf(model, "F32", find_links)
    common.measured([python, PEERS / "llama_cpp_quantize.py", source, partial, name])
    partial.rename(path)
    return path


def genai_folder(model: str, find_links: str | None) -> Path:
    """What onnxruntime-genai's builder makes of `model` with int4 weights."""
    folder = CACHE / "genai" / common.slug(model)
    if not (folder / "complete").exists():
        python = common.environment("genai-builder", GENAI_BUILDER, find_links)
        checkpoint = common.checkpoint_folder(model)
        builder = [python, "-m", "onnxruntime_genai.models.builder", "-m", checkpoint, "-o", folder]
        common.measured([*builder, "-p", "int4", "-e", "cpu", "-c", CACHE / "hub"])
        (folder / "complete").touch()
    return folder


def artifact(model: str, recipe: str | None) -> Path:
    folder = CACHE / "artifacts" / f"{common.slug(model)}-{recipe or 'default'}"
    choice = ["-r", recipe] if recipe else []
    common.measured([sys.executable, "-m", "onnxpress.cli", "build", model, "-o", folder, *choice])
    return folder


def contenders(arguments: argparse.Namespace) -> list[Worker]:
    """Started, loaded, waiting."""
    found: list[Worker] = []
    threads = str(arguments.threads)

    def add(name: str, script: str, python: str, path: Path, size: int) -> None:
        row = {"contender": name, "MB": size / 1e6}
        found.append(Worker(name, [python, PEERS / script, path, threads], row))

    for name in GGUF_FORMATS:
        if common.wanted(f"llama.cpp {name}", arguments.only):
            path = gguf(arguments.model, name, arguments.find_links)
            python = common.environment("llama-cpp", LLAMA_CPP, arguments.find_links)
            add(f"llama.cpp {name}", "llama_cpp_worker.py", python, path, common.file_bytes(path))
    if common.wanted("onnxruntime-genai int4", arguments.only):
        folder = genai_folder(arguments.model, arguments.find_links)
        size = sum(common.file_bytes(path) for path in folder.glob("model.onnx*"))
        python = common.environment("genai", GENAI, arguments.find_links)
        add("onnxruntime-genai int4", "genai_worker.py", python, folder, size)
    ours: dict[str, Path | None] = {"default": None, "smallest": None}
    ours |= {name: Path(path) for name, _, path in (item.partition("=") for item in arguments.artifact)}
    for name, given in ours.items():
        if common.wanted(f"onnxpress {name}", arguments.only):
            folder = given or artifact(arguments.model, None if name == "default" else name)
            add(f"onnxpress {name}", "onnxpress_worker.py", sys.executable, folder, common.file_bytes(folder / "onnx"))
    return found


def speed(worker: Worker) -> Mapping[str, list[float]]:
    generator = random.Random(0)
    tokens = [generator.randrange(1000, 40000) for _ in range(PROMPT + STEPS)]
    samples = {"prefill": [worker.ask("prefill", tokens=tokens[:PROMPT])["seconds"]]}
    for context in CONTEXTS:
        answer = worker.ask("decode", tokens=tokens[:context], following=tokens[:STEPS])
        samples[f"decode {context}"] = answer["seconds"]
    return samples


def speed_row(worker: Worker, samples: Mapping[str, list[float]]) -> Row:
    row = {**worker.row, "prefill 512 tok/s": PROMPT / common.median(samples["prefill"])}
    for context in CONTEXTS:
        row[f"decode at {context} ms"] = 1e3 * common.median(samples[f"decode {context}"])
    return row


def quality(workers: list[Worker], text: Path, model: str) -> list[Row]:
    """Perplexity and KL divergence to the float32 model on the first windows of a text, prefill."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, PEERS / "quality.py"]
        tokens = Path(folder) / "tokens.json"
        checkpoint = common.checkpoint_folder(model)
        common.measured([*command, "reference", checkpoint, text, str(WINDOWS), str(WINDOW), folder])
        rows: list[Row] = []
        for worker in workers:
            for number, window in enumerate(json.loads(tokens.read_text(encoding="utf-8"))):
                worker.ask("log_probabilities", tokens=window, path=f"{folder}/candidate-{number}.npy")
            output = common.measured([*command, "compare", folder]).output
            rows.append({"contender": worker.name, **json.loads(output.splitlines()[-1])})
    return rows


def ratios(rows: list[Row]) -> list[Row]:
    """Ours against llama.cpp's best of the same size class: 8 bits for the default, 4 for `smallest`."""
    by_name = {row["contender"]: row for row in rows}
    result: list[Row] = []
    for ours, theirs in (("onnxpress default", "llama.cpp Q8_0"), ("onnxpress smallest", "llama.cpp Q4_0")):
        if ours in by_name and theirs in by_name:
            mine, other = by_name[ours], by_name[theirs]
            row: Row = {"comparison": f"{ours} / {theirs}"}
            row["prefill, times as fast"] = mine["prefill 512 tok/s"] / other["prefill 512 tok/s"]
            for context in CONTEXTS:
                key = f"decode at {context} ms"
                row[f"decode at {context}, times as fast"] = other[key] / mine[key]
            row["size"] = mine["MB"] / other["MB"]
            result.append(row)
    return result


def main() -> None:
    parser = common.parser(__doc__ or "")
    parser.add_argument("--model", help=f"a .gguf of any format (default: that of {MODEL})")
    parser.add_argument("--artifact", action="append", default=[], metavar="NAME=DIR", help="an artifact to measure")
    parser.add_argument("--text", type=Path, help="measure perplexity and KL divergence on this text, too")
    arguments = parser.parse_args()
    if arguments.model is None:
        found = common.measured([sys.executable, PEERS / "find_gguf.py", MODEL])
        arguments.model = found.output.splitlines()[-1]
    workers = contenders(arguments)
    for worker in workers:
        speed(worker)  # caches filled, memory touched
    samples = common.in_turns(workers, arguments.repeats, speed)
    rows = [speed_row(worker, samples[worker.name]) for worker in workers]
    for worker, row in zip(workers, rows, strict=True):
        row["peak RSS MB"] = worker.ask("memory")["peak_rss_bytes"] / 1e6
        row["load s"] = worker.load_s
    tables = {"Speed and memory": rows, "Ratios": ratios(rows)}
    if arguments.text:
        tables["Quality"] = quality(workers, arguments.text, arguments.model)
    for worker in workers:
        worker.close()
    common.report(f"Decoders: {Path(arguments.model).stem}, batch 1, {arguments.threads} threads", tables, arguments)


if __name__ == "__main__":
    main()

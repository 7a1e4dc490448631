"""Encoders side by side: torch, onnxruntime in float32, its dynamic quantization, and onnxpress's artifact.

    python benchmarks/encoder.py [--model NAME] [--artifact DIR]

One run, taking turns; cosines are against torch, on the sentences that onnxpress evaluates with by default.
quantization.py has more contenders, and rank correlations.
"""

from __future__ import annotations

import csv
import itertools
import json
import random
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import common
import contenders
from common import CACHE, PEERS, Row, Worker
from contenders import Contender, Subject

WORKER = ("encoder_worker.py", "onnx")
TOKENS = 128
RUNS = 30
Sentences = list[list[int]]


def latency(worker: Worker) -> Mapping[str, list[float]]:
    generator = random.Random(0)
    tokens = [generator.randrange(1000, 20000) for _ in range(TOKENS)]
    return {"latency": worker.ask("latency", tokens=tokens, runs=RUNS)["seconds"]}


def race(workers: list[Worker], rounds: int) -> list[Row]:
    """Latency and peak memory of contenders that are loaded, by turns, after a round that is not counted."""
    for worker in workers:
        latency(worker)
    samples = common.in_turns(workers, rounds, latency)
    rows: list[Row] = []
    for worker in workers:
        row = {**worker.row, "latency ms": 1e3 * common.median(samples[worker.name]["latency"])}
        rows.append({**row, "peak RSS MB": worker.ask("memory")["peak_rss_bytes"] / 1e6})
    return rows


def torch_worker(model: str, threads: int) -> Worker:
    """The checkpoint itself: what cosines are measured against."""
    checkpoint = common.checkpoint_folder(model)
    size = common.file_bytes(checkpoint / "model.safetensors")
    command = [sys.executable, PEERS / "encoder_worker.py", "torch", checkpoint, str(threads)]
    return Worker("torch", command, {"contender": "torch", "MB": size / 1e6})


def encoded(model: str, *what: str) -> Sentences:
    """Token ids: of onnxpress's own sentences, of a file's lines, or of its two columns, one behind the other."""
    file = CACHE / f"sentences-{common.slug(model)}.json"
    common.measured([sys.executable, PEERS / "encode_sentences.py", common.checkpoint_folder(model), file, *what])
    sentences: Sentences = json.loads(file.read_text(encoding="utf-8"))
    return sentences


def embed(worker: Worker, sentences: Sentences) -> list[list[float]]:
    vectors: list[list[float]] = worker.ask("embeddings", sentences=sentences)["vectors"]
    return vectors


def cosines(mine: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]]) -> list[float]:
    return [sum(a * b for a, b in zip(one, other, strict=True)) for one, other in zip(mine, theirs, strict=True)]


def judge(worker: Worker, reference: list[list[float]], sentences: Sentences) -> Row:
    found = cosines(embed(worker, sentences), reference)
    return {"cosine mean": sum(found) / len(found), "cosine min": min(found)}


Pairs = tuple[Sentences, list[float]]


def read_pairs(model: str, file: Path) -> Pairs:
    """Token ids of all first sentences and then of all second ones; the scores."""
    with file.open(encoding="utf-8", newline="") as lines:
        scores = [float(row[2]) for row in csv.reader(lines)]
    return encoded(model, str(file)), scores


def ranks(values: Sequence[float]) -> list[float]:
    """From 1; equal values share the mean of their ranks."""
    result = [0.0] * len(values)
    start = 1
    for _, group in itertools.groupby(sorted(range(len(values)), key=values.__getitem__), key=values.__getitem__):
        same = list(group)
        for index in same:
            result[index] = start + (len(same) - 1) / 2
        start += len(same)
    return result


def spearman(worker: Worker, pairs: Pairs) -> float:
    """Rank correlation, in percent, of the scores with the cosines of the pairs."""
    sentences, scores = pairs
    vectors = embed(worker, sentences)
    found = cosines(vectors[: len(scores)], vectors[len(scores) :])
    return 100 * statistics.correlation(ranks(found), ranks(scores))


def main() -> None:
    parser = common.parser(__doc__ or "")
    parser.add_argument("--model", default="all-minilm-l6-v2", help="an encoder, however it is named")
    parser.add_argument("--artifact", type=Path, help="onnxpress's artifact (default: build it)")
    arguments = parser.parse_args()
    subject = Subject("encoder", arguments.model)
    methods = {name: contenders.ONNXRUNTIME_METHODS[name] for name in ("quantize_dynamic u8", "quantize_dynamic s8")}
    ours: list[Contender] = contenders.onnxpress(subject, WORKER, {"default": ""})
    if arguments.artifact:
        ours = [contenders.artifact("artifact", arguments.artifact, WORKER)]
    workers = [torch_worker(arguments.model, arguments.threads)]
    for contender in (*contenders.onnxruntime_tools(subject, WORKER, methods), *ours):
        if common.wanted(contender.name, arguments.only):
            built = contender.built(subject, again=contender.family == "onnxpress")
            workers.append(contender.start(built, arguments.threads))
    rows = race(workers, arguments.repeats)
    sentences = encoded(arguments.model)
    reference = embed(workers[0], sentences)
    for worker, row in zip(workers, rows, strict=True):
        row |= {name: f"{value:.4f}" for name, value in judge(worker, reference, sentences).items()}
        worker.close()
    fp32 = next((row["latency ms"] for row in rows if row["contender"] == "onnxruntime fp32"), None)
    if fp32:
        rows = [{**row, "times as fast as fp32": fp32 / row["latency ms"]} for row in rows]
    title = f"Encoders: {arguments.model}, {TOKENS} tokens, batch 1, {arguments.threads} threads"
    common.report(title, {"Speed, size, fidelity": rows}, arguments)


if __name__ == "__main__":
    main()

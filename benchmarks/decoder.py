"""Decoders side by side: llama.cpp, onnxruntime-genai and onnxpress's artifacts, in one run, taking turns.

    python benchmarks/decoder.py                                    builds the default artifact and `smallest`
    python benchmarks/decoder.py --artifact mine=DIR --text FILE    adds an artifact; measures quality on a text, too

All start from the weights in one GGUF, as float32. llama.cpp's files are made by its own quantizer; its package is
compiled for this CPU on first use (minutes). onnxruntime-genai runs what its own builder makes. Every
contender keeps its defaults, except for the number of threads. quantization.py has more contenders and models.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import common
import contenders
from common import MODEL, PEERS, Row, Worker
from contenders import Contender, Subject

WORKER = ("onnxpress_worker.py",)
PROMPT = 512
CONTEXTS = (16, 256, 512)
STEPS = 24
WINDOWS, WINDOW = 4, 512


def speed(worker: Worker, contexts: Sequence[int] = CONTEXTS) -> Mapping[str, list[float]]:
    """Seconds of a prompt, and of single tokens behind contexts."""
    generator = random.Random(0)
    tokens = [generator.randrange(1000, 4000) for _ in range(PROMPT + STEPS)]
    samples = {"prefill": [worker.ask("prefill", tokens=tokens[:PROMPT])["seconds"]]}
    for context in contexts:
        answer = worker.ask("decode", tokens=tokens[:context], following=tokens[:STEPS])
        samples[f"decode {context}"] = answer["seconds"]
    return samples


def speed_row(samples: Mapping[str, list[float]], contexts: Sequence[int] = CONTEXTS) -> Row:
    row: Row = {"prefill 512 tok/s": PROMPT / common.median(samples["prefill"])}
    for context in contexts:
        row[f"decode at {context} ms"] = 1e3 * common.median(samples[f"decode {context}"])
    return row


def race(workers: list[Worker], rounds: int, contexts: Sequence[int] = CONTEXTS) -> list[Row]:
    """Speed and peak memory of contenders that are loaded, by turns, after a round that is not counted."""
    work = partial(speed, contexts=contexts)
    for worker in workers:
        work(worker)  # caches filled, memory touched
    samples = common.in_turns(workers, rounds, work)
    rows = [{**worker.row, **speed_row(samples[worker.name], contexts)} for worker in workers]
    for worker, row in zip(workers, rows, strict=True):
        row["peak RSS MB"] = worker.ask("memory")["peak_rss_bytes"] / 1e6
        row["load s"] = worker.load_s
    return rows


def reference(model: str, text: Path, folder: Path, windows: int = WINDOWS) -> None:
    """The first windows of a text, and what the float32 model says to them, for `judge`."""
    checkpoint = common.checkpoint_folder(model)
    first = [checkpoint, text, "0", str(windows), str(WINDOW), folder / "tokens.json"]
    common.measured([sys.executable, PEERS / "quality.py", "tokens", *first])
    common.measured([sys.executable, PEERS / "quality.py", "reference", checkpoint, folder])


def judge(worker: Worker, folder: Path) -> Row:
    """Perplexity, its rise, KL divergence and top-1 agreement of a contender, reading the windows as prompts."""
    for number, window in enumerate(json.loads((folder / "tokens.json").read_text(encoding="utf-8"))):
        worker.ask("log_probabilities", tokens=window, path=str(folder / f"candidate-{number}.npy"))
    output = common.measured([sys.executable, PEERS / "quality.py", "compare", folder]).output
    row: Row = json.loads(output.splitlines()[-1])
    return row


def gguf(model: str = MODEL) -> str:
    """The GGUF among the sources of a catalog model."""
    return common.measured([sys.executable, PEERS / "find_gguf.py", model]).output.splitlines()[-1]


def chosen(subject: Subject, arguments: argparse.Namespace) -> list[Contender]:
    given = [item.partition("=") for item in arguments.artifact]
    theirs = [
        *contenders.llama_cpp(subject, arguments.find_links, ("Q4_0", "Q4_1", "Q4_K_M", "Q8_0")),
        *contenders.genai(subject, arguments.find_links, ("int4",)),
    ]
    ours = {
        contender.variant: contender
        for contender in (
            *contenders.onnxpress(subject, WORKER, {"default": "", "smallest": "-r smallest"}),
            *(contenders.artifact(name, Path(path), WORKER) for name, _, path in given),
        )
    }
    return [contender for contender in (*theirs, *ours.values()) if common.wanted(contender.name, arguments.only)]


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
    model = arguments.model or gguf()
    subject = Subject("decoder", model)
    workers = []
    for contender in chosen(subject, arguments):
        built = contender.built(subject, again=contender.family == "onnxpress")
        workers.append(contender.start(built, arguments.threads))
    rows = race(workers, arguments.repeats)
    tables = {"Speed and memory": rows, "Ratios": ratios(rows)}
    if arguments.text:
        with tempfile.TemporaryDirectory() as folder:
            reference(model, arguments.text, Path(folder))
            tables["Quality"] = [{"contender": worker.name, **judge(worker, Path(folder))} for worker in workers]
    for worker in workers:
        worker.close()
    common.report(f"Decoders: {Path(model).stem}, batch 1, {arguments.threads} threads", tables, arguments)


if __name__ == "__main__":
    main()

"""What masks buy: loss, and size as it is and compressed, in float32 and in 8-bit and 4-bit blocks, in which order.

    python benchmarks/sparsity.py --out DIR --text FILE
    python benchmarks/sparsity.py --out DIR --text FILE --include                   all products, not feed-forward alone
    python benchmarks/sparsity.py --out DIR --train-text FILE --subjects gpt        on a GPT that is trained here

Half of the weights become zero; methods, patterns and what follows are in sparsity.toml. Quantized models have their
embedding in 8 bits. Compressed sizes are by zstd at level 19 and gzip at 6, in an environment of its own, from
every eighth piece of large files (--pieces 1: from all). Figures go to DIR/figures.json, tables to DIR/sparsity.md.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tomllib
from functools import partial
from pathlib import Path
from typing import Any

import common
import contenders
import decoder
import subjects
from common import HERE, PEERS, Measured, Row, markdown
from comparison import FLOAT32, FORMATS, TITLES, show
from contenders import Contender, Subject
from figures import Figures, measure
from structure import ONNXSIM
from subjects import prepared

ZSTD = ["zstandard==0.25.0"]
FEED_FORWARD = ["*mlp*"]
EMBEDDING = ["quantize-embedding", {"bits": 8, "block_size": 32, "scale_type": "int8"}]
Passes = list[Any]


def blocks(bits: int) -> Passes:
    return [EMBEDDING, ["quantize-blocks", {"bits": bits, "block_size": 32}]]


def variants(include: list[str]) -> dict[str, tuple[Row, Passes]]:
    """By name: what the tables say of it, and its passes."""
    with (HERE / "sparsity.toml").open("rb") as file:
        given = tomllib.load(file)
    found: dict[str, tuple[Row, Passes]] = {}
    for name, options in given["masks"].items():
        prune = [["prune-weights", {**one, "include": include}] for one in options]
        for bits in given["formats"].get(name, [0]):
            row = {"mask": name, "bits": bits}
            found[f"{name}, {bits or 32} bits"] = row, prune + (blocks(bits) if bits else [])
        for bits in given["rounded"].get(name, []):
            row = {"mask": name, "bits": bits, "order": "rounded, then masked", "studied": True}
            found[f"{name} after {bits} bits"] = row, [["round", {"bits": bits, "include": include}], *prune]
            row = {"mask": name, "bits": bits, "order": "masked, then rounded", "studied": True}
            found[f"{name} before {bits} bits"] = row, [*prune, ["round", {"bits": bits, "include": include}]]
    for bits in sorted({bits for several in given["rounded"].values() for bits in several}):
        row = {"mask": "none", "bits": bits, "order": "only rounded", "studied": True}
        found[f"{bits} bits"] = row, [["round", {"bits": bits, "include": include}]]
    return found


def by_passes(subject: Subject, passes: Passes, folder: Path) -> Measured:
    source = contenders.export(subject).built(subject).path
    script = [sys.executable, PEERS / "apply_passes.py"]
    return common.measured([*script, source, folder / "artifact", "0", "0", json.dumps(passes)])


def by_onnxsim(subject: Subject, find_links: str | None, what: str, folder: Path) -> Measured:
    python = common.environment("onnxsim", ONNXSIM, find_links)
    source = contenders.export(subject).built(subject).path
    script = [python, PEERS / "onnxsim_cut.py", source, folder / "artifact", what, "0.5", str(subject.calibration)]
    return common.measured(script)


def chosen(subject: Subject, arguments: argparse.Namespace) -> dict[Contender, Row]:
    found: dict[Contender, Row] = {}
    place = {"opens": "artifact", "ships": "artifact/onnx/*"}
    for name, (row, passes) in variants(arguments.include).items():
        build = partial(by_passes, subject, passes)
        one = Contender("onnxpress", name, build, decoder.WORKER, key=json.dumps(passes), **place)
        found[one] = {**row, "by": "onnxpress"}
    if not arguments.include:  # onnxsim prunes all products
        for name, what in (("wanda", "zeros"), ("sparsegpt", "zeros-sparsegpt")):
            build = partial(by_onnxsim, subject, arguments.find_links, what)
            one = Contender("onnxsim", f"{name}, 32 bits", build, decoder.WORKER, key=what, **place)
            found[one] = {"mask": name, "bits": 0, "by": "onnxsim"}
    return {one: row for one, row in found.items() if common.wanted(one.name, arguments.only)}


def sizes(path: Path, bits: int, arguments: argparse.Namespace) -> Row:
    """Compressed megabytes, and of float32 models the share of zeros."""
    python = common.environment("zstandard", ZSTD, arguments.find_links)
    output = common.measured([python, PEERS / "compressed_size.py", path / "onnx", str(arguments.pieces)]).output
    found = json.loads(output.splitlines()[-1])
    row: Row = {"zstd MB": found["zstd"] / 1e6, "gzip MB": found["gzip"] / 1e6}
    if not bits:
        counts = json.loads(common.measured([sys.executable, PEERS / "count_zeros.py", path]).output.splitlines()[-1])
        row["zeros %"] = 100 * counts["zeros"] / counts["weights"]
    return row


def compare(subject: Subject, arguments: argparse.Namespace) -> None:
    found = chosen(subject, arguments)
    known = Figures(arguments.out).content.get("subjects", {}).get(subject.name, {})

    def describe(one: Contender) -> Row:
        row = found[one]
        if "studied" in row or (arguments.reuse and "zstd MB" in known.get(one.name, {})):
            return row
        return {**row, **sizes(one.built(subject).path, row["bits"], arguments)}

    measure(subject, list(found), arguments, describe)


def lines(rows: dict[str, Row], order: bool) -> list[Row]:
    """Of all formats with their sizes; or of the study of the order, in which weights stay float32."""
    result: list[Row] = []
    for row in rows.values():
        if row.get("failed") or ("studied" in row) is not order:
            continue
        line: Row = {"mask": row["mask"] if row.get("by") == "onnxpress" else f"{row['mask']} ({row['by']})"}
        line["bits"] = row["bits"] or 32
        if order:
            line["order"] = row["order"]
        for column in ("change %", "KL"):
            line[column] = format(row[column], FORMATS[column]) if column in row else None
        if "change %" in row:
            line["Δ log-perplexity"] = f"{math.log1p(row['change %'] / 100):.4f}"
        if not order:
            line["zeros %"] = row.get("zeros %")
            line["MB"] = row["bytes"] / 1e6
            for column in ("zstd MB", "gzip MB"):
                line[column] = row.get(column)
        result.append(line)
    return result


def tables(figures: dict[str, Any]) -> dict[str, str]:
    """Markdown by subject."""
    result = {}
    for subject, rows in figures.get("subjects", {}).items():
        given = {name: row for name, row in rows.items() if name != FLOAT32}
        parts = [markdown(part) for part in (lines(given, False), lines(given, True)) if part]
        if failed := [f"{name}: {row['failed']}" for name, row in given.items() if row.get("failed")]:
            parts.append("Not run: " + "; ".join(failed))
        result[TITLES[subject]] = "\n\n".join(parts)
    return result


def main() -> None:
    parser = subjects.parser(__doc__ or "")
    words = "patterns of weights to prune (default: feed-forward networks; with nothing behind it: all products)"
    parser.add_argument("--include", nargs="*", default=FEED_FORWARD, help=words)
    parser.add_argument("--pieces", type=int, default=8, help="compress every n-th 4 MB of large files (default 8)")
    arguments = parser.parse_args()
    arguments.do = [part for part in arguments.do if part != "speed"]  # masks change none
    for name in subjects.wanted(arguments, parser):
        if name != "encoder":
            compare(prepared(name, arguments), arguments)
    show(arguments, "sparsity", tables(Figures(arguments.out).content))


if __name__ == "__main__":
    main()

"""Smaller structure side by side: heads, width and depth cut to one size by us, by plain methods, by onnxsim.

    python benchmarks/structure.py --out DIR --text FILE --train-text FILE --pairs FILE
    python benchmarks/structure.py --out DIR … --do speed --subjects decoder     one part, into the same figures

Subjects and parts are those of quantization.py; what is cut and how is in structure.toml. Passes run with as many
samples as they want, of text that the decoder writes itself; "on text" they and onnxsim get the text behind the windows
that are judged (of the GPT: what it was trained on), and so do searches, which cut what they like. Encoders, and their
cosines and ranks, are judged on every other line of --pairs; what is fitted is fitted to sentences of the other lines.
Figures go to DIR/figures.json as they come, tables to DIR/structure.md.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import sys
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import common
import contenders
import decoder
import encoder
import subjects
from common import HERE, PEERS, Measured, Row, markdown
from comparison import FLOAT32, FORMATS, TITLES, show
from contenders import Contender, Subject
from figures import Figures, measure
from subjects import prepared

ONNXSIM = ["onnxsim==0.8.1", "onnx==1.23.2", "onnxruntime==1.31.1"]
SAMPLES = {"decoder": ("14", "512"), "gpt": ("32", "512"), "encoder": ("1500", "64")}
"""Rows of text and tokens in each; behind the windows of WikiText-2's usual excerpt there are not many more."""
WINDOWS = 36
"""Of text to fit to, at most: a few more than SAMPLES, as tokens change where windows begin."""
QUALITY = {"decoder": ["change %", "KL"], "encoder": ["cosine mean", "Spearman"]}
SPEED = ["prefill 512 tok/s", "decode at 256 ms", "latency ms"]


def by_passes(subject: Subject, text: Path | None, passes: list[Any], folder: Path) -> Measured:
    source = contenders.export(subject).built(subject).path
    given = [*SAMPLES[subject.name], json.dumps(passes), text] if text else ["0", "0", json.dumps(passes)]
    return common.measured([sys.executable, PEERS / "apply_passes.py", source, folder / "artifact", *given])


def by_search(subject: Subject, text: Path, like: Contender, folder: Path) -> Measured:
    """Cuts of any kind, block by block, to as many parameters as another contender has."""
    source = contenders.export(subject).built(subject).path
    most = str(parameters(like.built(subject).path))
    samples = ["--calibration-samples", SAMPLES[subject.name][0], "--calibration-length", SAMPLES[subject.name][1]]
    given = ["--recipe", "budget-structure", "--max-parameters", most, "--calibration", text, *samples]
    command = [sys.executable, "-m", "onnxpress.cli", "optimize", source, "--output", folder / "artifact"]
    return common.measured([*command, *given, "--no-benchmark"])


def fitting_text(subject: Subject, arguments: argparse.Namespace) -> Path:
    """What passes are calibrated with on text: none of it is judged."""
    if subject.name == "encoder":
        assert subject.text is not None  # see halved
        return subject.text
    source, first = arguments.train_text[0] if subject.name == "gpt" else arguments.text, 0
    if subject.name == "decoder":
        first = decoder.WINDOWS
    file = subject.folder / "fitting.json"
    window = [str(first), str(WINDOWS), str(decoder.WINDOW)]
    common.measured(
        [sys.executable, PEERS / "quality.py", "tokens", common.checkpoint_folder(subject.model), source, *window, file]
    )
    return file.with_suffix(".txt")


def halved(subject: Subject, pairs: Path) -> Subject:
    """An encoder judged on every other line of `pairs`, and what to fit to: sentences of the other lines alone."""
    with pairs.open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))
    judged, others = rows[::2], rows[1::2]
    seen = {sentence for row in judged for sentence in row[:2]}
    lines = [line for line in dict.fromkeys(line for row in others for line in row[:2]) if line not in seen]
    text, sentences = subject.folder / "fitting.txt", subject.folder / "judged.csv"
    text.write_text("\n".join(lines) + "\n", encoding="utf-8")
    with sentences.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(judged)
    calibration = subject.folder / "fitting.json"
    calibration.write_text(json.dumps(encoder.encoded(subject.model, str(text))[:128]), encoding="utf-8")
    return replace(subject, text=text, calibration=calibration, sentences=sentences)


def plainly(subject: Subject, what: str, folder: Path) -> Measured:
    source = contenders.export(subject).built(subject).path
    return common.measured([sys.executable, PEERS / "plain_cuts.py", source, folder / "artifact", *what.split()])


def by_onnxsim(subject: Subject, find_links: str | None, what: str, folder: Path) -> Measured:
    python = common.environment("onnxsim", ONNXSIM, find_links)
    source = contenders.export(subject).built(subject).path
    given = [str(subject.calibration) if word == "calibrated" else word for word in what.split()]
    return common.measured([python, PEERS / "onnxsim_cut.py", source, folder / "artifact", *given])


def cuts(subject: str) -> list[dict[str, Any]]:
    with (HERE / "structure.toml").open("rb") as file:
        return [cut for cut in tomllib.load(file)["cut"] if cut["subject"] == subject]


def contender(
    family: str, variant: str, build: Callable[[Path], Measured], worker: Sequence[str], how: list[Any]
) -> Contender:
    """What leaves an artifact; `how` is what else than the name decides what is built."""
    key = json.dumps(how)
    return Contender(family, variant, build, worker, opens="artifact", ships="artifact/onnx/*", key=key)


def chosen(subject: Subject, arguments: argparse.Namespace) -> dict[Contender, Row]:
    """Contenders, and what the table says of each before anything is measured."""
    worker = encoder.WORKER if subject.name == "encoder" else decoder.WORKER
    found: dict[Contender, Row] = {}
    base = contenders.export(subject)
    found[Contender(base.family, base.variant, base.build, worker, opens=base.opens, ships=base.ships)] = {}
    text = fitting_text(subject, arguments)
    for cut in cuts(subject.name):
        name, methods = cut["name"], dict[Contender, str]()
        for section in ("plain", "onnxsim", "onnxpress", "on_text"):
            family = "onnxpress" if section == "on_text" else section
            for method, how in cut.get(section, {}).items():
                fitted = text if section == "on_text" or subject.name == "encoder" else None
                if section == "on_text":
                    method += ", on text"
                if isinstance(how, list):
                    build = partial(by_passes, subject, fitted, how)
                elif family == "plain":
                    build = partial(plainly, subject, how)
                else:
                    build = partial(by_onnxsim, subject, arguments.find_links, how)
                methods[contender(family, f"{name}, {method}", build, worker, [how, str(fitted or "")])] = method
        if cut.get("search"):
            method = "search" if subject.name == "encoder" else "search, on text"
            build = partial(by_search, subject, text, next(iter(methods)))
            methods[contender("onnxpress", f"{name}, {method}", build, worker, ["search", str(text)])] = method
        found |= {one: {"cut": name, "method": method} for one, method in methods.items()}
    return {one: row for one, row in found.items() if common.wanted(one.name, arguments.only)}


def parameters(path: Path) -> int:
    """Numbers in all weights of the graphs."""
    output = common.measured([sys.executable, "-m", "onnxpress.cli", "inspect", path, "--json"]).output
    graphs = json.loads(output[output.index("{") :])["graphs"]
    return sum(int(graph["total"]["parameters"]) for graph in graphs.values())


def compare(subject: Subject, arguments: argparse.Namespace) -> None:
    found = chosen(subject, arguments)
    known = Figures(arguments.out).content.get("subjects", {}).get(subject.name, {})

    def describe(one: Contender) -> Row:
        if arguments.reuse and "parameters" in known.get(one.name, {}):
            return found[one]
        return {**found[one], "parameters": parameters(one.built(subject).path)}

    measure(subject, list(found), arguments, describe)


def damage(row: Row) -> float | None:
    """What the goal counts: the rise of log-perplexity, or what the mean cosine lacks to 1."""
    if "change %" in row:
        return math.log1p(row["change %"] / 100)
    return 1 - row["cosine mean"] if "cosine mean" in row else None


def table(subject: str, rows: dict[str, Row], cut: str) -> str:
    """All of one cut, least damage last; the damage of slicing, at its best, is what others are divided by."""
    same = {name: row for name, row in rows.items() if row.get("cut") == cut and not row.get("failed")}
    full = rows.get(FLOAT32, {}).get("parameters")
    slices = [found for row in same.values() if row["method"].startswith("slice") and (found := damage(row))]
    kind = "encoder" if subject == "encoder" else "decoder"
    lines: list[Row] = []
    for row in sorted(same.values(), key=lambda row: -(damage(row) or math.inf)):
        ours = row["family"] == "onnxpress"
        label = f"{row['family']} {row['method']}"
        line: Row = {"by": f"**{label}**" if ours else label}
        line["parameters, M"] = f"{row['parameters'] / 1e6:.2f}"
        line["fewer"] = f"{1 - row['parameters'] / full:.1%}" if full else None
        line["MB"] = row["bytes"] / 1e6
        for column in QUALITY[kind]:
            value = row.get(column)
            line[column] = value if value is None else format(value, FORMATS[column])
        lost = damage(row)
        line["Δ log-perplexity" if kind == "decoder" else "1 − cosine"] = None if lost is None else f"{lost:.4f}"
        line["slicing's ÷ this"] = f"{min(slices) / lost:.1f}" if slices and lost and lost > 0 else None
        for column in SPEED:
            if any(column in other for other in same.values()):
                line[column] = row.get(column)
        lines.append(line)
    return markdown(lines)


def tables(figures: dict[str, Any]) -> dict[str, str]:
    """Markdown by subject: a table for each cut, in the order of structure.toml."""
    result = {}
    for subject, rows in figures.get("subjects", {}).items():
        parts = []
        whole = rows.get(FLOAT32)
        if whole and "parameters" in whole:
            words = [f"Whole: {whole['parameters'] / 1e6:.2f} M parameters, {whole['bytes'] / 1e6:.1f} MB"]
            words += [
                f"{column} {whole[column]:.4g}" for column in ("perplexity", "Spearman", *SPEED) if column in whole
            ]
            parts.append(", ".join(words) + ".")
        order = [cut["name"] for cut in cuts(subject)]
        found = dict.fromkeys(row["cut"] for row in rows.values() if "cut" in row)
        for cut in sorted(found, key=lambda name: order.index(name) if name in order else len(order)):
            parts.append(f"**{cut}**\n\n{table(subject, rows, cut)}")
        if failed := [f"{name}: {row['failed']}" for name, row in rows.items() if row.get("failed")]:
            parts.append("Not run: " + "; ".join(failed))
        result[TITLES[subject]] = "\n\n".join(parts)
    return result


def main() -> None:
    parser = subjects.parser(__doc__ or "")
    arguments = parser.parse_args()
    for name in subjects.wanted(arguments, parser):
        subject = prepared(name, arguments)
        if name == "encoder":
            if arguments.pairs is None:
                parser.error("encoder needs --pairs")
            subject = halved(subject, arguments.pairs)
            arguments.pairs = subject.sentences
        compare(subject, arguments)
    show(arguments, "structure", tables(Figures(arguments.out).content))


if __name__ == "__main__":
    main()

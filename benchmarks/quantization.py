"""Quantized models side by side: size, loss, speed, memory and time to build, and who is on the frontier.

    python benchmarks/quantization.py --out DIR --text FILE --train-text FILE --pairs FILE
    python benchmarks/quantization.py --out DIR … --do speed --subjects decoder     one part, into the same figures

Subjects: `decoder` is SmolLM2-135M (judged on --text); `gpt` a small Llama trained here on --train-text, whose weights
never were in 4 bits, as SmolLM2's were (judged on a tenth that it was not trained on); `encoder` is MiniLM (judged by
cosines to torch, and by rank correlation on --pairs, a CSV of first, second, score).

Parts: `build` makes all contenders anew (with --reuse: those that are missing); `quality` runs one after the other and
does not mind a busy machine; `speed` has them take turns. Figures go to DIR/figures.json as they come, and each
run adds to them; DIR/quantization.md and DIR/SUBJECT.svg show all that are there.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import common
import contenders
import decoder
import encoder
import subjects
from common import PEERS
from comparison import show, tables
from contenders import Contender, Subject
from figures import Figures, measure
from subjects import named, prepared

PLOT = ["matplotlib==3.11.0"]
OURS = {
    "decoder": {
        "default": "",
        "cpu-blocks": "-r cpu-blocks",
        "smallest": "-r smallest",
        "as-stored": "-r as-stored",
        "cpu-prompts": "-r cpu-prompts",
        "1%": "--max-loss 1%",
        "1%, anew": "-r budget --max-loss 1%",
        "5%, anew": "-r budget --max-loss 5%",
    },
    "gpt": {
        "default": "",
        "cpu-blocks": "-r cpu-blocks",
        "smallest": "-r smallest",
        "1%": "--max-loss 1%",
        "5%": "--max-loss 5%",
    },
    "encoder": {
        "default": "",
        "cpu-blocks": "-r cpu-blocks",
        "smallest": "-r smallest",
        "static-encoder": "-r static-encoder",
        "0.2%": "--max-loss 0.2%",
        "0.2%, 23 MB": "--max-loss 0.2% --max-size 23MB",
        "1%": "--max-loss 1%",
    },
}


def chosen(subject: Subject, arguments: argparse.Namespace) -> list[Contender]:
    worker = encoder.WORKER if subject.name == "encoder" else decoder.WORKER
    found = contenders.onnxruntime_tools(subject, worker, contenders.ONNXRUNTIME_METHODS)
    if subject.name != "encoder":
        found += contenders.genai(subject, arguments.find_links)
        found += [contenders.olive(subject, arguments.find_links)]
        found += contenders.llama_cpp(subject, arguments.find_links)
    ours = OURS[subject.name] | named(subject, arguments.onnxpress)
    given = named(subject, arguments.artifact)
    found += contenders.onnxpress(subject, worker, {name: ours[name] for name in ours if name not in given})
    found += [contenders.artifact(name, Path(path), worker) for name, path in given.items()]
    return [contender for contender in found if common.wanted(contender.name, arguments.only)]


def measured(subject: Subject, arguments: argparse.Namespace) -> None:
    found = chosen(subject, arguments)
    float32 = contenders.export(subject)
    Figures(arguments.out).add(subject.name, float32, {"bytes": float32.built(subject).size_bytes})
    measure(subject, found, arguments)


def illustrate(arguments: argparse.Namespace) -> None:
    """Plots of all figures that are there; those of a page beside it."""
    python = common.environment("plot", PLOT, arguments.find_links)
    common.measured([python, PEERS / "plot_frontier.py", Figures(arguments.out).path, arguments.out])
    if arguments.page:
        images = arguments.page.parent / "images"
        images.mkdir(exist_ok=True)
        for plot in arguments.out.glob("*.svg"):
            shutil.copyfile(plot, images / f"quantization-{plot.name}")


def main() -> None:
    parser = subjects.parser(__doc__ or "")
    add = {"action": "append", "default": [], "metavar": "[SUBJECT:]NAME=…"}
    parser.add_argument("--onnxpress", **add, help="another artifact of ours, by options of `onnxpress build`")
    parser.add_argument("--artifact", **add, help="an artifact of ours that is there, by its folder")
    arguments = parser.parse_args()
    for name in subjects.wanted(arguments, parser):
        measured(prepared(name, arguments), arguments)
    illustrate(arguments)
    show(arguments, "quantization", tables(Figures(arguments.out).content))


if __name__ == "__main__":
    main()

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
import hashlib
import json
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import contenders
import decoder
import encoder
from common import CACHE, PEERS, Row, Worker
from comparison import page_with, tables
from contenders import Contender, Subject

SUBJECTS = ("decoder", "gpt", "encoder")
PARTS = ("build", "quality", "speed")
CONTEXTS = (256,)
CALIBRATION_WINDOWS, CALIBRATION_LENGTH = 8, 256
TRAINING_STEPS = 500
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


def calibrated(subject: Subject, text: Path, first: int) -> Subject:
    """With the windows of `text` from `first` on, as token ids and as text, for the peers that calibrate."""
    subject.folder.mkdir(parents=True, exist_ok=True)
    file = subject.folder / "calibration.json"
    arguments = [common.checkpoint_folder(subject.model), text, str(first), str(CALIBRATION_WINDOWS)]
    common.measured([sys.executable, PEERS / "quality.py", "tokens", *arguments, str(CALIBRATION_LENGTH), file])
    return Subject(subject.name, subject.model, file.with_suffix(".txt"), file)


def trained_gpt(texts: list[Path]) -> Path:
    """A checkpoint trained on `texts`; made once for each choice of them."""
    content = hashlib.sha256(b"".join(path.read_bytes() for path in texts)).hexdigest()[:8]
    folder = CACHE / "gpt" / f"{content}-{TRAINING_STEPS}"
    if not (folder / "held-out.txt").exists():
        print("training a GPT", file=sys.stderr)
        common.measured([sys.executable, PEERS / "train_gpt.py", folder, str(TRAINING_STEPS), *texts])
    return folder


def prepared(name: str, arguments: argparse.Namespace) -> Subject:
    if name == "decoder":
        measured = decoder.WINDOWS * decoder.WINDOW // CALIBRATION_LENGTH
        return calibrated(Subject(name, arguments.model or decoder.gguf()), arguments.text, measured)
    if name == "gpt":
        return calibrated(Subject(name, str(trained_gpt(arguments.train_text))), arguments.train_text[0], 0)
    subject = Subject(name, arguments.encoder)
    subject.folder.mkdir(parents=True, exist_ok=True)
    calibration = subject.folder / "calibration.json"
    sentences = encoder.encoded(subject.model, *([arguments.pairs] if arguments.pairs else []))
    calibration.write_text(json.dumps(sentences[:128]), encoding="utf-8")
    return Subject(name, subject.model, None, calibration)


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


def named(subject: Subject, options: list[str]) -> dict[str, str]:
    """From [SUBJECT:]NAME=VALUE, those that are meant for this subject."""
    result = {}
    for option in options:
        name, _, value = option.partition("=")
        place, _, rest = name.rpartition(":")
        if place in ("", subject.name):
            result[rest] = value
    return result


class Figures:
    """All figures of a folder: subject -> contender -> figure. Written as they come."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.path = folder, folder / "figures.json"
        self.content: dict[str, Any] = {}
        if self.path.exists():
            self.content = json.loads(self.path.read_text(encoding="utf-8"))

    def add(self, subject: str, contender: Contender | str, row: Row) -> None:
        name = contender if isinstance(contender, str) else contender.name
        known = self.content.setdefault("subjects", {}).setdefault(subject, {}).setdefault(name, {})
        if isinstance(contender, Contender):
            known["family"] = contender.family
        known |= row
        self.content["machine"] = common.machine()
        self.path.write_text(json.dumps(self.content, indent=1) + "\n", encoding="utf-8")

    def attempt(self, subject: Subject, contender: Contender, work: Callable[[], Row]) -> bool:
        """Add what `work` finds, or why it failed. Contenders that fail do not stop the others."""
        try:
            row = work()
        except RuntimeError as error:
            lines = [line for line in str(error).splitlines() if line.strip()]
            print(f"{contender.name} failed: {error}", file=sys.stderr)
            self.add(subject.name, contender, {"failed": lines[-1][:200] if lines else "no message"})
            return False
        self.add(subject.name, contender, {**row, "failed": None})
        return True


def build(subject: Subject, contender: Contender, *, again: bool) -> Row:
    built = contender.built(subject, again=again)
    row: Row = {"bytes": built.size_bytes}
    if built.seconds:
        row["build s"] = built.seconds
    if built.peak_rss_bytes:
        row["build RSS MB"] = built.peak_rss_bytes / 1e6
    return row


def judges(subject: Subject, folder: Path, arguments: argparse.Namespace) -> Callable[[Worker], Row]:
    """What measures a loaded contender of this subject."""
    if subject.name == "encoder":
        torch = encoder.torch_worker(subject.model, arguments.threads)
        sentences = encoder.encoded(subject.model)
        reference = encoder.embed(torch, sentences)
        pairs = encoder.read_pairs(subject.model, arguments.pairs) if arguments.pairs else None
        row = {"Spearman": encoder.spearman(torch, pairs)} if pairs else {}
        Figures(arguments.out).add(
            subject.name, "torch", {"family": "torch", "cosine mean": 1.0, "cosine min": 1.0, **row}
        )
        torch.close()

        def encodes(worker: Worker) -> Row:
            row = encoder.judge(worker, reference, sentences)
            return {**row, "Spearman": encoder.spearman(worker, pairs)} if pairs else row

        return encodes
    text = arguments.text if subject.name == "decoder" else Path(subject.model) / "held-out.txt"
    decoder.reference(subject.model, text, folder, windows=decoder.WINDOWS if subject.name == "decoder" else 16)
    return lambda worker: decoder.judge(worker, folder)


def measure(subject: Subject, arguments: argparse.Namespace) -> None:
    found = chosen(subject, arguments)
    figures = Figures(arguments.out)
    float32 = contenders.export(subject)
    figures.add(subject.name, float32, {"bytes": float32.built(subject).size_bytes})
    again = "build" in arguments.do and not arguments.reuse
    found = [one for one in found if figures.attempt(subject, one, lambda one=one: build(subject, one, again=again))]

    def start(contender: Contender) -> Worker:
        return contender.start(contender.built(subject), arguments.threads)

    if "quality" in arguments.do:
        with tempfile.TemporaryDirectory() as folder:
            judge = judges(subject, Path(folder), arguments)

            def judged(contender: Contender) -> Row:
                print(f"quality of {subject.name}: {contender.name}", file=sys.stderr)
                worker = start(contender)
                try:
                    return judge(worker)
                finally:
                    worker.close()

            figures = Figures(arguments.out)
            for one in found:
                figures.attempt(subject, one, lambda one=one: judged(one))
    if "speed" in arguments.do and subject.name != "gpt":
        loaded: dict[str, Worker] = {}

        def load(contender: Contender) -> Row:
            loaded[contender.name] = start(contender)
            return {}

        found = [one for one in found if figures.attempt(subject, one, lambda one=one: load(one))]
        workers = list(loaded.values())
        if subject.name == "encoder":
            rows = encoder.race(workers, arguments.repeats)
        else:
            rows = decoder.race(workers, arguments.repeats, CONTEXTS)
        for one, row in zip(found, rows, strict=True):
            figures.add(subject.name, one, {key: row[key] for key in row if key not in ("contender", "MB")})
        for worker in workers:
            worker.close()


def show(arguments: argparse.Namespace) -> None:
    """Tables and plots of all figures that are there."""
    figures = Figures(arguments.out)
    python = common.environment("plot", PLOT, arguments.find_links)
    common.measured([python, PEERS / "plot_frontier.py", figures.path, arguments.out])
    text = tables(figures.content)
    page = "\n\n".join(f"## {name}\n\n{table}" for name, table in text.items())
    (arguments.out / "quantization.md").write_text(page + "\n", encoding="utf-8")
    print(page)
    if arguments.page:
        images = arguments.page.parent / "images"
        images.mkdir(exist_ok=True)
        for plot in arguments.out.glob("*.svg"):
            shutil.copyfile(plot, images / f"quantization-{plot.name}")
        arguments.page.write_text(page_with(arguments.page.read_text(encoding="utf-8"), text), encoding="utf-8")


def main() -> None:
    parser = common.parser(__doc__ or "")
    parser.add_argument("--out", type=Path, required=True, help="folder for figures, tables and plots")
    parser.add_argument("--do", nargs="*", choices=PARTS, default=list(PARTS), help="which parts (default: all)")
    parser.add_argument("--subjects", nargs="+", choices=SUBJECTS, help="default: those whose data are given")
    parser.add_argument("--reuse", action="store_true", help="build only what is not in the cache")
    parser.add_argument("--text", type=Path, help="what decoders are judged on")
    parser.add_argument("--train-text", type=Path, nargs="+", help="what the GPT is trained on; megabytes of it")
    parser.add_argument("--pairs", type=Path, help="scored pairs for the encoder: CSV of first, second, score")
    parser.add_argument("--model", help=f"the decoder: a .gguf of any format (default: that of {common.MODEL})")
    parser.add_argument("--encoder", default="all-minilm-l6-v2", help="the encoder, however it is named")
    add = {"action": "append", "default": [], "metavar": "[SUBJECT:]NAME=…"}
    parser.add_argument("--onnxpress", **add, help="another artifact of ours, by options of `onnxpress build`")
    parser.add_argument("--artifact", **add, help="an artifact of ours that is there, by its folder")
    parser.add_argument("--page", type=Path, help="put tables and plots into this page, too")
    arguments = parser.parse_args()
    given = {"decoder": arguments.text, "gpt": arguments.train_text, "encoder": True}
    for name in arguments.subjects or [name for name in SUBJECTS if given[name]]:
        if not given[name]:
            parser.error(f"{name} needs {'--text' if name == 'decoder' else '--train-text'}")
        if arguments.do:
            measure(prepared(name, arguments), arguments)
    show(arguments)


if __name__ == "__main__":
    main()

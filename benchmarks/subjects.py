"""The three models that are compressed by benchmarks, what they are judged on, and the options that say so.

`decoder` is SmolLM2-135M (judged on --text); `gpt` a small Llama trained here on --train-text (judged on a tenth that
it was not trained on); `encoder` is MiniLM (judged by cosines to torch, and by rank correlation on --pairs, a CSV of
first, second, score).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path

import common
import decoder
import encoder
from common import CACHE, PEERS, Row, Worker
from contenders import Subject

SUBJECTS = ("decoder", "gpt", "encoder")
PARTS = ("build", "quality", "speed")
CALIBRATION_WINDOWS, CALIBRATION_LENGTH = 8, 256
TRAINING_STEPS = 500


def parser(description: str) -> argparse.ArgumentParser:
    """With the options of all benchmarks that compress these subjects."""
    result = common.parser(description)
    result.add_argument("--out", type=Path, required=True, help="folder for figures, tables and plots")
    result.add_argument("--do", nargs="*", choices=PARTS, default=list(PARTS), help="which parts (default: all)")
    result.add_argument("--subjects", nargs="+", choices=SUBJECTS, help="default: those whose data are given")
    result.add_argument("--reuse", action="store_true", help="build only what is not in the cache")
    result.add_argument("--text", type=Path, help="what decoders are judged on")
    result.add_argument("--train-text", type=Path, nargs="+", help="what the GPT is trained on; megabytes of it")
    result.add_argument("--pairs", type=Path, help="scored pairs for the encoder: CSV of first, second, score")
    result.add_argument("--model", help=f"the decoder: a .gguf of any format (default: that of {common.MODEL})")
    result.add_argument("--encoder", default="all-minilm-l6-v2", help="the encoder, however it is named")
    result.add_argument("--page", type=Path, help="put tables and plots into this page, too")
    return result


def wanted(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> list[str]:
    """The subjects to measure: those asked for, or those whose data are given."""
    given = {"decoder": arguments.text, "gpt": arguments.train_text, "encoder": True}
    names = arguments.subjects or [name for name in SUBJECTS if given[name]]
    for name in names:
        if not given[name]:
            parser.error(f"{name} needs {'--text' if name == 'decoder' else '--train-text'}")
    return names if arguments.do else []


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


def named(subject: Subject, options: list[str]) -> dict[str, str]:
    """From [SUBJECT:]NAME=VALUE, those that are meant for this subject."""
    result = {}
    for option in options:
        name, _, value = option.partition("=")
        place, _, rest = name.rpartition(":")
        if place in ("", subject.name):
            result[rest] = value
    return result


def judges(
    subject: Subject, folder: Path, arguments: argparse.Namespace, known: Row
) -> tuple[Row, Callable[[Worker], Row]]:
    """The row of torch, where there is one, and what measures a loaded contender of this subject.

    known: what an earlier run found of torch, whose ranks take minutes.
    """
    if subject.name == "encoder":
        torch = encoder.torch_worker(subject.model, arguments.threads)
        sentences = encoder.encoded(subject.model, *([str(subject.sentences)] if subject.sentences else []))
        reference = encoder.embed(torch, sentences)
        pairs = encoder.read_pairs(subject.model, arguments.pairs) if arguments.pairs else None
        row: Row = {"family": "torch", "cosine mean": 1.0, "cosine min": 1.0}
        if pairs:
            row["Spearman"] = known["Spearman"] if "Spearman" in known else encoder.spearman(torch, pairs)
        torch.close()

        def encodes(worker: Worker) -> Row:
            found = encoder.judge(worker, reference, sentences)
            return {**found, "Spearman": encoder.spearman(worker, pairs)} if pairs else found

        return row, encodes
    text = arguments.text if subject.name == "decoder" else Path(subject.model) / "held-out.txt"
    decoder.reference(subject.model, text, folder, windows=decoder.WINDOWS if subject.name == "decoder" else 16)
    return {}, lambda worker: decoder.judge(worker, folder)

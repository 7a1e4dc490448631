"""Quality of a contender on windows of a text, against the checkpoint in torch. Runs in onnxpress's environment.

quality.py tokens CHECKPOINT TEXT FIRST WINDOWS LENGTH FILE   writes windows from FIRST on: token ids as JSON, and text
quality.py reference CHECKPOINT FOLDER                        reads FOLDER/tokens.json, writes FOLDER/reference-{i}.npy
quality.py compare FOLDER                                     reads FOLDER/candidate-{i}.npy; prints one line of JSON

Arrays are log-probabilities, float32 [LENGTH, vocabulary].
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np


def tokens(checkpoint: Path, text: Path, first: int, windows: int, length: int, file: Path) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    ids = tokenizer.encode(text.read_text(encoding="utf-8")).ids
    starts = range(first * length, min((first + windows) * length, len(ids) - length + 1), length)
    if not starts:
        raise SystemExit(f"{text} has {len(ids)} tokens, too few for window {first} of {length}")
    file.write_text(json.dumps([ids[start : start + length] for start in starts]), encoding="utf-8")
    chosen = tokenizer.decode(ids[starts[0] : starts[-1] + length])
    file.with_suffix(".txt").write_text(chosen, encoding="utf-8")


def reference(checkpoint: Path, folder: Path) -> None:
    from onnxpress.exporter.reference import TorchReference

    model = TorchReference(checkpoint)
    for number, window in enumerate(json.loads((folder / "tokens.json").read_text(encoding="utf-8"))):
        logits = model.prefill(np.array([window]))[0]
        logits = logits - logits.max(-1, keepdims=True)
        np.save(folder / f"reference-{number}.npy", logits - np.log(np.exp(logits).sum(-1, keepdims=True)))


def compare(folder: Path) -> dict[str, float]:
    """Perplexity of the candidate and of the reference, mean KL(reference || candidate) in nats, top-1 agreement."""
    windows = json.loads((folder / "tokens.json").read_text(encoding="utf-8"))
    losses, reference_losses, divergences, agreements = [], [], [], []
    for number, window in enumerate(windows):
        expected = np.load(folder / f"reference-{number}.npy")
        found = np.load(folder / f"candidate-{number}.npy")
        steps, following = np.arange(len(window) - 1), np.array(window[1:])
        losses.append(-found[steps, following])
        reference_losses.append(-expected[steps, following])
        divergences.append((np.exp(expected) * (expected - found)).sum(-1))
        agreements.append(expected.argmax(-1) == found.argmax(-1))
    perplexity, base = (float(np.exp(np.concatenate(part).mean())) for part in (losses, reference_losses))
    return {
        "perplexity": perplexity,
        "change %": 100 * (perplexity / base - 1),
        "KL": float(np.concatenate(divergences).mean()),
        "top-1 %": 100 * float(np.concatenate(agreements).mean()),
    }


def main() -> None:
    task, *arguments = sys.argv[1:]
    if task == "tokens":
        checkpoint, text, first, windows, length, file = arguments
        tokens(Path(checkpoint), Path(text), int(first), int(windows), int(length), Path(file))
    elif task == "reference":
        reference(Path(arguments[0]), Path(arguments[1]))
    else:
        print(json.dumps(compare(Path(arguments[0]))))


if __name__ == "__main__":
    main()

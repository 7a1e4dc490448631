"""Quality of a contender on windows of a text, against the checkpoint in torch. Runs in onnxpress's environment.

quality.py reference CHECKPOINT TEXT WINDOWS LENGTH FOLDER   writes FOLDER/tokens.json and FOLDER/reference-{i}.npy
quality.py compare FOLDER                                    reads FOLDER/candidate-{i}.npy; prints one line of JSON

Arrays are log-probabilities, float32 [LENGTH, vocabulary].
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np


def reference(checkpoint: Path, text: Path, windows: int, length: int, folder: Path) -> None:
    from tokenizers import Tokenizer

    from onnxpress.exporter.reference import TorchReference

    ids = Tokenizer.from_file(str(checkpoint / "tokenizer.json")).encode(text.read_text(encoding="utf-8")).ids
    chosen = [ids[i * length : (i + 1) * length] for i in range(windows) if len(ids) >= (i + 1) * length]
    (folder / "tokens.json").write_text(json.dumps(chosen), encoding="utf-8")
    model = TorchReference(checkpoint)
    for number, window in enumerate(chosen):
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


if __name__ == "__main__":
    if sys.argv[1] == "reference":
        reference(Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5]), Path(sys.argv[6]))
    else:
        print(json.dumps(compare(Path(sys.argv[2]))))

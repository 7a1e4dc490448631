"""What a smaller vocabulary costs on a text, and where. ARTIFACT TEXT N...; prints JSON, a list of rows.

N tokens stay, those that trim-vocabulary keeps. Each window of the text is read with the whole tokenizer and the
trimmed one, in the model's own softmax and in that of the kept tokens, and the nats of the same characters are
compared: of words that both spell alike, and of words that the trimmed tokenizer spells in more parts.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from onnxpress.evaluation.opening import open_model
from onnxpress.vocabulary.choosing import kept_tokens
from onnxpress.vocabulary.rewriting import trimmed
from onnxpress.vocabulary.tokens import read_vocabulary

LENGTH = 255
Numbers = NDArray[np.float64]


def nats(logits: NDArray[np.float32], ids: list[int], kept: NDArray[np.int64] | None) -> Numbers:
    """- log p of each id behind the ones before it, among `kept`."""
    scores = logits.astype(np.float64) if kept is None else logits[:, kept].astype(np.float64)
    top = scores.max(-1)
    total = top + np.log(np.exp(scores - top[:, None]).sum(-1))
    return np.asarray(total - logits[np.arange(len(ids)), ids])


def by_word(offsets: list[tuple[int, int]], values: Numbers, ends: list[int]) -> Numbers:
    """Sums over tokens between characters where both tokenizers have an end."""
    places = np.searchsorted(ends, [end for _, end in offsets])
    return np.asarray(np.bincount(places, values, len(ends)))


def main() -> None:
    folder, text = Path(sys.argv[1]), Path(sys.argv[2]).read_text(encoding="utf-8")
    sizes = [int(word) for word in sys.argv[3:]]
    opened = open_model(folder)
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    whole = Tokenizer.from_str(json.dumps(content))
    vocabulary = read_vocabulary(content)
    kept = {size: kept_tokens(vocabulary, tokens=size, required=opened.starts) for size in sizes}
    readers = {size: Tokenizer.from_str(json.dumps(trimmed(content, kept[size]))) for size in sizes}

    def read(ids: list[int]) -> NDArray[np.float32]:
        row = np.array([[opened.starts[0], *ids]], np.int64)
        return np.asarray(opened.model.prefill(row)[0, :-1])

    everything = whole.encode(text, add_special_tokens=False).ids
    found: dict[int, dict[str, float]] = {
        size: {"alike": 0.0, "split": 0.0, "words split": 0, "more tokens": 0} for size in sizes
    }
    total = tokens = 0.0
    for start in range(0, len(everything), LENGTH):
        piece = whole.decode(everything[start : start + LENGTH])
        one = whole.encode(piece, add_special_tokens=False)
        logits = read(one.ids)
        before = nats(logits, one.ids, None)
        total, tokens = total + float(before.sum()), tokens + len(one.ids)
        for size in sizes:
            other = readers[size].encode(piece, add_special_tokens=False)
            ids = kept[size][np.array(other.ids)].tolist()
            after = nats(logits if ids == one.ids else read(ids), ids, kept[size])
            ends = sorted({end for _, end in one.offsets} & {end for _, end in other.offsets})
            change = by_word(other.offsets, after, ends) - by_word(one.offsets, before, ends)
            counts = [by_word(side.offsets, np.ones(len(side.ids)), ends) for side in (other, one)]
            split = counts[0] != counts[1]
            row = found[size]
            row["alike"] += float(change[~split].sum())
            row["split"] += float(change[split].sum())
            row["words split"] += int(split.sum())
            row["more tokens"] += len(other.ids) - len(one.ids)
    rows: list[dict[str, Any]] = []
    for size, row in found.items():
        change = (row["alike"] + row["split"]) / tokens
        rows.append(
            {
                "tokens": size,
                "words split": row["words split"],
                "more tokens %": 100 * row["more tokens"] / tokens,
                "nats a split word": row["split"] / row["words split"] if row["words split"] else None,
                "change by split words %": 100 * float(np.expm1(row["split"] / tokens)),
                "change by others %": 100 * float(np.expm1(row["alike"] / tokens)),
                "change %": 100 * float(np.expm1(change)),
                "bits a character, more": change * tokens / len(text) / np.log(2),
                "bits a character before": total / len(text) / np.log(2),
                "text tokens": int(tokens),
            }
        )
    print(json.dumps(rows))


if __name__ == "__main__":
    main()

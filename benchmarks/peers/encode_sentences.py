"""Sentences as token ids without padding. usage: encode_sentences.py CHECKPOINT FILE [SENTENCES]

FILE gets JSON, a list each: onnxpress's own sentences, the lines of SENTENCES, or, of a .csv (first, second, score),
all first sentences and then all second ones. Runs in onnxpress's environment.
"""

from __future__ import annotations

import csv
import json
import sys
from importlib.resources import files
from pathlib import Path

from tokenizers import Tokenizer

LENGTH = 128


def main() -> None:
    tokenizer = Tokenizer.from_file(str(Path(sys.argv[1]) / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(LENGTH)
    if len(sys.argv) > 3 and not sys.argv[3].endswith(".csv"):
        lines = Path(sys.argv[3]).read_text(encoding="utf-8").splitlines()
    elif len(sys.argv) > 3:
        with Path(sys.argv[3]).open(encoding="utf-8", newline="") as file:
            rows = list(csv.reader(file))
        lines = [row[0] for row in rows] + [row[1] for row in rows]
    else:
        text = (files("onnxpress.evaluation") / "sentences.txt").read_text(encoding="utf-8")
        lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    Path(sys.argv[2]).write_text(json.dumps([tokenizer.encode(line).ids for line in lines]), encoding="utf-8")


if __name__ == "__main__":
    main()

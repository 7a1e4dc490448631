"""How far a vocabulary can shrink on a text, and what it costs where: words that have to be spelled in more parts.

    python benchmarks/vocabulary.py --text FILE [--tokens 48000 46000 …]

Losses are per token of the whole tokenizer and of the whole text, every vocabulary reading it in its own way.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import common
import contenders
from common import MODEL, PEERS
from contenders import Subject

TOKENS = (48000, 47000, 46000, 44000, 40000, 30000)


def main() -> None:
    parser = common.parser(__doc__ or "")
    parser.add_argument("--model", default=MODEL, help="a decoder, however it is named")
    parser.add_argument("--artifact", type=Path, help="its float32 graph, if it is there")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS, help="sizes of the vocabulary")
    arguments = parser.parse_args()
    subject = Subject("decoder", arguments.model)
    source = arguments.artifact or contenders.export(subject).built(subject).path
    script = [sys.executable, PEERS / "vocabulary_loss.py", source, arguments.text]
    rows = json.loads(common.measured([*script, *map(str, arguments.tokens)]).output.splitlines()[-1])
    common.report(f"Vocabulary of {arguments.model}", {"Loss on the text": rows}, arguments)


if __name__ == "__main__":
    main()

"""Embeddings of the artifact in transformers.js are those of our runner."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

HERE = Path(__file__).parent
TEXTS = ["A man is playing a guitar.", "The stock market fell by three percent on Tuesday, its worst day this year."]


@pytest.mark.client
@pytest.mark.slow
def test_minilm_in_transformers_js(node: Callable[..., str], minilm: Path) -> None:
    from tokenizers import Tokenizer

    from onnxpress.runtime.sessions import EncoderSession

    tokenizer = Tokenizer.from_file(str(minilm / "tokenizer.json"))
    session = EncoderSession(next((minilm / "onnx").glob("*.onnx")))
    answer = node(HERE / "clients.mjs", "embed", str(minilm.parent), minilm.name, json.dumps({"texts": TEXTS}))
    ours = []
    for text in TEXTS:
        tokenizer.no_padding()
        ids = np.array([tokenizer.encode(text).ids])
        vector = session.embed(ids)[0]
        ours.append(vector / np.linalg.norm(vector))
    cosines = (np.array(ours) * np.array(json.loads(answer.splitlines()[-1]))).sum(-1)
    # Dynamic quantization scales activations over the whole tensor, padding included, so rows move a little.
    assert cosines.min() > 0.995

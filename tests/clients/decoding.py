"""Greedy decoding by our own runner and by others: all write the same tokens."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onnxpress.runtime.decoder import DecoderSession

HERE = Path(__file__).parent
STEPS = 16
END = 2
PROMPTS = [[1, 40, 77, 130, 5], [1, 9, 200, 31, 64, 64, 90, 250, 12], [1, 17]]
"""For the tiny llama; of different lengths, so that a batch of them is padded."""

Clients = dict[str, Callable[[Path, list[list[int]]], list[list[int]]]]


def golden_tokens(folder: Path, prompts: list[list[int]]) -> list[list[int]]:
    """What our own runner generates for each prompt alone, greedily."""
    session = DecoderSession(next((folder / "onnx").glob("*.onnx")))
    answers = []
    for prompt in prompts:
        logits = session.prefill(np.array([prompt]))
        answer = [int(logits[0, -1].argmax())]
        while len(answer) < STEPS:
            answer.append(int(session.decode(np.array([answer[-1:]]))[0, -1].argmax()))
        answers.append(answer)
    return answers


def until_end(tokens: list[int]) -> list[int]:
    """Up to the end token: what comes after it differs between clients (some stop, some pad)."""
    return tokens[: tokens.index(END)] if END in tokens else tokens


def plain_onnxruntime(folder: Path, prompts: list[list[int]]) -> list[list[int]]:
    command = [
        sys.executable,
        str(HERE / "plain_onnxruntime.py"),
        str(folder),
        json.dumps({"prompts": prompts, "steps": STEPS}),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    rows: list[list[int]] = json.loads(done.stdout)
    return rows


def genai(folder: Path, prompts: list[list[int]]) -> list[list[int]]:
    """onnxruntime-genai pads on the right, with the token that genai_config.json names."""
    og: Any = pytest.importorskip("onnxruntime_genai", reason="pip install onnxpress[clients]")
    model = og.Model(str(folder))
    length = max(map(len, prompts))
    pad = json.loads((folder / "genai_config.json").read_text())["model"]["pad_token_id"]
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(do_sample=False, max_length=length + STEPS, batch_size=len(prompts))
    generator = og.Generator(model, parameters)
    generator.append_tokens(np.array([prompt + [pad] * (length - len(prompt)) for prompt in prompts], np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    return [[int(token) for token in generator.get_sequence(row)[length:]] for row in range(len(prompts))]


CLIENTS = ("onnxruntime", "onnxruntime-genai", "onnxruntime-node", "transformers.js")


def check(client: Callable[..., list[list[int]]], folder: Path, prompts: list[list[int]]) -> None:
    expected = [until_end(row) for row in golden_tokens(folder, prompts)]
    assert any(len(row) > STEPS // 2 for row in expected), "these prompts end at once and prove nothing"
    assert [until_end(row) for row in client(folder, prompts)] == expected

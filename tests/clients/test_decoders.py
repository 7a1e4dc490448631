"""Every client generates the tokens that our own runner generates, from the same folder, unmodified."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from .decoding import CLIENTS, PROMPTS, Clients, check


@pytest.mark.client
@pytest.mark.parametrize("name", CLIENTS)
@pytest.mark.parametrize("kind", ["fp32", "8-bit", "4-bit"])
def test_one_row(clients: Clients, tiny: Callable[[str], Path], kind: str, name: str) -> None:
    check(clients[name], tiny(kind), PROMPTS[:1])


@pytest.mark.client
@pytest.mark.parametrize("name", CLIENTS)
def test_a_padded_batch_gives_the_tokens_of_its_rows_alone(
    clients: Clients, tiny: Callable[[str], Path], name: str
) -> None:
    check(clients[name], tiny("fp32"), PROMPTS)


@pytest.mark.client
@pytest.mark.slow
@pytest.mark.parametrize("name", CLIENTS)
@pytest.mark.parametrize("kind", ["fp32", "8-bit", "4-bit"])
def test_smollm2(clients: Clients, smollm2: Callable[[str], Path], kind: str, name: str) -> None:
    folder = smollm2(kind)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    texts = ["The capital of France is", "Once upon a time, in a small village by the sea, there lived"]
    prompts = [tokenizer.encode(text).ids for text in texts]
    check(clients[name], folder, prompts if kind == "fp32" else prompts[1:])

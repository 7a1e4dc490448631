"""Small tokenizers of each kind, trained on a few sentences."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

SENTENCES = [
    "The quick brown fox jumps over the lazy dog, and the dog does not mind at all.",
    "She sells sea shells on the sea shore; the shells that she sells are surely sea shells.",
    "Numbers such as 1984, 2001 and 3.14159 appear in text, as do (brackets) and “quotes”.",
    "Der schnelle braune Fuchs springt über den faulen Hund, und der Hund schläft weiter.",
    "Быстрая коричневая лиса прыгает через ленивую собаку, а собака спит и спит.",
    "Η γρήγορη καφέ αλεπού πηδάει πάνω από το τεμπέλικο σκυλί.",
    "敏捷的棕色狐狸跳过了懒狗。 素早い茶色の狐がのろまな犬を飛び越える。",
    "Emoji 🦊🐶 — dashes – and ellipses … are everywhere.",
]
SPECIAL = ["<unk>", "<s>", "</s>", "<pad>"]


def train(kind: str) -> dict[str, Any]:
    """A tokenizer.json: `byte-level`, `byte-fallback` (as Llama 2's), `wordpiece` (BERT's) or `unigram` (T5's)."""
    text = SENTENCES * 8
    if kind == "byte-level":
        tokenizer = tokenizers.Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer: Any = trainers.BpeTrainer(
            vocab_size=600, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
        )
    elif kind == "byte-fallback":
        tokenizer = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        fallback = [f"<0x{byte:02X}>" for byte in range(256)]
        trainer = trainers.BpeTrainer(vocab_size=800, special_tokens=SPECIAL + fallback, show_progress=False)
    elif kind == "wordpiece":
        tokenizer = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = decoders.WordPiece()
        names = ["[PAD]", *(f"[unused{i}]" for i in range(20)), "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
        trainer = trainers.WordPieceTrainer(vocab_size=500, special_tokens=names, show_progress=False)
    else:
        tokenizer = tokenizers.Tokenizer(models.Unigram())
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Metaspace()
        trainer = trainers.UnigramTrainer(
            vocab_size=300, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
        )
    tokenizer.train_from_iterator(text, trainer)
    if kind == "wordpiece":
        places = {name: tokenizer.token_to_id(name) for name in ("[CLS]", "[SEP]")}
        tokenizer.post_processor = processors.BertProcessing(("[SEP]", places["[SEP]"]), ("[CLS]", places["[CLS]"]))
    elif kind != "byte-level":
        name = "</s>"
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"$A {name}", pair=f"$A $B {name}", special_tokens=[(name, tokenizer.token_to_id(name))]
        )
    content: dict[str, Any] = json.loads(tokenizer.to_str())
    content["added_tokens"] = [
        one for one in content["added_tokens"] if not one["content"].startswith(("<0x", "[unused"))
    ]
    return content


KINDS = ("byte-level", "byte-fallback", "wordpiece", "unigram")


@pytest.fixture(scope="session")
def trained() -> Callable[[str], dict[str, Any]]:
    return cache(train)


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def content(kind: str, trained: Callable[[str], dict[str, Any]]) -> dict[str, Any]:
    return trained(kind)


def load(content: dict[str, Any]) -> Any:
    return tokenizers.Tokenizer.from_str(json.dumps(content))


def count(content: dict[str, Any], texts: Iterable[str]) -> dict[int, int]:
    """How often the texts use each token."""
    tokenizer, found = load(content), dict[int, int]()
    for text in texts:
        for number in tokenizer.encode(text, add_special_tokens=False).ids:
            found[number] = found.get(number, 0) + 1
    return found

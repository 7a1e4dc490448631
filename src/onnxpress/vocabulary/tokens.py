"""A tokenizer.json as a table of tokens: what each is in text, and which others it needs to come about."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any

from onnxpress.errors import UnsupportedModelError
from onnxpress.vocabulary.characters import BytesOf

KINDS = ("BPE", "WordPiece", "Unigram")
SPACE = "▁"
"""What SentencePiece writes in the place of a space."""
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_UNUSED = re.compile(r"\[unused\d+\]")
"""Entries of BERT's vocabulary that no text leads to."""


def byte_characters() -> dict[str, int]:
    """The byte that each character of a byte-level vocabulary stands for (Radford et al. 2019, GPT-2): bytes that print
    as themselves in Latin-1, and the characters from 256 on for the others, in order."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(plain)]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTES = byte_characters()


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of a tokenizer.json."""

    kind: str
    """BPE, WordPiece or Unigram."""
    ids: Mapping[str, int]
    """Ids of the model's own tokens."""
    added: Mapping[str, int]
    """Ids of those that are found in text before the model sees it, special ones among them."""
    named: frozenset[int]
    """Ids that the rest of the file refers to: the unknown token, those of templates, padding."""
    byte_level: bool = False
    byte_fallback: bool = False
    ranks: Mapping[tuple[str, str], int] = field(default_factory=dict)
    """Ranks of a BPE's merges."""
    prefix: str = ""
    """The prefix of a WordPiece that continues a word."""
    suffix: str = ""
    """The suffix of a BPE's token that ends a word."""
    scores: Mapping[int, float] = field(default_factory=dict)
    """Log-probabilities of a Unigram's pieces."""

    @property
    def size(self) -> int:
        """One more than the largest id."""
        return 1 + max((*self.ids.values(), *self.added.values()), default=-1)

    @cached_property
    def texts(self) -> Mapping[int, str]:
        return {number: token for token, number in self.ids.items()}

    def needs(self, number: int) -> set[int]:
        """The token and, of a BPE, every symbol on the way to it, as ids.

        The way is the same in any text: whatever happens inside a token's span happens in the order of ranks, as if the
        rest of the text were not there. A tokenizer that has all of them and the merges between them, in the same
        order, therefore takes the same steps: the lowest rank of all is the lowest of those that are left.
        """
        token = self.texts.get(number)
        if token is None or self.kind != "BPE":
            return {number}
        return {number} | {self.ids[symbol] for symbol in self._way(token) if symbol in self.ids}

    def _way(self, token: str) -> set[str]:
        symbols = self._characters(token)
        seen = set(symbols)
        while len(symbols) > 1:
            ranked = [(self.ranks.get(pair, -1), i) for i, pair in enumerate(pairwise(symbols))]
            known = [item for item in ranked if item[0] >= 0]
            if not known:
                break
            _, i = min(known)
            symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]
            seen.add(symbols[i])
        return seen

    def _characters(self, token: str) -> list[str]:
        if self.suffix and token.endswith(self.suffix) and token != self.suffix:
            body = token.removesuffix(self.suffix)
            return [*body[:-1], body[-1] + self.suffix]
        return list(token)

    def fundamental(self, characters: frozenset[str]) -> set[int]:
        """The tokens that any text of these characters may fall back on: bytes, if there are any, or characters."""
        numbers = set(self.added.values()) | set(self.named)
        if self.byte_fallback:
            numbers |= {number for token, number in self.ids.items() if _BYTE.fullmatch(token)}
        for token, number in self.ids.items():
            body = self._body(token)
            if self.byte_level:
                falls_back = body in _BYTES
            else:  # decoders look for the mark of a space before they put bytes together
                falls_back = body == SPACE or (not self.byte_fallback and len(body) == 1 and body in characters)
            if falls_back:
                numbers.add(number)
        if self.scores:
            # An unknown character counts as a piece a little less likely than the least likely one, which has to stay.
            numbers.add(min(self.scores, key=lambda number: (self.scores[number], number)))
        return numbers

    def within(self, characters: frozenset[str]) -> Iterator[int]:
        """Tokens that text of these characters may lead to, parts of their UTF-8 among them.

        With a token come all its parts, so that every such text is tokenized as before.
        """
        pieces = BytesOf(characters)
        for token, number in self.ids.items():
            body = self._body(token)
            if self.byte_level:
                if all(char in _BYTES for char in body) and pieces.may_hold(bytes(_BYTES[char] for char in body)):
                    yield number
            elif not _UNUSED.fullmatch(token) and characters.issuperset(body.replace(SPACE, "")):
                yield number

    def _body(self, token: str) -> str:
        """A token without what marks the beginning or the end of a word."""
        if self.prefix and token.startswith(self.prefix) and token != self.prefix:
            return token.removeprefix(self.prefix)
        if self.suffix and token.endswith(self.suffix) and token != self.suffix:
            return token.removesuffix(self.suffix)
        return token

    def by_need(self, numbers: Iterable[int]) -> list[int]:
        """Ids, those first that a language needs most: by probability where there is one, else by id.

        Vocabularies give ids in the order in which their tokens were learned: the most frequent first.
        """
        return sorted(numbers, key=lambda number: (-self.scores.get(number, 0.0), number))


def read_vocabulary(tokenizer: Mapping[str, Any]) -> Vocabulary:
    """The vocabulary of a tokenizer.json. UnsupportedModelError, with the reason, for one that cannot be trimmed."""
    model = tokenizer.get("model") or {}
    kind = model.get("type") or ("Unigram" if isinstance(model.get("vocab"), list) else _untyped(model))
    if kind not in KINDS:
        raise UnsupportedModelError(
            f"a tokenizer of kind {kind} cannot be trimmed", hint=f"known kinds: {', '.join(KINDS)}"
        )
    if kind == "BPE" and model.get("continuing_subword_prefix"):
        raise UnsupportedModelError(
            f"a BPE whose tokens continue words with {model['continuing_subword_prefix']!r} cannot be trimmed",
            hint="leave trim-vocabulary out",
        )
    added = {str(one["content"]): int(one["id"]) for one in tokenizer.get("added_tokens") or ()}
    entries = model["vocab"]
    ids = {token: number for number, (token, _) in enumerate(entries)} if kind == "Unigram" else dict(entries)
    unknown = model.get("unk_id") if kind == "Unigram" else ids.get(model.get("unk_token"))
    named = {int(number) for number in (unknown, *template_ids(tokenizer)) if number is not None}
    return Vocabulary(
        kind,
        ids,
        added,
        frozenset(named),
        byte_level=kind == "BPE"
        and any(_has(tokenizer.get(part), "ByteLevel") for part in ("normalizer", "pre_tokenizer", "decoder")),
        byte_fallback=bool(model.get("byte_fallback")),
        ranks={pair(merge): rank for rank, merge in reversed(list(enumerate(model.get("merges") or ())))},
        prefix=model.get("continuing_subword_prefix") or "" if kind == "WordPiece" else "",
        suffix=model.get("end_of_word_suffix") or "",
        scores={number: float(score) for number, (_, score) in enumerate(entries)} if kind == "Unigram" else {},
    )


def _untyped(model: Mapping[str, Any]) -> str | None:
    """Files of old name no kind."""
    return "BPE" if "merges" in model else "WordPiece" if "max_input_chars_per_word" in model else None


def pair(merge: str | list[str]) -> tuple[str, str]:
    """A merge, in either spelling."""
    left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
    return left, right


def template_ids(tokenizer: Mapping[str, Any]) -> set[int]:
    """Ids in what is put around texts, and the one that pads."""
    found: set[int] = set()

    def look(part: Any) -> None:
        if not isinstance(part, Mapping):
            return
        for processor in part.get("processors") or ():
            look(processor)
        for token in (
            (part.get("special_tokens") or {}).values() if isinstance(part.get("special_tokens"), dict) else ()
        ):
            found.update(map(int, token["ids"]))
        for name in ("sep", "cls"):
            if isinstance(part.get(name), list):
                found.add(int(part[name][1]))

    look(tokenizer.get("post_processor"))
    if tokenizer.get("padding"):
        found.add(int(tokenizer["padding"]["pad_id"]))
    return found


def _has(part: Any, kind: str) -> bool:
    if not isinstance(part, Mapping):
        return False
    inner = [one for name in ("normalizers", "pretokenizers", "decoders") for one in part.get(name) or ()]
    return part.get("type") == kind or any(_has(one, kind) for one in inner)

"""Scripts, as the names of characters tell them: LATIN SMALL LETTER A is Latin, DIGIT ONE and FULL STOP are common."""

from __future__ import annotations

import sys
import unicodedata
from collections.abc import Iterable
from functools import cache

from onnxpress.errors import unknown_name

ASCII, COMMON = "ascii", "common"
UNNAMED = "unnamed"
"""The script of control characters, which are common, and of letters whose names this Python does not know."""
_WIDTHS = {"HALFWIDTH", "FULLWIDTH"}
_NO_SCRIPT = frozenset(
    "MODIFIER COMBINING FEMININE MASCULINE MICRO ANGSTROM KELVIN OHM DOUBLE SCRIPT BLACK EULER PLANCK INFORMATION "
    "TURNED ROTATED ALEF BET GIMEL DALET MATHEMATICAL SUPERSCRIPT SUBSCRIPT VERTICAL VARIATION ENCLOSING".split()
)
"""First words of letters and marks that belong to no script: ℵ, ℃, accents that combine."""


@cache
def characters_by_script() -> dict[str, frozenset[str]]:
    """All assigned characters by script in small letters, `common` for those of none."""
    letters: dict[str, set[str]] = {COMMON: set()}
    others: list[tuple[str, str]] = []
    for code in range(sys.maxunicode + 1):
        char = chr(code)
        category = unicodedata.category(char)
        if category in ("Cn", "Co", "Cs"):  # unassigned, private, halves of a pair
            continue
        words = unicodedata.name(char, "UNNAMED").replace("-", " ").split()
        word = words[1] if words[0] in _WIDTHS and len(words) > 1 else words[0]
        if category[0] in "LM":
            letters.setdefault(COMMON if word in _NO_SCRIPT else word.lower(), set()).add(char)
        else:
            others.append((word.lower(), char))
    for word, char in others:  # ARABIC COMMA is Arabic, since there are Arabic letters
        letters[word if word in letters and word != UNNAMED else COMMON].add(char)
    return {script: frozenset(found) for script, found in letters.items()}


def characters_of(scripts: Iterable[str]) -> frozenset[str]:
    """The characters of these scripts and those of none; `ascii` means its 128 alone.

    UsageError for an unknown name.
    """
    return _characters_of(frozenset(scripts))


@cache
def _characters_of(scripts: frozenset[str]) -> frozenset[str]:
    characters: set[str] = set()
    known = characters_by_script()
    for script in sorted(scripts):
        name = script.lower()
        if name == ASCII:
            characters.update(map(chr, range(128)))
        elif name in known:
            characters |= known[name] | known[COMMON]
        else:
            raise unknown_name("script", script, [ASCII, *known])
    return frozenset(characters)


def scripts_in(text: str) -> frozenset[str]:
    """The scripts that a text is written in."""
    present = set(text)
    return frozenset(
        script
        for script, chars in characters_by_script().items()
        if script == COMMON or any(c in chars for c in present)
    )


class BytesOf:
    """Tells whether bytes, which may begin or end inside a character, can be part of text of certain characters."""

    def __init__(self, characters: frozenset[str]) -> None:
        self.characters = characters
        codes = [char.encode() for char in characters if char > "\x7f"]
        self._heads = {code[:stop] for code in codes for stop in range(1, len(code))}
        self._tails = {code[start:] for code in codes for start in range(1, len(code))}
        self._middles = {code[a:b] for code in codes for a in range(1, len(code)) for b in range(a + 1, len(code))}

    def may_hold(self, piece: bytes) -> bool:
        start = 0
        while start < len(piece) and piece[start] & 0xC0 == 0x80:
            start += 1
        if start == len(piece):
            return piece in self._middles or piece in self._tails or not piece
        if start and piece[:start] not in self._tails:
            return False
        stop = _last_character(piece)
        if stop < len(piece) and piece[stop:] not in self._heads:
            return False
        try:
            return self.characters.issuperset(piece[start:stop].decode())
        except UnicodeDecodeError:
            return False


def _last_character(piece: bytes) -> int:
    """The place where the last character begins if it is cut off, else the length."""
    for back in range(1, min(3, len(piece)) + 1):
        byte = piece[-back]
        if byte >= 0xC0:
            wanted = 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            return len(piece) if wanted == back else len(piece) - back
        if byte < 0x80:
            return len(piece)
    return len(piece)

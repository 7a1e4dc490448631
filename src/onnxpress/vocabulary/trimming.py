"""An artifact with fewer tokens: which ones it keeps, and the files that follow."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from onnxpress.arrays import Ids
from onnxpress.artifact.artifact import Artifact
from onnxpress.calibration.files import Texts, read_records
from onnxpress.errors import BadInputError, CorruptFileError, UnsupportedModelError, VerificationError
from onnxpress.evaluation import restriction
from onnxpress.files.json_files import read_optional_json
from onnxpress.vocabulary import rewriting
from onnxpress.vocabulary.characters import scripts_in
from onnxpress.vocabulary.choosing import kept_tokens
from onnxpress.vocabulary.tokens import read_vocabulary

TOKENIZER, SETTINGS, GENERATION = "tokenizer.json", "tokenizer_config.json", "generation_config.json"
CHUNK = 2**18
"""Characters of a corpus that are tokenized at once."""
_SENTENCEPIECE = (".model", ".spm", ".tiktoken")
"""Ends of the names of tokenizer files that cannot be trimmed and repeat what tokenizer.json says."""


@dataclass(frozen=True)
class Trimming:
    """The kept tokens of an artifact."""

    kept: Ids
    size: int
    """Tokens of the model before."""
    tokenizer: dict[str, Any]
    """tokenizer.json of the kept tokens."""
    notes: tuple[str, ...] = ()

    def follow(self, artifact: Artifact, folder: Path) -> Artifact:
        """The artifact with its tokenizer and configs rewritten, the new files in `folder`/files."""
        target = folder / "files"
        target.mkdir(parents=True)
        kept, files = self.kept, dict(artifact.files)
        contents = {TOKENIZER: json.dumps(self.tokenizer, ensure_ascii=False), **rewriting.word_files(self.tokenizer)}
        if GENERATION in files:
            generation = rewriting.renumbered_config(read_optional_json(files[GENERATION]), kept, self.size)
            contents[GENERATION] = json.dumps(generation, indent=2)
        if SETTINGS in files:
            settings = rewriting.renumbered_settings(read_optional_json(files[SETTINGS]), kept)
            contents[SETTINGS] = json.dumps(settings, indent=2, ensure_ascii=False)
        if "added_tokens.json" in files:
            added = {token["content"]: token["id"] for token in self.tokenizer.get("added_tokens") or ()}
            contents["added_tokens.json"] = json.dumps(added, ensure_ascii=False)
        for name in contents.keys() & files.keys():
            files[name] = target / name
            files[name].write_text(contents[name], encoding="utf-8")
        for name in [name for name in files if name.endswith(_SENTENCEPIECE)]:
            del files[name]
        previous = _previous(artifact)
        original, size = (kept, self.size) if previous is None else (previous[0][kept], previous[1])
        files[restriction.FILE] = target / restriction.FILE
        restriction.write_kept(files[restriction.FILE], original, size)
        config = rewriting.renumbered_config(artifact.config, kept, self.size)
        return replace(artifact, files=files, config=config)


def trimming(
    artifact: Artifact,
    *,
    corpus: str | None = None,
    scripts: Sequence[str] | None = None,
    tokens: int | None = None,
    multiple_of: int = 1,
) -> Trimming:
    """Choose the tokens that an artifact is to keep, and make its tokenizer of them.

    Args:
        corpus: a text whose tokens are kept.
        scripts, tokens, multiple_of: see `choosing.kept_tokens`.

    Raises:
        UnsupportedModelError: there is no tokenizer.json, or it is of a kind that cannot be trimmed.
        UsageError: see `choosing.kept_tokens`.
        BadInputError: the corpus holds no text.
        VerificationError: the new tokenizer reads the corpus in another way, though it has all of its tokens.
    """
    if TOKENIZER not in artifact.files:
        raise UnsupportedModelError("the model has no tokenizer.json, so nothing tells what its tokens are")
    content = json.loads(artifact.files[TOKENIZER].read_text(encoding="utf-8"))
    vocabulary = read_vocabulary(content)
    text_config = artifact.config.get("text_config") or {}
    size = int(artifact.config.get("vocab_size") or text_config.get("vocab_size") or vocabulary.size)
    old = _load(content)
    texts = list(_chunks(corpus)) if corpus is not None else None
    read = [old.encode(text, add_special_tokens=False).ids for text in texts or ()]
    generation = read_optional_json(artifact.files[GENERATION]) if GENERATION in artifact.files else {}
    named = rewriting.config_ids(artifact.config) | rewriting.config_ids(generation)
    kept = kept_tokens(
        vocabulary,
        counts=Counter(number for ids in read for number in ids) if texts is not None else None,
        scripts=scripts,
        of_texts=frozenset().union(*map(scripts_in, texts)) if texts is not None else (),
        tokens=tokens,
        multiple_of=multiple_of,
        required={number for number in named if number < size},
    )
    if kept[-1] >= size:
        raise UnsupportedModelError(f"the tokenizer has a token {int(kept[-1])}, the model {size} rows")
    tokenizer = rewriting.trimmed(content, kept)
    _check(_load(tokenizer), tokenizer, texts or (), read, kept)
    return Trimming(kept, size, tokenizer, tuple(_notes(artifact, kept, size, read)))


def _notes(artifact: Artifact, kept: Ids, size: int, read: list[list[int]]) -> Iterator[str]:
    yield f"{len(kept)} of {size} tokens are kept"
    total = sum(map(len, read))
    gone = total - sum(int(np.isin(ids, kept).sum()) for ids in read)
    if gone:
        yield f"{gone / total:.1%} of the corpus is tokenized differently, as not all of its tokens are kept"
    for name in artifact.files:
        if name.endswith(_SENTENCEPIECE):
            yield f"{name} is left out: it cannot be trimmed, and tokenizer.json says the same"


def _chunks(corpus: str) -> Iterator[str]:
    """The texts of a corpus, long ones cut at line ends. BadInputError where there are none."""
    any_text = False
    for record in read_records(corpus):
        if not isinstance(record, Texts):
            raise BadInputError(f"{corpus} holds no text", hint="give a text file, or text as .jsonl, .csv, .tsv")
        for text in filter(None, (record.first, record.second)):
            any_text = True
            lines, size = [], 0
            for line in text.splitlines(keepends=True):
                lines.append(line)
                size += len(line)
                if size >= CHUNK:
                    yield "".join(lines)
                    lines, size = [], 0
            if lines:
                yield "".join(lines)
    if not any_text:
        raise BadInputError(f"{corpus} holds no text")


def _load(content: dict[str, Any]) -> Any:
    try:
        tokenizer = tokenizers.Tokenizer.from_str(json.dumps(content, ensure_ascii=False))
    except Exception as error:  # tokenizers raises bare Exception
        raise CorruptFileError(f"cannot read {TOKENIZER}: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _check(new: Any, content: dict[str, Any], texts: Any, read: list[list[int]], kept: Ids) -> None:
    """The new tokenizer numbers its tokens as the model does, and reads the corpus as the old one did."""
    vocabulary = read_vocabulary(content)
    for token, number in {**vocabulary.ids, **vocabulary.added}.items():
        if new.token_to_id(token) != number:
            raise UnsupportedModelError(f"token {token!r} has the id {new.token_to_id(token)} instead of {number}")
    for text, ids in zip(texts, read, strict=True):
        if np.isin(ids, kept).all() and new.encode(text, add_special_tokens=False).ids != (
            np.searchsorted(kept, ids).tolist()
        ):
            raise VerificationError(f"the corpus would be tokenized differently, from {text[:40]!r} on")


def _previous(artifact: Artifact) -> tuple[Ids, int] | None:
    """The original ids of an artifact that was trimmed before, and how many tokens the original has."""
    path = artifact.files.get(restriction.FILE)
    kept = restriction.read_kept(path.parent) if path is not None else None
    return None if path is None or kept is None else (kept, int(read_optional_json(path)["original_size"]))

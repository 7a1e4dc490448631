"""The tokens to keep: those of texts, those of scripts, the most needed ones; always with what they need themselves."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from onnxpress.arrays import Ids
from onnxpress.errors import UsageError
from onnxpress.vocabulary.characters import characters_by_script, characters_of
from onnxpress.vocabulary.tokens import Vocabulary


def kept_tokens(
    vocabulary: Vocabulary,
    *,
    counts: Mapping[int, int] | None = None,
    scripts: Iterable[str] | None = None,
    of_texts: Iterable[str] = (),
    tokens: int | None = None,
    multiple_of: int = 1,
    required: Iterable[int] = (),
) -> Ids:
    """Ids to keep, ascending, closed under what `Vocabulary.needs` and `Vocabulary.fundamental` say.

    Args:
        counts: how often texts use each token; all of them are kept, unless `tokens` is less.
        scripts: keep whatever text in these leads to.
        of_texts: the scripts that the texts are in, whose single characters stay.
        tokens: how many to keep: the most frequent of the texts first, then the most needed of the scripts, or of all.
        multiple_of: fill up to a multiple of this, with the most needed of the rest.
        required: ids that stay whatever happens.

    Returns:
        int64 [kept]

    Raises:
        UsageError: nothing says what to keep, there is no such script, or `tokens` is less than what cannot go.
    """
    if counts is None and scripts is None and tokens is None:
        raise UsageError(
            "trim-vocabulary needs a corpus, scripts or a number of tokens",
            hint='--pass trim-vocabulary:scripts=["latin"]',
        )
    wanted = tuple(scripts) if scripts is not None else None
    known = [*of_texts, *(wanted or ())] or list(characters_by_script())
    kept = vocabulary.fundamental(characters_of(known)) | set(required)
    if tokens is not None and len(kept) > tokens:
        raise UsageError(
            f"{tokens} tokens are too few: {len(kept)} cannot go (special tokens, bytes or single characters)",
            hint=f"tokens={len(kept)} or more",
        )
    queue = sorted(counts, key=lambda number: (-counts[number], number)) if counts is not None else []
    if wanted is not None:
        queue += vocabulary.by_need(vocabulary.within(characters_of(wanted)))
    elif tokens is not None:
        queue += vocabulary.by_need(vocabulary.ids.values())
    _fill(vocabulary, kept, queue, tokens)
    missing = -len(kept) % multiple_of
    if missing:
        _fill(vocabulary, kept, vocabulary.by_need(vocabulary.ids.values()), len(kept) + missing)
    return np.array(sorted(kept), np.int64)


def _fill(vocabulary: Vocabulary, kept: set[int], queue: Iterable[int], limit: int | None) -> None:
    """Add tokens in their order, each with all that it needs, while they fit."""
    for number in queue:
        if limit is not None and len(kept) >= limit:
            return
        if number in kept:
            continue
        new = vocabulary.needs(number) - kept
        if limit is None or len(kept) + len(new) <= limit:
            kept |= new

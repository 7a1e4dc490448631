"""Which tokens stay, and that text of them is tokenized as it was."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxpress.errors import UnsupportedModelError, UsageError
from onnxpress.vocabulary.characters import characters_of, scripts_in
from onnxpress.vocabulary.choosing import kept_tokens
from onnxpress.vocabulary.rewriting import trimmed
from onnxpress.vocabulary.tokens import byte_characters, read_vocabulary

from .conftest import KINDS, SENTENCES, count, load, train

Content = dict[str, Any]
TRAINED = {kind: train(kind) for kind in KINDS}


def same(content: Content, kept: np.ndarray, texts: list[str]) -> None:
    """Every text has the ids that it had, renumbered."""
    old, new = load(content), load(trimmed(content, kept))
    for text in texts:
        before = old.encode(text).ids
        assert np.isin(before, kept).all(), text
        assert new.encode(text).ids == np.searchsorted(kept, before).tolist(), text


@settings(max_examples=30, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    chosen=st.sets(st.integers(0, len(SENTENCES) - 1), min_size=1),
    words=st.lists(st.text(alphabet="abcdefgh sШиαγ狐🦊“.1\n", max_size=12), max_size=4),
)
def test_texts_that_are_kept_are_read_as_before(kind: str, chosen: set[int], words: list[str]) -> None:
    texts = [SENTENCES[i] for i in chosen] + words
    content = TRAINED[kind]
    scripts = scripts_in("".join(texts))
    kept = kept_tokens(read_vocabulary(content), counts=count(content, texts), of_texts=scripts)
    same(content, kept, texts)


@settings(max_examples=30, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    text=st.text(alphabet=st.sampled_from(sorted(set("".join(SENTENCES[:4])))), max_size=60),
)
def test_any_text_of_a_kept_script_is_read_as_before(kind: str, text: str) -> None:
    kept = kept_tokens(read_vocabulary(TRAINED[kind]), scripts=["latin"])
    same(TRAINED[kind], kept, [text, *SENTENCES[:3]])


@settings(max_examples=30, deadline=None)
@given(text=st.text(max_size=40), tokens=st.integers(280, 600))
@pytest.mark.parametrize("kind", ["byte-level", "byte-fallback"])
def test_any_text_comes_back_by_bytes(kind: str, text: str, tokens: int) -> None:
    content = TRAINED[kind]
    kept = kept_tokens(read_vocabulary(content), tokens=tokens)
    assert len(kept) == tokens
    text = text.strip() or "x"  # the decoder of Llama 2 strips
    for special in ("<unk>", "<s>", "</s>", "<pad>"):
        text = text.replace(special, "")
    new = load(trimmed(content, kept))
    assert new.decode(new.encode(text).ids) == text


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_a_bpe_takes_the_steps_that_it_took(data: st.DataObject) -> None:
    """Against any merges, such as no trainer would make: several ways to a token, cycles of overlap."""
    alphabet = "abc"
    tokens = list(alphabet)
    merges: list[tuple[str, str]] = []
    for _ in range(data.draw(st.integers(0, 12))):
        merge = (data.draw(st.sampled_from(tokens)), data.draw(st.sampled_from(tokens)))
        if merge not in merges and len("".join(merge)) <= 6:
            merges.append(merge)
            if "".join(merge) not in tokens:
                tokens.append("".join(merge))
    order = data.draw(st.permutations(merges))
    vocabulary = {token: number for number, token in enumerate(tokens)}
    content = json.loads(tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=order)).to_str())
    texts = data.draw(st.lists(st.text(alphabet=alphabet, min_size=1, max_size=14), min_size=1, max_size=3))
    kept = kept_tokens(read_vocabulary(content), counts=count(content, texts), scripts=None)
    same(content, kept, texts)


def test_everything_is_the_identity(content: Content) -> None:
    kept = kept_tokens(read_vocabulary(content), tokens=10**6)
    assert kept.tolist() == list(range(read_vocabulary(content).size))
    assert trimmed(content, kept) == content


def test_a_second_time_nothing_goes(content: Content) -> None:
    texts = SENTENCES[:2]
    for options in ({"scripts": ["latin"]}, {"counts": None, "tokens": 300}, {"texts": texts}):
        result = content
        for turn in range(2):
            given = {key: value for key, value in options.items() if key != "texts"}
            if "texts" in options:
                given = {"counts": count(result, texts), "of_texts": ["latin"]}
            kept = kept_tokens(read_vocabulary(result), **given)  # type: ignore[arg-type]
            assert turn == 0 or len(kept) == read_vocabulary(result).size, options
            result = trimmed(result, kept)


def test_a_size_is_met_and_filled_by_need(content: Content) -> None:
    vocabulary = read_vocabulary(content)
    counts = count(content, SENTENCES[:2])
    size = vocabulary.size - 20
    kept = kept_tokens(vocabulary, counts=counts, tokens=size)
    assert len(kept) == size
    assert len(kept_tokens(vocabulary, counts=counts, tokens=size, multiple_of=7)) % 7 == 0
    often = max(counts, key=lambda number: counts[number])
    assert often in kept


def test_too_small_a_size_says_what_is_needed() -> None:
    vocabulary = read_vocabulary(TRAINED["byte-level"])
    with pytest.raises(UsageError, match="100 tokens are too few: 260 cannot go") as error:
        kept_tokens(vocabulary, tokens=100)
    assert error.value.hint == "tokens=260 or more"
    assert len(kept_tokens(vocabulary, tokens=260)) == 260


def test_nothing_wanted_is_refused() -> None:
    with pytest.raises(UsageError, match="needs a corpus, scripts or a number of tokens"):
        kept_tokens(read_vocabulary(TRAINED["unigram"]))


def test_unknown_scripts_are_refused() -> None:
    with pytest.raises(UsageError, match="unknown script: latn") as error:
        characters_of(["latn"])
    assert error.value.hint == "did you mean latin?"


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        ({"type": "WordLevel", "vocab": {}}, "kind WordLevel cannot be trimmed"),
        ({"type": "BPE", "vocab": {}, "merges": [], "continuing_subword_prefix": "##"}, "continue words with '##'"),
    ],
)
def test_tokenizers_of_other_kinds_are_refused(model: Content, reason: str) -> None:
    with pytest.raises(UnsupportedModelError, match=reason):
        read_vocabulary({"model": model})


def test_scripts_are_told_by_names() -> None:
    latin, ascii_only = characters_of(["latin"]), characters_of(["ascii"])
    assert set("aÉßſ1.–“🦊\n") <= latin
    assert latin.isdisjoint("шγ狐،٣")
    assert ascii_only == frozenset(map(chr, range(128)))
    assert scripts_in("naïve 狐 3") == {"latin", "cjk", "common"}


def test_what_stays_of_other_scripts(content: Content) -> None:
    """With Latin alone no Greek or Chinese token stays but single bytes; with both, Greek does."""
    vocabulary = read_vocabulary(content)

    def kept(*scripts: str) -> set[str]:
        numbers = set(kept_tokens(vocabulary, scripts=scripts).tolist())
        return {token for token, number in vocabulary.ids.items() if number in numbers}

    greek = "α"
    if vocabulary.byte_level:
        letters = {byte: char for char, byte in byte_characters().items()}
        greek = "".join(letters[byte] for byte in "α".encode())
    holds = [token for token in vocabulary.ids if greek in token]
    assert holds
    assert not kept("latin").intersection(holds)
    assert kept("latin", "greek").issuperset(holds)

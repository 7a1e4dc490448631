from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from onnxpress.errors import BadInputError
from onnxpress.generation.generate import TextGenerator, choose, embed, similarity, stream

Make = Callable[..., Path]


def add_tokenizer(folder: Path) -> tokenizers.Tokenizer:
    """64 tokens, byte fallback for the bytes of a snowman: a character may take several tokens."""
    words = {chr(65 + i): i for i in range(26)} | {chr(97 + i): 26 + i for i in range(26)}
    words |= {f"<0x{byte:02X}>": 52 + i for i, byte in enumerate([*"☃".encode(), 0x20, 0x21, 0x2E])}
    words |= {f"<extra{i}>": i for i in range(len(words), 64)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(words, [], byte_fallback=True))
    tokenizer.decoder = tokenizers.decoders.Sequence([tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse()])
    tokenizer.save(str(folder / "tokenizer.json"))
    return tokenizer


@pytest.fixture
def artifact(make_decoder: Make) -> Path:
    folder = make_decoder(last=True).parent
    add_tokenizer(folder)
    (folder / "config.json").write_text(json.dumps({"bos_token_id": 1, "max_position_embeddings": 40}))
    return folder


def test_greedy_text_is_the_argmax_of_the_whole_prompt(artifact: Path) -> None:
    writer = TextGenerator(artifact)
    ids = writer.prompt_ids("Hello")
    written = list(writer.tokens(ids, max_tokens=6))
    model = writer.opened.model
    for i, token in enumerate(written):
        assert token == model.prefill(np.array([ids + written[:i]]))[0, -1].argmax()
    assert "".join(writer.stream("Hello", max_tokens=6)) == writer.tokenizer.decode(written)


def test_samples_depend_on_the_seed(artifact: Path) -> None:
    def text(seed: int) -> str:
        return "".join(stream(artifact, "Hello", temperature=1.0, top_p=0.9, seed=seed, max_tokens=12))

    assert text(1) == text(1)
    assert len({text(seed) for seed in range(4)}) > 1


def test_it_stops_at_an_end_token_at_the_limit_and_at_the_context(artifact: Path) -> None:
    writer = TextGenerator(artifact)
    ids = writer.prompt_ids("Hello")
    free = list(writer.tokens(ids, max_tokens=100))
    assert len(free) == 40 - len(ids)
    assert list(writer.tokens(ids, max_tokens=3)) == free[:3]
    (artifact / "generation_config.json").write_text(json.dumps({"eos_token_id": [free[2], 63]}))
    assert list(TextGenerator(artifact).tokens(ids)) == free[: free.index(free[2])]
    with pytest.raises(BadInputError, match="takes 40"):
        list(writer.tokens([1] * 40))


def test_a_character_of_several_tokens_comes_out_whole(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = TextGenerator(artifact)
    monkeypatch.setattr(writer, "tokens", lambda ids, **options: iter([0, 52, 53, 54, 1]))
    assert list(writer.stream("A")) == ["A", "☃", "B"]


def test_chat_template_applies_unless_raw(artifact: Path) -> None:
    (artifact / "chat_template.jinja").write_text("{% for m in messages %}Q{{ m.content }}A{% endfor %}")
    writer = TextGenerator(artifact)
    assert writer.prompt_ids("Hi") == writer.prompt_ids("QHiA", raw=True)
    assert writer.prompt_ids([{"role": "user", "content": "Hi"}]) == writer.prompt_ids("Hi")


def test_nucleus_keeps_the_smallest_set() -> None:
    logits = np.log(np.array([0.1, 0.5, 0.4]))
    generator = np.random.default_rng(0)
    drawn = [choose(logits, generator, 1.0, 0.6) for _ in range(300)]
    assert set(drawn) == {1, 2}
    assert drawn.count(1) / 300 == pytest.approx(5 / 9, abs=0.08)
    assert {choose(logits, generator, 1.0, 0.5) for _ in range(50)} == {1}
    assert {choose(logits, generator, 1.0) for _ in range(200)} == {0, 1, 2}
    assert choose(logits, generator) == 1


def test_vectors_of_sentences(make_encoder: Make) -> None:
    folder = make_encoder().parent
    add_tokenizer(folder)
    vectors = embed(folder, ["abc", "abcdefgh", "abc"])
    assert vectors.shape == (3, 32)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(vectors[0], vectors[2], atol=1e-6)
    np.testing.assert_allclose(vectors[0], embed(folder, ["abc"])[0], atol=1e-5)
    cosines = similarity(folder, ["abc", "xyz", "abc"])
    assert cosines[0, 2] == pytest.approx(1)
    assert cosines[0, 1] < 0.999
    with pytest.raises(BadInputError, match="does not write"):
        TextGenerator(folder)


def test_a_folder_without_a_tokenizer(make_decoder: Make) -> None:
    with pytest.raises(BadInputError, match=r"no tokenizer\.json"):
        TextGenerator(make_decoder().parent)

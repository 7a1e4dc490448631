"""Text from an artifact, word by word, and vectors from an encoder's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxpress.arrays import Ids
from onnxpress.errors import BadInputError
from onnxpress.evaluation.kind import Opened
from onnxpress.evaluation.metrics import cosine, log_softmax, require_finite_output
from onnxpress.evaluation.opening import open_model
from onnxpress.evaluation.texts import load_tokenizer, pad_rows
from onnxpress.files.json_files import read_optional_json
from onnxpress.generation import chat


def choose(logits: NDArray[Any], generator: np.random.Generator, temperature: float = 0.0, top_p: float = 1.0) -> int:
    """A token from logits [vocabulary]: the best at temperature 0, else a sample from the smallest set of words whose
    probabilities sum to `top_p` (Holtzman et al. 2020, https://arxiv.org/abs/1904.09751)."""
    if temperature <= 0:
        return int(logits.argmax())
    probabilities = np.exp(log_softmax(logits / temperature))
    order = np.argsort(-probabilities, kind="stable")
    before = np.cumsum(probabilities[order]) - probabilities[order]
    kept = order[before < top_p] if top_p < 1 else order
    return int(generator.choice(kept, p=probabilities[kept] / probabilities[kept].sum()))


def stop_tokens(folder: Path) -> frozenset[int]:
    """Ids that end a text, by generation_config.json and config.json."""
    found: set[int] = set()
    for name in ("generation_config.json", "config.json"):
        value = read_optional_json(folder / name).get("eos_token_id")
        found.update(value if isinstance(value, list) else [value] if isinstance(value, int) else [])
    return frozenset(found)


class TextGenerator:
    """An artifact folder opened for writing; several texts may be written one after another."""

    def __init__(self, folder: str | Path | Opened, *, threads: int | None = None) -> None:
        self.opened = open_model(folder, threads=threads)
        self.folder = Path(folder) if isinstance(folder, str | Path) else self.opened.folder or Path(self.opened.name)
        if not self.opened.writes_text:
            raise BadInputError(f"{self.folder} is an {self.opened.kind}: it does not write text")
        tokenizer = load_tokenizer(self.opened.folder)
        if tokenizer is None:
            raise BadInputError(f"{self.folder} has no tokenizer.json")
        self.tokenizer = tokenizer
        beside = self.opened.folder or self.folder
        self.template = chat.find_template(beside)
        self._special, self._stop = chat.special_tokens(beside), stop_tokens(beside)
        limit = self.opened.config.get("max_position_embeddings")
        self.limit = int(limit) if limit else None

    def prompt_ids(self, prompt: str | Sequence[Mapping[str, str]], *, raw: bool = False) -> list[int]:
        """Token ids of a prompt or of chat messages; the checkpoint's chat template applies unless `raw`."""
        if self.template is not None and not raw:
            messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
            text = chat.render(self.template, messages, self._special)
            return list(self.tokenizer.encode(text, add_special_tokens=False).ids)
        if not isinstance(prompt, str):
            raise BadInputError(f"{self.folder} has no chat template", hint="give plain text")
        return list(self.tokenizer.encode(prompt).ids)

    def tokens(
        self, ids: Sequence[int], *, max_tokens: int = 256, temperature: float = 0.0, top_p: float = 1.0, seed: int = 0
    ) -> Iterator[int]:
        """Ids that follow `ids`, the one that ends the text excluded."""
        if not ids:
            ids = self.opened.starts[:1]
        if self.limit is not None and len(ids) >= self.limit:
            raise BadInputError(f"the prompt has {len(ids)} tokens; the model takes {self.limit}")
        generator, model = np.random.default_rng(seed), self.opened.model
        prompt = self.opened.begin(np.array([list(ids)], np.int64))
        room = max_tokens if self.limit is None else min(max_tokens, self.limit - prompt.shape[1])
        logits = model.prefill(prompt)
        for step in range(room):
            require_finite_output(logits[0, -1], f"logits of token {step + 1}")
            token = choose(logits[0, -1], generator, temperature, top_p)
            if token in self._stop:
                return
            yield token
            if step + 1 < room:
                logits = model.decode(np.array([[token]], np.int64))

    def stream(self, prompt: str | Sequence[Mapping[str, str]], *, raw: bool = False, **options: Any) -> Iterator[str]:
        """Pieces of text as they become certain: a character of several tokens comes out whole."""
        from tokenizers.decoders import DecodeStream

        decoder = DecodeStream(skip_special_tokens=True)
        for token in self.tokens(self.prompt_ids(prompt, raw=raw), **options):
            piece = decoder.step(self.tokenizer, token)
            if piece:
                yield piece


def stream(
    folder: str | Path,
    prompt: str | Sequence[Mapping[str, str]],
    *,
    max_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    raw: bool = False,
    threads: int | None = None,
) -> Iterator[str]:
    """Open an artifact and write: see `TextGenerator`."""
    generator = TextGenerator(folder, threads=threads)
    return generator.stream(prompt, raw=raw, max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed)


def embed(folder: str | Path | Opened, texts: Sequence[str], *, threads: int | None = None) -> NDArray[np.float32]:
    """Vectors [texts, width] of an encoder artifact, of length 1."""
    opened = open_model(folder, threads=threads)
    tokenizer = load_tokenizer(opened.folder)
    if not opened.embeds_text or tokenizer is None:
        raise BadInputError(f"{opened.name} is not a text encoder with a tokenizer.json")
    limit = int(opened.config.get("max_position_embeddings") or 512) - 2  # some count positions from 2
    ids: Ids
    ids, mask = pad_rows([tokenizer.encode(text).ids[:limit] for text in texts])
    vectors = opened.model.embed(ids, mask)
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.asarray(vectors / np.maximum(norms, 1e-12), np.float32)


def similarity(folder: str | Path | Opened, texts: Sequence[str], *, threads: int | None = None) -> NDArray[np.float64]:
    """Cosines [texts, texts]."""
    vectors = embed(folder, texts, threads=threads)
    return cosine(vectors[:, None], vectors[None])

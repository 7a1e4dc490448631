"""A reference that answered once need not be opened again, and says the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from onnxpress.evaluation.cached_decoder import CachedDecoder


class Counting:
    """Logits that tell all that a sequence was made of."""

    vocabulary, last_only = 3, False

    def __init__(self) -> None:
        self.calls = 0
        self.total = 0.0

    def prefill(self, ids: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
        self.total = 0.0
        return self.decode(ids * (1 if mask is None else mask))

    def decode(self, ids: np.ndarray) -> np.ndarray:
        self.calls += 1
        self.total += float(ids.sum())
        return np.full((*ids.shape, 3), self.total, np.float32)


def cached(folder: Path) -> tuple[CachedDecoder, list[Counting]]:
    opened: list[Counting] = []

    def open_one() -> Counting:
        opened.append(Counting())
        return opened[-1]

    return CachedDecoder(open_one, folder / "answers", 3), opened


def ask(model: CachedDecoder | Counting) -> list[float]:
    """A prompt and two steps, another one that begins alike, and a padded batch."""
    found = []
    for prompt, steps in (([1, 2], [3, 4]), ([1, 2], [3, 5]), ([1, 2, 3], [])):
        found.append(model.prefill(np.array([prompt])))
        found += [model.decode(np.array([[step]])) for step in steps]
    found.append(model.prefill(np.array([[9, 1], [1, 1]]), np.array([[0, 1], [1, 1]])))
    return [float(logits.flat[0]) for logits in found]


def test_same_answers_from_files_without_the_model(tmp_path: Path) -> None:
    model, opened = cached(tmp_path)
    expected = ask(Counting())
    assert ask(model) == expected
    model.close()
    assert ask(model) == expected
    assert len(opened) == 1
    again, reopened = cached(tmp_path)
    assert ask(again) == expected
    assert not reopened


def test_what_was_not_asked_before_takes_the_model_to_where_the_sequence_stands(tmp_path: Path) -> None:
    model, opened = cached(tmp_path)
    model.prefill(np.array([[1, 2]]))
    model.close()
    model.prefill(np.array([[1, 2]]))
    assert model.decode(np.array([[4]])).flat[0] == 7
    assert model.decode(np.array([[5]])).flat[0] == 12
    assert [one.calls for one in opened] == [1, 3]


def test_a_prompt_and_its_first_half_with_a_step_are_not_the_same(tmp_path: Path) -> None:
    model, _ = cached(tmp_path)
    whole = model.prefill(np.array([[1, 2]]))
    model.prefill(np.array([[1]]))
    step = model.decode(np.array([[2]]))
    assert whole.shape == (1, 2, 3)
    assert step.shape == (1, 1, 3)

"""The ways in which a decoder is driven say the same of the same tokens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from onnxpress.errors import BadInputError
from onnxpress.evaluation.decoder import CHUNK, Text
from onnxpress.evaluation.kind import DECODE, PADDED, PREFILL, Opened
from onnxpress.evaluation.modes import Chunk, Rows
from onnxpress.evaluation.opening import open_model

Make = Callable[..., Path]
IDS = np.random.default_rng(0).integers(1, 64, (1, 12))


@pytest.fixture
def decoder(make_decoder: Make) -> Opened:
    return open_model(make_decoder())


def test_cached_steps_and_a_chunk_continue_a_prompt(decoder: Opened) -> None:
    text = Text(IDS, np.arange(11), start=6, steps=5)
    (prompt,), (steps,) = (decoder.run(mode, text) for mode in (PREFILL, DECODE))
    np.testing.assert_array_equal(prompt.followed, IDS[0, 1:])
    np.testing.assert_array_equal(steps.positions, np.arange(6, 11))
    np.testing.assert_allclose(steps.logits, prompt.logits[6:], atol=1e-4)
    (chunk,) = decoder.run(CHUNK, Chunk(IDS[:, :6], None, IDS[:, 6:11]))
    np.testing.assert_allclose(chunk.logits, prompt.logits, atol=1e-4)


@pytest.mark.parametrize("left", [True, False, (True, False, False)])
def test_padding_on_either_side_changes_nothing(make_decoder: Make, left: bool | tuple[bool, ...]) -> None:
    decoder = open_model(make_decoder(gqa=False))
    batch = Rows([IDS[0, :5], IDS[0, 3:7], IDS[0]], 2, left)
    for alone, padded in zip(decoder.run("alone", batch), decoder.run(PADDED, batch), strict=True):
        np.testing.assert_array_equal(padded.positions, np.arange(len(alone.logits)))
        np.testing.assert_allclose(padded.logits, alone.logits, atol=1e-4)


def test_a_row_needs_a_prompt_before_its_steps(decoder: Opened) -> None:
    with pytest.raises(BadInputError, match="no more than 3 tokens"):
        decoder.run(PADDED, Rows([IDS[0], IDS[0, :3]], 3))

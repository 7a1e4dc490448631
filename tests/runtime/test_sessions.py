from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from onnxpress.errors import BadInputError, CorruptFileError, SourceNotFoundError, UnsupportedModelError, UsageError
from onnxpress.runtime.decoder import DecoderSession
from onnxpress.runtime.session_options import make_session_options
from onnxpress.runtime.sessions import EncoderSession, open_session, position_ids

TOKENS = np.random.default_rng(3).integers(0, 64, (1, 12))
Make = Callable[..., Path]


def steps(session: DecoderSession, ids: np.ndarray, prompt: int, mask: np.ndarray | None = None) -> np.ndarray:
    """Logits of the prompt, then of each later token one at a time."""
    parts = [session.prefill(ids[:, :prompt], mask)]
    parts += [session.decode(ids[:, i : i + 1]) for i in range(prompt, ids.shape[1])]
    return np.concatenate(parts, axis=1)


def test_fused_graph_shares_its_cache_and_primitive_graph_does_not(make_decoder: Make) -> None:
    assert DecoderSession(make_decoder(gqa=True)).shared
    assert not DecoderSession(make_decoder(gqa=False)).shared
    with pytest.raises(UnsupportedModelError, match="cannot share"):
        DecoderSession(make_decoder(gqa=False), shared=True)


def test_both_spellings_and_both_caches_agree(make_decoder: Make) -> None:
    oracle = DecoderSession(make_decoder(gqa=False)).prefill(TOKENS)
    for shared in (None, False):
        session = DecoderSession(make_decoder(gqa=True), shared=shared)
        np.testing.assert_allclose(session.prefill(TOKENS), oracle, atol=1e-4)
        np.testing.assert_allclose(steps(session, TOKENS, 5), oracle, atol=1e-4)
    np.testing.assert_allclose(steps(DecoderSession(make_decoder(gqa=False)), TOKENS, 5), oracle, atol=1e-4)


def test_shared_cache_survives_growth(make_decoder: Make) -> None:
    small, large = (DecoderSession(make_decoder(), capacity=size) for size in (8, 64))
    assert small.shared
    np.testing.assert_allclose(steps(small, TOKENS, 7), steps(large, TOKENS, 7), atol=1e-5)
    assert small.length == TOKENS.shape[1]


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(pads=st.lists(st.integers(0, 6), min_size=1, max_size=3), prompt=st.integers(7, 10), gqa=st.booleans())
def test_left_padded_rows_equal_the_rows_alone(make_decoder: Make, pads: list[int], prompt: int, gqa: bool) -> None:
    session = DecoderSession(make_decoder(gqa=gqa))
    rows = np.random.default_rng(prompt).integers(0, 64, (len(pads), prompt + 3))
    mask = (np.arange(prompt)[None] >= np.array(pads)[:, None]).astype(np.int64)
    batch = steps(session, rows, prompt, mask)
    for row, pad in enumerate(pads):
        alone = steps(session, rows[row : row + 1, pad:], prompt - pad)
        np.testing.assert_allclose(batch[row, pad:], alone[0], atol=1e-4)


def test_several_tokens_after_a_past(make_decoder: Make) -> None:
    session = DecoderSession(make_decoder())
    for rows in (1, 2):
        ids = np.repeat(TOKENS, rows, axis=0)
        whole = session.prefill(ids)
        session.prefill(ids[:, :4])
        np.testing.assert_allclose(session.decode(ids[:, 4:]), whole[:, 4:], atol=1e-4)


def test_last_logits_only(make_decoder: Make) -> None:
    last, whole = DecoderSession(make_decoder(last=True)), DecoderSession(make_decoder())
    assert (last.last_only, whole.last_only, last.shared) == (True, False, True)
    np.testing.assert_allclose(last.prefill(TOKENS), whole.prefill(TOKENS)[:, -1:], atol=1e-5)


def test_batch_size_may_change(make_decoder: Make) -> None:
    session = DecoderSession(make_decoder())
    alone = session.prefill(TOKENS)
    np.testing.assert_allclose(session.prefill(np.repeat(TOKENS, 3, axis=0))[2:], alone, atol=1e-5)
    np.testing.assert_allclose(session.prefill(TOKENS), alone, atol=1e-6)


def test_decode_needs_a_prompt(make_decoder: Make) -> None:
    with pytest.raises(BadInputError, match="before prefill"):
        DecoderSession(make_decoder()).decode(TOKENS)


def test_positions_count_real_tokens() -> None:
    mask = np.array([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    assert position_ids(mask, 5).tolist() == [[0, 0, 0, 1, 2], [0, 1, 2, 3, 4]]
    assert position_ids(mask, 2).tolist() == [[1, 2], [3, 4]]


def test_encoder_embeds_padded_rows_as_alone(make_encoder: Make) -> None:
    session = EncoderSession(make_encoder())
    ids = np.repeat(TOKENS, 2, axis=0)
    mask = np.ones_like(ids)
    mask[1, 5:] = 0
    np.testing.assert_allclose(session.embed(ids, mask)[1:], session.embed(TOKENS[:, :5]), atol=1e-5)
    with pytest.raises(BadInputError, match="attention_mask"):
        session.run({"input_ids": ids})


def test_files_that_cannot_be_opened(make_decoder: Make, tmp_path: Path) -> None:
    with pytest.raises(SourceNotFoundError):
        open_session(tmp_path / "none.onnx")
    path = make_decoder()
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(CorruptFileError):
        open_session(path)
    with pytest.raises(UsageError, match="CUDA"):
        open_session(make_decoder(), provider="CUDAExecutionProvider")


def test_session_options_are_checked() -> None:
    options = make_session_options({"session.intra_op.allow_spinning": "0", "graph_optimization_level": "extended"}, 2)
    assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"
    assert options.intra_op_num_threads == 2
    for wrong in ({"intra_op_num_threads": "two"}, {"graph_optimization_level": "max"}, {"enable_mem_pattern": "no"}):
        with pytest.raises(UsageError):
            make_session_options(wrong)
    with pytest.raises(UsageError) as caught:
        make_session_options({"session.intra_op.allow_spining": "0"})
    assert caught.value.hint == "did you mean 'session.intra_op.allow_spinning'?"

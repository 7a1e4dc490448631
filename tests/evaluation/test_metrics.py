from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from onnxpress.errors import BadInputError, VerificationError
from onnxpress.evaluation.metrics import Divergence, cosine, log_softmax, ranks, require_finite_output, spearman


def test_log_softmax_against_the_definition_and_without_overflow() -> None:
    x = np.array([[1.0, 2.0, 3.0], [1e4, 0.0, -1e4]], np.float32)
    np.testing.assert_allclose(log_softmax(x)[0], np.log(np.exp(x[0]) / np.exp(x[0]).sum()), rtol=1e-6)
    assert np.isfinite(log_softmax(x)).all()


def test_divergence_of_two_known_distributions() -> None:
    p, q = np.array([[0.5, 0.25, 0.25]]), np.array([[0.25, 0.5, 0.25]])
    found = Divergence()
    found.add(np.log(p), np.log(q), np.array([0]))
    assert found.kl == pytest.approx(0.5 * np.log(2) - 0.25 * np.log(2))
    assert found.top1_agreement == 0
    assert found.max_difference == pytest.approx(np.log(2))
    assert found.perplexity == pytest.approx(4)
    assert found.reference_perplexity == pytest.approx(2)


def test_divergence_does_not_depend_on_pieces() -> None:
    generator = np.random.default_rng(0)
    a, b = generator.standard_normal((2, 100, 17))
    whole, pieces = Divergence(), Divergence()
    words = generator.integers(0, 17, 99)
    whole.add(a, b, words)
    pieces.add(a[:41], b[:41], words[:41])
    pieces.add(a[41:], b[41:], words[41:])
    assert whole.figures() == pytest.approx(pieces.figures())
    assert whole.targets == 99


def test_different_vocabularies_are_refused() -> None:
    with pytest.raises(BadInputError) as caught:
        Divergence().add(np.zeros((1, 5)), np.zeros((1, 6)))
    assert caught.value.hint == "both need the same vocabulary"


def test_values_that_are_not_finite_are_named() -> None:
    values = np.zeros((2, 3))
    require_finite_output(values, "logits")
    values[1, 2] = np.nan
    with pytest.raises(VerificationError, match=r"logits: 1 of 6 values .* first at \[1, 2\]"):
        require_finite_output(values, "logits")


def test_cosine() -> None:
    a, b = np.array([[1.0, 0], [1, 1], [0, 0], [0, 0]]), np.array([[2.0, 0], [-1, -1], [0, 0], [1, 0]])
    assert cosine(a, b).tolist() == pytest.approx([1, -1, 1, 0])


def test_spearman_of_a_published_example() -> None:
    # IQ against hours of television, n = 10: the textbook value is -29/165.
    iq = np.array([86, 97, 99, 100, 101, 103, 106, 110, 112, 113])
    hours = np.array([2, 20, 28, 27, 50, 29, 7, 17, 6, 12])
    assert spearman(iq, hours) == pytest.approx(-29 / 165)
    assert ranks(np.array([3, 1, 3, 2])).tolist() == [3.5, 1, 3.5, 2]
    with pytest.raises(BadInputError, match="constant"):
        spearman(iq, np.ones(10))


@given(arrays(np.float64, 12, elements=st.floats(-100, 100), unique=True))
def test_spearman_sees_order_only(values: np.ndarray) -> None:
    assert spearman(values, values**3 if np.unique(values**3).size == 12 else values) == pytest.approx(1)
    assert spearman(values, -values) == pytest.approx(-1)


@given(st.lists(st.integers(0, 5), min_size=2, max_size=30))
def test_ranks_sum_as_without_ties(values: list[int]) -> None:
    assert ranks(np.array(values)).sum() == pytest.approx(len(values) * (len(values) + 1) / 2)

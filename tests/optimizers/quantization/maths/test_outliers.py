"""Which channels stay in floating point, against the error of doing so."""

from __future__ import annotations

import numpy as np

from onnxpress.optimizers.quantization.maths.outliers import fewest_outliers


def activations(loud: int) -> tuple[np.ndarray, np.ndarray, list[int]]:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2000, 64)).astype(np.float32)
    columns = sorted(rng.choice(64, loud, replace=False).tolist())
    x[:, columns] *= 100
    return x, rng.standard_normal((64, 48)).astype(np.float32), columns


def measured(x: np.ndarray, weight: np.ndarray, kept: np.ndarray) -> float:
    """The error of the mixed product with one range for all tokens, of the product's energy."""
    others = np.setdiff1d(np.arange(x.shape[1]), kept)
    step = np.abs(x[:, others]).max() / 127
    error = (np.rint(x[:, others] / step) * step - x[:, others]) @ weight[others]
    return float((error**2).sum() / ((x @ weight) ** 2).sum())


def test_the_fewest_channels_for_an_error() -> None:
    x, weight, columns = activations(4)
    energy = float(((x @ weight) ** 2).sum() / len(x))
    peaks = np.abs(x).max(axis=0)
    for max_error in (1e-4, 1e-6):
        kept = fewest_outliers(peaks, weight, energy, max_error)
        assert (np.diff(kept) > 0).all()
        assert measured(x, weight, kept) <= 1.2 * max_error
        fewer = np.setdiff1d(kept, kept[np.argmin(peaks[kept])])
        assert len(kept) == 0 or measured(x, weight, fewer) > 0.8 * max_error
    np.testing.assert_array_equal(fewest_outliers(peaks, weight, energy, 2e-7), columns)


def test_nothing_or_everything() -> None:
    x, weight, _ = activations(2)
    peaks = np.abs(x).max(axis=0)
    assert len(fewest_outliers(peaks, weight, 1.0, np.inf)) == 0
    assert len(fewest_outliers(peaks, weight, 1.0, 0)) == 64

"""What is said of predictions that were off."""

from __future__ import annotations

import pytest

from onnxpress.search.prediction import Prediction


@pytest.mark.parametrize(("spent", "said"), [(0.022, False), (0.039, False), (0.096, True)])
def test_cuts_that_lose_far_more_than_predicted_ask_for_other_text(spent: float, said: bool) -> None:
    prediction = Prediction()
    sums = {"loss": 0.0, "cut_loss": 0.02, "size": 1e6}
    prediction.learn(sums, {"spent": spent, "spent_on_cuts": spent, "size_bytes": 1e6})
    found = prediction.remarks()
    assert bool(found) == said
    if said:
        assert "the cuts lose 4.8 times" in found[0]
        assert "--calibration" in found[0]


def test_formats_do_not_count() -> None:
    prediction = Prediction()
    prediction.learn({"loss": 0.01, "cut_loss": 0.0, "size": 1e6}, {"spent": 0.1, "size_bytes": 1e6})
    assert prediction.remarks() == []

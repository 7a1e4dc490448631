from __future__ import annotations

import pytest

from onnxpress.artifact.artifact import Step
from onnxpress.building.gates import costs, require
from onnxpress.errors import GateFailedError
from onnxpress.requests import Gates

STEPS = (
    Step("export", {}, 1.0, metrics={"max_difference": 1e-5, "kl": 0.0, "size_bytes": 100e6}),
    Step(
        "smooth", {}, 1.0, metrics={"kl": 1e-9, "perplexity": 10.0, "reference_perplexity": 10.0, "size_bytes": 100e6}
    ),
    Step("int8", {}, 1.0, metrics={"kl": 0.004, "perplexity": 10.2, "reference_perplexity": 10.0, "size_bytes": 40e6}),
    Step("repack", {}, 1.0, metrics={"max_difference": 0.01, "size_bytes": 40e6}),
    Step("4-bit", {}, 1.0, metrics={"kl": 0.1, "perplexity": 11.2, "reference_perplexity": 10.0, "size_bytes": 30e6}),
)


def test_each_pass_is_charged_with_what_it_added() -> None:
    assert costs({"size_bytes": 100e6}, STEPS) == [
        "int8 +0.0040 KL +2.00% perplexity -60% size",
        "4-bit +0.0960 KL +10.00% perplexity -25% size",
    ]


def test_encoders_are_charged_in_cosine() -> None:
    step = Step("int8", {}, 1.0, metrics={"cosine_mean": 0.99, "cosine_min": 0.9, "size_bytes": 50e6})
    assert costs({"size_bytes": 100e6}, [step]) == ["int8 +0.0100 1-cosine -50% size"]


def test_a_failed_gate_says_which_pass_cost_what() -> None:
    records = Gates(max_loss=0.01, max_size=200e6).check({"loss": 0.12, "size_bytes": 30e6})
    assert [record.passed for record in records] == [False, True]
    with pytest.raises(GateFailedError, match=r"loss 12\.00% > 1\.00%") as failed:
        require(records, {"size_bytes": 100e6}, STEPS)
    assert failed.value.hint is not None
    assert "4-bit +0.0960 KL +10.00% perplexity" in failed.value.hint

"""A new kind of model, with a measure of its own, is a class: nothing else has to know of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import onnx
import pytest

from onnxpress.artifact.golden import replay_golden, write_golden
from onnxpress.errors import BadInputError, VerificationError
from onnxpress.evaluation import opening
from onnxpress.evaluation.evaluate import evaluate
from onnxpress.evaluation.graph import Graph
from onnxpress.evaluation.kind import Case, Figures, GraphFile
from onnxpress.evaluation.opening import open_model
from onnxpress.evaluation.verification import Reference, verify_step


@dataclass
class SignAgreement:
    """Share of numbers whose sign is the same."""

    agreed: int = 0
    numbers: int = 0

    def compare(self, expected: Any, found: Any) -> None:
        signs = np.sign(expected["signed"]) == np.sign(found["signed"])
        self.agreed, self.numbers = self.agreed + int(signs.sum()), self.numbers + signs.size

    def figures(self) -> Figures:
        return {"max_difference": 1 - self.agreed / self.numbers}


class Signed(Graph):
    """Graphs with an output `signed`."""

    kind = "signed"
    verified_by = judged_by = SignAgreement  # type: ignore[assignment]

    @classmethod
    def open(cls, file: GraphFile) -> Self | None:
        return super().open(file) if file.session().get_outputs()[0].name == "signed" else None

    def summary(self, modes: Mapping[str, Any]) -> Figures:
        return dict(modes["prefill"].figures())

    def headline(self, modes: Mapping[str, Any], cases: Sequence[Case]) -> dict[str, Any]:
        return {"tokens": 0, "modes": {name: mode.figures() for name, mode in modes.items()}}


@pytest.fixture
def graphs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    monkeypatch.setattr(opening, "KINDS", (Signed, *opening.KINDS))
    text = '<ir_version: 10, opset_import: ["" : 21]> g (float[2, 8] x) => (float[2, 8] signed) { signed = %s (x) }'
    paths = {}
    for name in ("Identity", "Tanh", "Neg"):
        paths[name] = tmp_path / name / "model.onnx"
        paths[name].parent.mkdir()
        onnx.save(onnx.parser.parse_model(text % name), paths[name])
    return paths


def test_its_measure_serves_verification_and_evaluation(graphs: dict[str, Path]) -> None:
    assert open_model(graphs["Tanh"]).kind == "signed"
    reference = Reference.of(graphs["Identity"])
    assert verify_step(reference, graphs["Tanh"], exact=True) == {"max_difference": 0}
    with pytest.raises(VerificationError, match=r"should be exact but differs from the reference by 1;"):
        verify_step(reference, graphs["Neg"], exact=True)
    assert evaluate(graphs["Neg"], graphs["Identity"]).modes == {"prefill": {"max_difference": 1}}


def test_golden_outputs_are_of_its_kind(graphs: dict[str, Path]) -> None:
    folder = graphs["Identity"].parent
    write_golden(folder)
    assert replay_golden(folder)["cosine_min"] == pytest.approx(1)


def test_what_a_kind_cannot_do_is_said(graphs: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="does not write text"):
        open_model(graphs["Tanh"]).begin(np.array([[1]]))
    (tmp_path / "checkpoint").mkdir()
    with pytest.raises(BadInputError, match=r"has no config\.json"):
        open_model(tmp_path / "checkpoint")
    (tmp_path / "checkpoint" / "config.json").write_text("{}")
    with pytest.raises(BadInputError, match="it is a checkpoint"):
        open_model(tmp_path / "checkpoint")

"""Losses of one group in one format: what the model with that group really quantized loses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from onnxpress.calibration.calibration import Calibration
from onnxpress.evaluation.metrics import Divergence
from onnxpress.graph.io import copy_graph
from onnxpress.optimizers.base import Context
from onnxpress.optimizers.recipe import PassSpec
from onnxpress.search import sensitivity
from onnxpress.search.formats import FLOAT, Format
from onnxpress.search.groups import Group, find_groups
from onnxpress.search.injection import inject
from onnxpress.search.sensitivity import Measurement, TrialInputs, measure_parts
from onnxpress.search.trial_records import TrialRecord


def logits(model: ir.Model, samples: TrialInputs) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    names = {node.name for node in session.get_inputs()}
    return [session.run(["logits"], {k: v for k, v in sample.items() if k in names})[0] for sample in samples.judge]


def true_loss(model: ir.Model, group: Group, format: Format, samples: TrialInputs) -> float:
    """KL of the whole model, built with this group in this format."""
    changed = copy_graph(model)
    for _, one in format.passes_for(group.weights):
        one.run(changed, Context(Calibration(samples.fit)))
    losses = []
    for before, after in zip(logits(model, samples), logits(changed, samples), strict=True):
        divergence = Divergence()
        divergence.add(before.reshape(-1, before.shape[-1]), after.reshape(-1, after.shape[-1]))
        losses.append(divergence.kl)
    return float(np.mean(losses))


def by_name(rows: list[Measurement]) -> dict[tuple[str, str], Measurement]:
    return {(row.part, row.format): row for row in rows}


def test_losses_are_those_of_the_model_with_that_unit_quantized(
    model: ir.Model, samples: TrialInputs, formats: list[Format]
) -> None:
    groups = find_groups(model.graph)
    rows = by_name(measure_parts(model, groups, formats, samples, session_options={}, every=True))
    assert all(row.measured for row in rows.values())
    for group in groups[:-1]:  # a tied embedding also changes what its own head reads
        for format in formats[1:]:
            expected = true_loss(model, group, format, samples)
            # KL of about 1e-4 as a sum of float32 products: 1e-6 of noise
            assert rows[group.name, format.name].loss == pytest.approx(expected, rel=0.05, abs=2e-6), (group, format)
    tied = true_loss(model, groups[-1], formats[0], samples)
    assert rows["embed", "table"].loss == pytest.approx(tied, rel=0.5)


def test_a_format_is_offered_where_it_takes_all_weights_of_a_group(
    model: ir.Model, samples: TrialInputs, formats: list[Format]
) -> None:
    rows = by_name(measure_parts(model, find_groups(model.graph), formats, samples, session_options={}))
    assert ("layers.0.gate", "table") not in rows, "it is no table"
    assert ("embed", "int8") not in rows, "the table would stay in float beside its codes"
    group = ("layers.0.down", FLOAT)
    assert (rows[group].nbytes, rows[group].loss, rows[group].error) == (4 * 96 * 64, 0, 0)
    # The table's codes are stored once, as the head reads them; float scales and half a byte of zero point, likewise.
    assert rows["embed", "table"].nbytes >= 200 * 64 // 2
    # 4-bit codes, a float scale and half a byte of zero point for each block of 32
    assert rows["layers.0.down", "4 bits"].nbytes == 96 * 64 // 2 + 64 * 3 * 4 + 64 * 2


def test_losses_of_formats_that_lose_alike_follow_from_the_coarsest(
    model: ir.Model, samples: TrialInputs, formats: list[Format]
) -> None:
    groups = find_groups(model.graph)
    quick = by_name(measure_parts(model, groups, formats, samples, session_options={}))
    every = by_name(measure_parts(model, groups, formats, samples, session_options={}, every=True))
    inferred = [key for key, row in quick.items() if not row.measured]
    assert {format for _, format in inferred} == {"8 bits", "int8"}  # no token stands out in this model
    for key in inferred:
        assert quick[key].loss == pytest.approx(every[key].loss, rel=1.0), key
        assert quick[key].error == every[key].error


@pytest.mark.parametrize(
    ("one", "other", "alike"),
    [
        ((1e-3, 2e-3), (1e-5, 3e-5), True),  # errors of all tokens, large and small
        ((1e-3, 2e-3), (1e-3, 2e-2), False),  # the same error, in a tenth of the tokens
        ((1e-3, 2e-3), (0.0, 0.0), True),  # nothing lost
    ],
)
def test_what_loses_alike(one: tuple[float, float], other: tuple[float, float], alike: bool) -> None:
    first, second = (TrialRecord("u", "f", 1, error, peak) for error, peak in (one, other))
    assert first.alike(second) is second.alike(first) is alike


def test_injected_errors_are_those_of_the_graph_itself(model: ir.Model, samples: TrialInputs) -> None:
    rng = np.random.default_rng(5)
    error = rng.standard_normal((3, 24, 64)).astype(np.float32) / 10
    with inject(model, ["d0"], samples.judge) as lost:
        assert lost(0, {}) == 0
        found = lost(0, {"d0": error})
    changed = copy_graph(model)
    node = next(node for node in changed.graph if node.outputs[0].name == "d0")
    constant = ir.Value(name="error", const_value=ir.tensor(error, name="error"))
    changed.graph.register_initializer(constant)
    add = ir.node("Add", [None, constant])
    ir.convenience.replace_all_uses_with(node.outputs[0], add.outputs[0])
    add.replace_input_with(0, node.outputs[0])
    changed.graph.insert_after(node, add)
    one = TrialInputs([], samples.judge[:1])
    (before,), (after,) = logits(model, one), logits(changed, one)
    divergence = Divergence()
    divergence.add(before.reshape(-1, 200), after.reshape(-1, 200))
    assert found == pytest.approx(divergence.kl, rel=1e-3)


def test_it_goes_on_where_it_was_killed(
    model: ir.Model, samples: TrialInputs, formats: list[Format], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups, folder = find_groups(model.graph), tmp_path / "kept"
    tried: list[str] = []
    real = sensitivity.try_format

    def counted(part: ir.Model, group: Group, *rest: object) -> object:
        if len(tried) == 6 and group.name not in tried:
            raise KeyboardInterrupt
        tried.append(group.name)
        return real(part, group, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(sensitivity, "try_format", counted)
    tried += ["", ""]
    with pytest.raises(KeyboardInterrupt):
        measure_parts(model, groups, formats, samples, session_options={}, folder=folder)
    (path,) = folder.iterdir()
    with path.open("a") as file:
        file.write('[{"unit": "layers.1')  # killed while writing
    tried.clear()
    monkeypatch.setattr(
        sensitivity, "try_format", lambda part, group, *rest: (tried.append(group.name), real(part, group, *rest))[1]
    )
    rows = measure_parts(model, groups, formats, samples, session_options={}, folder=folder)
    assert groups[0].name not in tried
    assert set(tried) == {group.name for group in groups[1:]}
    tried.clear()
    assert measure_parts(model, groups, formats, samples, session_options={}, folder=folder) == rows
    assert tried == [], "all is known"
    other = [*formats[:-1], Format("4 bits", (PassSpec("quantize-blocks", {"bits": 4, "block_size": 16}),))]
    measure_parts(model, groups[:1], other, samples, session_options={}, folder=folder)
    assert tried, "with other options nothing is known"

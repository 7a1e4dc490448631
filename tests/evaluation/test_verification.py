from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from onnxpress.errors import VerificationError
from onnxpress.evaluation.verification import MAXIMUM_BYTES, Reference, verify_step

Make = Callable[..., Path]


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("reference_last", [False, True])
def test_an_exact_step_passes_and_a_lossy_one_is_measured(make_decoder: Make, last: bool, reference_last: bool) -> None:
    reference = Reference.of(make_decoder(last=reference_last))
    assert 0 < reference.nbytes < MAXIMUM_BYTES
    same = verify_step(reference, make_decoder(gqa=last, last=last), exact=True)
    assert same["max_difference"] < 1e-4
    assert same["top1_agreement"] == 1
    noisy = make_decoder(noise=0.05, last=last)
    lossy = verify_step(reference, noisy, exact=False)
    assert lossy["kl"] == max(lossy["prefill_kl"], lossy["decode_kl"], lossy["padded_kl"]) > 1e-4
    with pytest.raises(VerificationError, match=r"packing should be exact but differs .* by \d\.\d+; .* is 0\.001"):
        verify_step(reference, noisy, exact=True, what="packing")


def test_a_destroyed_model_is_refused_even_when_lossy(make_decoder: Make) -> None:
    reference = Reference.of(make_decoder())
    with pytest.raises(VerificationError, match="destroyed"):
        verify_step(reference, make_decoder(noise=3.0), exact=False)


def test_not_a_number(make_decoder: Make) -> None:
    path = make_decoder()
    reference = Reference.of(path)
    model = onnx.load(path)
    for tensor in model.graph.initializer:
        if tensor.name == "up1":
            tensor.CopyFrom(numpy_helper.from_array(np.full((32, 64), np.nan, np.float32), "up1"))
    onnx.save(model, path)
    with pytest.raises(VerificationError, match=r"int8: prefill: .* NaN"):
        verify_step(reference, path, exact=False, what="int8")


def test_encoders_alone_and_padded(make_encoder: Make) -> None:
    reference = Reference.of(make_encoder())
    assert verify_step(reference, make_encoder(), exact=True)["cosine_min"] == pytest.approx(1)
    with pytest.raises(VerificationError, match="should be exact"):
        verify_step(reference, make_encoder(blind=True), exact=True)
    assert verify_step(reference, make_encoder(noise=0.05), exact=False)["cosine_mean"] < 1


def test_any_graph(tmp_path: Path) -> None:
    text = """<ir_version: 10, opset_import: ["" : 21]>
    g (float[batch, 3, height, width] pixel_values, int32[4] other) => (float[batch, 3] scores, int32[4] kept) {
        scores = ReduceMean<keepdims = 0>(pixel_values, axes)
        axes = Constant<value = int64[2] {2, 3}>()
        kept = Identity(other)
    }"""
    lines = text.splitlines()
    lines[2], lines[3] = lines[3], lines[2]
    onnx.save(onnx.parser.parse_model("\n".join(lines)), tmp_path / "a.onnx")
    onnx.save(onnx.parser.parse_model("\n".join(lines).replace("ReduceMean", "ReduceMax")), tmp_path / "b.onnx")
    reference = Reference.of(tmp_path / "a.onnx")
    assert reference.kind == "graph"
    assert verify_step(reference, tmp_path / "a.onnx", exact=True)["max_difference"] == 0
    with pytest.raises(VerificationError):
        verify_step(reference, tmp_path / "b.onnx", exact=True)


def test_another_kind_of_graph(make_decoder: Make, make_encoder: Make) -> None:
    with pytest.raises(VerificationError, match="has kind encoder"):
        verify_step(Reference.of(make_decoder()), make_encoder(), exact=True)

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from onnxpress.errors import CorruptFileError, SourceNotFoundError, UsageError
from onnxpress.evaluation.benchmark import benchmark, size_bytes
from onnxpress.runtime.memory import peak_rss_bytes
from onnxpress.runtime.operator_profile import operator_times

Make = Callable[..., Path]


def test_a_decoder(make_decoder: Make) -> None:
    path = make_decoder()
    found = benchmark(path, prompt=32, context=(4, 16), threads=1, repeats=1, profile=True)
    assert found.kind == "decoder"
    assert found.prefill_tokens_per_s is not None
    assert found.prefill_tokens_per_s > 100
    assert found.decode_ms_per_token.keys() == {"4", "16"}
    assert found.size_bytes == path.stat().st_size
    assert 20e6 < found.peak_rss_bytes < 500e6
    assert {"MatMul", "GroupQueryAttention"} <= {row.operator for row in found.operators}
    assert sum(row.share for row in found.operators) == pytest.approx(1)
    times = [row.milliseconds for row in found.operators]
    assert times == sorted(times, reverse=True)
    assert json.loads(json.dumps(found.to_dict()))["threads"] == 1


def test_an_encoder_and_its_folder(make_encoder: Make) -> None:
    found = benchmark(make_encoder().parent, repeats=1)
    assert (found.kind, found.prefill_tokens_per_s) == ("encoder", None)
    assert found.latency_ms is not None
    assert 0 < found.latency_ms < 1000


def test_the_peak_is_the_child_s_own(make_decoder: Make) -> None:
    ballast = np.ones(40_000_000)  # 320 MB in this process must not show in the child
    assert peak_rss_bytes() > ballast.nbytes
    assert benchmark(make_decoder(), prompt=8, context=(4,), repeats=1).peak_rss_bytes < ballast.nbytes


def test_external_data_counts(make_decoder: Make, tmp_path: Path) -> None:
    path = tmp_path / "big" / "model.onnx"
    path.parent.mkdir()
    model = onnx.load(make_decoder())
    onnx.save(model, path, save_as_external_data=True, location="model.onnx_data", size_threshold=0)
    assert size_bytes(path) == sum(file.stat().st_size for file in path.parent.iterdir())


def test_errors_come_back_as_they_were(make_decoder: Make, tmp_path: Path) -> None:
    with pytest.raises(SourceNotFoundError):
        benchmark(tmp_path / "none.onnx")
    with pytest.raises(UsageError, match="unknown session option"):
        benchmark(make_decoder(), session_options={"session.spin": "1"})
    (tmp_path / "broken.onnx").write_bytes(b"no graph")
    with pytest.raises(CorruptFileError, match=r"broken\.onnx"):
        benchmark(tmp_path / "broken.onnx")


def test_profiles_are_summed_by_operator(tmp_path: Path) -> None:
    def event(name: str, operator: str, duration: int, category: str = "Node") -> dict[str, object]:
        return {"cat": category, "name": name, "dur": duration, "args": {"op_name": operator}}

    events = [
        event("a_kernel_time", "Add", 1000),
        event("b_kernel_time", "MatMul", 2000),
        event("c_kernel_time", "Add", 1000),
        event("c_fence_before", "Add", 9000),
        event("model_run", "", 9000, "Session"),
    ]
    (tmp_path / "p.json").write_text(json.dumps(events))
    more = [event("choice_kernel_time", "If", 5000), event("inside_kernel_time", "MatMul", 4000)]
    (tmp_path / "q.json").write_text(json.dumps(more))
    rows = operator_times(tmp_path / "p.json", tmp_path / "q.json")
    assert [(row.operator, row.calls, row.milliseconds) for row in rows] == [("MatMul", 2, 6), ("Add", 2, 2)]
    assert [row.share for row in rows] == [0.75, 0.25]

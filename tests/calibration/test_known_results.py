"""Results that are known: of a weight, as long as it holds what it did."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from onnxpress.calibration.calibration import Calibration
from onnxpress.calibration.known_results import KnownResults, digest_of


class Discarded(Calibration):
    count = 0

    def discard(self) -> None:
        type(self).count += 1


def weight(array: np.ndarray) -> ir.Value:
    value = ir.Value(name="w")
    value.const_value = ir.tensor(array, name="w")
    return value


def test_a_result_counts_for_one_fit_one_name_and_one_content() -> None:
    known, result = KnownResults(), {"weight": ir.tensor(np.ones(3, np.float32))}
    known.add("prune", "w", b"before", result)
    assert known.find("prune", "w", b"before") is result
    assert known.find("prune", "w", b"other") is None
    assert known.find("prune", "v", b"before") is None
    assert known.find("repair", "w", b"before") is None


def test_the_latest_content_counts() -> None:
    known = KnownResults()
    known.add("prune", "w", b"first", {})
    known.add("prune", "w", b"second", {})
    assert known.find("prune", "w", b"first") is None
    assert known.find("prune", "w", b"second") == {}


def test_digests_tell_contents_apart() -> None:
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    assert digest_of(weight(array)) == digest_of(weight(array.copy()))
    assert digest_of(weight(array)) != digest_of(weight(array + np.float32(1e-6)))


def test_files_go_when_results_do() -> None:
    known = KnownResults()
    known.add("prune", "w", b"before", {})
    known.keep_files([Discarded(), Discarded()])
    known.discard()
    known.discard()
    assert Discarded.count == 2
    assert known.find("prune", "w", b"before") is None

"""Results of fits that are known already: of a weight that several graphs share, or of an earlier run of a pass."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

import numpy as np
import onnx_ir as ir

from onnxpress.calibration.calibration import Calibration

Result = Mapping[str, ir.TensorProtocol]


class KnownResults:
    """The latest result of each weight, as long as the weight holds what it held when it was fitted.

    So what was fitted in the first graph of a model is the same in the others, as in an encoder-decoder's two decoders.
    """

    def __init__(self) -> None:
        self._found: dict[tuple[str, str], tuple[bytes, Result]] = {}
        self._calibrations: list[Calibration] = []

    def find(self, fit: str, name: str, digest: bytes) -> Result | None:
        """The result of the fit called `fit` for a weight, by its name and the digest of what it held before."""
        known, result = self._found.get((fit, name), (b"", None))
        return result if known == digest else None

    def add(self, fit: str, name: str, digest: bytes, result: Result) -> None:
        self._found[fit, name] = digest, result

    def keep_files(self, calibrations: Iterable[Calibration]) -> None:
        """Leave the files of calibrations in place, which results are read from, until they are discarded."""
        self._calibrations += calibrations

    def discard(self) -> None:
        """Forget everything and remove the files."""
        self._found.clear()
        while self._calibrations:
            self._calibrations.pop().discard()


def digest_of(weight: ir.Value) -> bytes:
    """Tell what an initializer holds, 16 bytes; it is read now."""
    assert weight.const_value is not None
    array = np.ascontiguousarray(weight.const_value.numpy()).view(np.uint8)
    return hashlib.blake2b(array.data, digest_size=16).digest()

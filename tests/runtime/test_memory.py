from __future__ import annotations

import numpy as np
import pytest

from onnxpress.runtime import memory


def test_figures_are_those_of_the_system_or_an_estimate(monkeypatch: pytest.MonkeyPatch) -> None:
    ballast = np.ones(4_000_000)
    assert memory.peak_rss_bytes() > ballast.nbytes
    assert memory.available_memory() > 0
    monkeypatch.setattr(memory, "_proc_bytes", lambda path, key: None)  # as where there is no /proc
    assert memory.peak_rss_bytes() > ballast.nbytes
    assert memory.available_memory() > 0


def test_what_a_file_of_proc_does_not_say() -> None:
    assert memory._proc_bytes("/proc/self/status", "VmHWM") is not None
    assert memory._proc_bytes("/proc/self/status", "VmNothing") is None
    assert memory._proc_bytes("/proc/none", "VmHWM") is None

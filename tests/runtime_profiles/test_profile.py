"""Profiles: the schema refuses what it does not know, and `cpu` finds the profile of the host."""

from __future__ import annotations

from pathlib import Path

import pytest

from onnxpress.errors import UsageError
from onnxpress.runtime_profiles import profile

TOML = """
name = "{name}"
description = "for the test"
[host]
architecture = ["x86_64"]
flags = {flags}
priority = {priority}
[recipes]
default = "plain"
text-generation = "decoder"
"""


def test_a_file_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "board.toml"
    path.write_text(TOML.format(name="board", flags="[[]]", priority=1))
    found = profile.load_profile(str(path))
    assert found.name == "board"
    assert found.recipe_for("text-generation-with-past") == "decoder"
    assert found.recipe_for("feature-extraction") == "plain"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("nam = 1", "nam: Extra inputs"),
        ("name = ", "not TOML"),
        ('[session_options]\n"session.intra_op.allow_spining" = "1"', "allow_spining"),
    ],
)
def test_what_is_wrong_is_said(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "board.toml"
    text = TOML.format(name="board", flags="[[]]", priority=1)
    path.write_text(f"{text}{line}" if line.startswith("[") else f"{line}\n{text}")
    with pytest.raises(UsageError, match=message):
        profile.load_profile(str(path))


def test_an_unknown_profile_names_the_nearest() -> None:
    with pytest.raises(UsageError, match="unknown profile: cpux") as caught:
        profile.load_profile("cpux")
    assert caught.value.hint == "did you mean cpu?"


@pytest.mark.parametrize(
    ("machine", "flags", "expected"),
    [
        ("x86_64", {"avx2"}, "plain"),
        ("x86_64", {"avx2", "vnni"}, "better"),
        ("x86_64", {"avx2", "avx_vnni"}, "better"),
        ("x86_64", set(), None),
        ("riscv64", {"avx2"}, None),
    ],
)
def test_detection_takes_the_best_that_fits(
    monkeypatch: pytest.MonkeyPatch, machine: str, flags: set[str], expected: str | None
) -> None:
    files = {
        "plain": TOML.format(name="plain", flags='[["avx2"]]', priority=1),
        "better": TOML.format(name="better", flags='[["vnni"], ["avx_vnni"]]', priority=2),
    }
    monkeypatch.setattr(profile, "_files", lambda: files)
    if expected is None:
        with pytest.raises(UsageError, match="no CPU profile fits"):
            profile.detect_profile(machine, frozenset(flags))
    else:
        assert profile.detect_profile(machine, frozenset(flags)).name == expected


@pytest.mark.parametrize("name", profile.profile_names()[1:])
def test_every_profile_in_the_package_is_valid(name: str) -> None:
    found = profile.load_profile(name)
    assert found.name == name


@pytest.mark.parametrize(
    ("machine", "flags", "expected"),
    [
        ("x86_64", {"avx2", "fma"}, "cpu-x86-avx2"),
        ("x86_64", {"avx2", "fma", "avx512f", "avx512bw", "avx512_vnni"}, "cpu-x86-vnni"),
        ("x86_64", {"avx2", "fma", "avx_vnni"}, "cpu-x86-vnni"),
        ("aarch64", {"asimd", "asimddp"}, "cpu-arm64"),
        ("arm64", set(), "cpu-arm64"),
    ],
)
def test_real_machines(machine: str, flags: set[str], expected: str) -> None:
    assert profile.detect_profile(machine, frozenset(flags)).name == expected

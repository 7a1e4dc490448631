"""The wheel, built and installed elsewhere, holds every module and data file under one top-level name."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import onnxpress

PACKAGE = Path(onnxpress.__file__).parent
ROOT = PACKAGE.parents[1]

IMPORT_ALL = """
import importlib, pathlib, pkgutil, sys
import onnxpress
assert pathlib.Path(onnxpress.__file__).is_relative_to(sys.argv[1]), onnxpress.__file__
for module in pkgutil.walk_packages(onnxpress.__path__, "onnxpress.", onerror=print):
    found = importlib.import_module(module.name)
    assert pathlib.Path(found.__file__).is_relative_to(sys.argv[1]), found.__file__
    print(module.name)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--outdir", folder, ROOT],
        check=True,
        capture_output=True,
        text=True,
    )
    (path,) = folder.glob("*.whl")
    return path


@pytest.mark.slow
def test_everything_is_under_one_name(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"onnxpress"}


@pytest.mark.slow
def test_every_source_and_data_file_is_in_it(wheel: Path) -> None:
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("onnxpress/")}
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    folders = ("exporter/", "optimizers/", "runtime_profiles/", "models/")
    expected = {f"onnxpress/{name}" for name in tracked if name.startswith(folders)}
    links = {name.rstrip("/") for name in folders}
    expected |= {
        name.removeprefix("src/")
        for name in tracked
        if name.startswith("src/onnxpress/") and name.removeprefix("src/onnxpress/") not in links
    }
    assert "onnxpress/py.typed" in packed
    assert sorted(expected - packed) == [], "package_data in setup.cfg leaves it out"


@pytest.mark.slow
def test_installed_elsewhere_every_module_can_be_imported(wheel: Path, tmp_path: Path) -> None:
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", tmp_path / "site", wheel]
    subprocess.run(install, check=True, capture_output=True)
    assert not (tmp_path / "site" / "models").exists()
    result = subprocess.run(
        [sys.executable, "-P", "-c", IMPORT_ALL, tmp_path / "site"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    imported = result.stdout.split()
    for folder in ("exporter", "optimizers", "runtime_profiles", "models"):
        assert f"onnxpress.{folder}" in imported

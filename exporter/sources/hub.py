"""Checkpoints from the Hugging Face hub, through huggingface_hub and its cache.

HF_HUB_OFFLINE, HF_ENDPOINT, HF_TOKEN and HF_HOME mean what they mean there. One quick request tells whether the hub
answers, before any download: without a network this takes seconds, not a minute of retries.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onnxpress.errors import SourceNotFoundError, UnsafeInputError, UsageError

Say = Callable[[str], None]

PROBE_SECONDS = 5.0
"""How long the hub may take to answer the first request."""

_SIDECAR_FILES = ["*.json", "*.jinja", "*.model", "*.txt", "*.spm", "LICENSE*"]
_SAFETENSORS, _PICKLES = "model*.safetensors", "pytorch_model*.bin"
_ELSEWHERE = ["onnx/*", "openvino/*", "original/*", "coreml/*", "runs/*", ".*"]
"""Other formats and leftovers that repositories carry."""


@dataclass(frozen=True)
class Snapshot:
    """A downloaded repository."""

    folder: Path
    revision: str
    """The commit."""
    licence: str | None = None
    """As the repository's card says; unknown when it comes from the cache."""


def parse_reference(text: str) -> tuple[str, str | None]:
    """`owner/name[@revision]` -> repository and revision.

    Raises:
        UsageError: not of that form.
    """
    match = re.fullmatch(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?", text)
    if match is None or ".." in text:
        raise UsageError(f"hf:{text} is not a repository", hint="write hf:owner/name or hf:owner/name@revision")
    return match[1], match[2]


def fetch_snapshot(
    repository: str,
    revision: str | None = None,
    *,
    allow_pickle: bool = False,
    offline: bool = False,
    say: Say = lambda _: None,
) -> Snapshot:
    """Download the files of a checkpoint that are missing in the hub's cache.

    Raises:
        SourceNotFoundError: no such repository or revision, no access, no weights, or no network and not in the cache.
        UnsafeInputError: the repository holds pickled weights only.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import OfflineModeIsEnabled

    if offline or constants.HF_HUB_OFFLINE:
        why = "--offline" if offline else "HF_HUB_OFFLINE is set"
        return _from_cache(repository, revision, allow_pickle, f"the hub may not be asked ({why})")
    try:
        info = HfApi().model_info(repository, revision=revision, timeout=PROBE_SECONDS)
    except OfflineModeIsEnabled:
        return _from_cache(repository, revision, allow_pickle, "the hub may not be asked (HF_HUB_OFFLINE is set)")
    except Exception as error:  # huggingface_hub lets its HTTP client's exceptions through, whichever client it is
        if refusal := _explain(repository, revision, error):
            raise refusal from error
        return _from_cache(repository, revision, allow_pickle, f"the hub does not answer ({_one_line(error)})")
    names = [sibling.rfilename for sibling in info.siblings or ()]
    patterns = [*_SIDECAR_FILES, _weights_pattern(repository, names, allow_pickle)]
    say(f"fetching {repository} from the hub")
    folder = _download(repository, revision, patterns)
    card = info.card_data
    licence = card.get("license") if card is not None else None
    return Snapshot(folder, folder.name, licence if isinstance(licence, str) else None)


def _download(repository: str, revision: str | None, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(repository, revision=revision, allow_patterns=patterns, ignore_patterns=_ELSEWHERE)
    except Exception as error:  # as above: refused, interrupted, or a full disk
        raise _explain(repository, revision, error) or SourceNotFoundError(
            f"{repository} could not be fetched from the hub: {_one_line(error)}",
            hint="run again: what has arrived is kept",
        ) from error
    return Path(folder)


def _weights_pattern(repository: str, names: Iterable[str], allow_pickle: bool) -> str:
    """The files to fetch for weights: safetensors, or pickles if allowed."""
    top = [name for name in names if "/" not in name]
    if any(re.fullmatch(r"model.*\.safetensors", name) for name in top):
        return _SAFETENSORS
    if any(re.fullmatch(r"pytorch_model.*\.bin", name) for name in top):
        if allow_pickle:
            return _PICKLES
        raise UnsafeInputError(
            f"{repository} holds its weights only as pickles (pytorch_model.bin)",
            hint="--allow-pickle reads them with torch's restricted unpickler; a safetensors revision is safer",
        )
    others = sorted({Path(name).suffix for name in top} & {".gguf", ".onnx", ".h5", ".msgpack"})
    holds = f"; it holds {', '.join(others)} files" if others else ""
    raise SourceNotFoundError(
        f"{repository} has no safetensors weights{holds}",
        hint="download the file yourself and give its path, or name the original repository",
    )


def _from_cache(repository: str, revision: str | None, allow_pickle: bool, why: str) -> Snapshot:
    """The complete snapshot that an earlier run left in the hub's cache."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    for weights in (_SAFETENSORS, _PICKLES) if allow_pickle else (_SAFETENSORS,):
        try:
            patterns = [*_SIDECAR_FILES, weights]
            folder = snapshot_download(
                repository,
                revision=revision,
                allow_patterns=patterns,
                ignore_patterns=_ELSEWHERE,
                local_files_only=True,
            )
        except LocalEntryNotFoundError:
            continue
        return Snapshot(Path(folder), Path(folder).name)
    raise SourceNotFoundError(
        f"{repository} is not in the hub's cache, and {why}",
        hint="connect to the network, or give a local folder, a .gguf or a catalog name",
    )


def _explain(repository: str, revision: str | None, error: Any) -> SourceNotFoundError | None:
    """The answer of a hub that was reached; None when it was not, or answered with a failure of its own."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    if isinstance(error, GatedRepoError):
        return SourceNotFoundError(
            f"{repository} is gated: the hub wants its terms accepted",
            hint="accept them on its page on the hub, then log in (`hf auth login`) or set HF_TOKEN",
        )
    if isinstance(error, RevisionNotFoundError):
        return SourceNotFoundError(
            f"{repository} has no revision {revision}", hint="name a branch, a tag or a full commit hash"
        )
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, RepositoryNotFoundError) or status in (401, 403, 404):
        return SourceNotFoundError(
            f"the hub knows no repository {repository}, or it is private",
            hint="check the spelling (owner/name); for a private one, log in (`hf auth login`) or set HF_TOKEN",
        )
    return None


def _one_line(error: BaseException) -> str:
    text = re.sub(r"\s+", " ", str(error)).strip()
    return (text[:160] + "…") if len(text) > 160 else text or type(error).__name__

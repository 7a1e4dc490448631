"""A decoder whose answers are kept in files: a reference that is asked the same for every candidate."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from onnxpress.arrays import Floats, Ids


@dataclass
class CachedDecoder:
    """`prefill` and `decode` as `DecoderSession` has them. The model behind it is only opened for what was not asked
    before, and need not be in memory together with the one that it is compared with."""

    open: Callable[[], Any]
    """Opens the decoder."""
    folder: Path
    """For the answers; made if it is not there."""
    vocabulary: int
    last_only: bool = False
    model: Any = None
    """The decoder, while it is open."""
    _requested: list[tuple[Ids, Ids | None]] = field(default_factory=list)
    """The prompt, and what followed it."""
    _reached: list[str] = field(default_factory=list)
    """Digests of what the model itself was given of a sequence."""

    def close(self) -> None:
        """Let go of the model, if it is open."""
        self.model, self._reached = None, []

    def prefill(self, ids: Ids, mask: Ids | None = None) -> Floats:
        self._requested = [(ids, mask)]
        return self._answer()

    def decode(self, ids: Ids) -> Floats:
        self._requested.append((ids, None))
        return self._answer()

    def _answer(self) -> Floats:
        path = self.folder / f"{self._digests()[-1]}.npy"
        if not path.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            np.save(path, self._run())
        answer: Floats = np.load(path, mmap_mode="r", allow_pickle=False)
        return answer

    def _run(self) -> Floats:
        """Bring the model to where the sequence stands, and take its last answer."""
        if self.model is None:
            self.model = self.open()
        digests = self._digests()
        known = len(self._reached)
        if not 0 < known < len(digests) or self._reached != digests[:known]:
            known = 0
        for position, (ids, mask) in enumerate(self._requested[known:], start=known):
            answer = self.model.prefill(ids, mask) if position == 0 else self.model.decode(ids)
        self._reached = digests
        result: Floats = answer
        return result

    def _digests(self) -> list[str]:
        """Digest the sequence after each call."""
        digest, found = hashlib.blake2b(digest_size=16), []
        for arrays in self._requested:
            for array in arrays:
                if array is not None:
                    digest.update(f"{array.shape}".encode() + np.ascontiguousarray(array, np.int64).tobytes())
            digest.update(b"/")
            found.append(digest.copy().hexdigest())
        return found

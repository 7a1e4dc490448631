"""Sample inputs for passes that look at activations: text that the reference writes, or the built-in sentences."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxpress.opening import open_model, random_feeds
from onnxpress.runtime import EncoderSession
from onnxpress.samples import encoder_rows
from onnxpress.texts import pad, written_windows

ROWS, LENGTH = 4, 64
SEED = 1
"""Not evaluation's, so that nothing is judged on the text that it was fitted to."""


def sample_feeds(graph: Path, threads: int | None = None) -> list[dict[str, NDArray[Any]]]:
    """Inputs by name for one or more runs of `graph`; an empty key/value cache is left out.

    A decoder writes `ROWS` texts of `LENGTH` tokens; an encoder gets sentences, a graph of neither kind random inputs.
    An encoder-decoder has none yet.
    """
    opened = open_model(graph, threads=threads)
    if opened.kind == "decoder":
        ids = np.concatenate(written_windows(opened.model, ROWS, LENGTH, opened.starts, SEED))
        positions = np.broadcast_to(np.arange(ids.shape[1]), ids.shape).copy()
        return [{"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": positions}]
    if opened.kind == "encoder":
        rows, _ = encoder_rows((opened,), None, LENGTH, SEED)
        ids, mask = pad(rows[:32])
        return [{"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}]
    if isinstance(opened.model, EncoderSession):
        return [random_feeds(opened.model, opened.config, SEED)]
    return []

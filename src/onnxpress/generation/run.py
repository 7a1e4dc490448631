"""`onnxpress run`: a model tried on the spot, whatever it does with text."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from onnxpress.errors import SourceNotFoundError, UsageError
from onnxpress.evaluation.kind import Opened
from onnxpress.evaluation.metrics import cosine
from onnxpress.generation.generate import TextGenerator, embed


def run_prompts(
    folder: Path,
    prompts: Sequence[str],
    *,
    open_folder: Callable[..., Opened],
    on_text: Callable[[str], None],
    max_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    raw: bool,
    threads: int | None,
) -> dict[str, Any]:
    """Answer one prompt, each piece of text going to `on_text` at once; or embed texts.

    open_folder: `open_model`, or what opens more than ONNX.

    Returns `prompt`, `text`, `pieces` and `pieces_per_s`; for encoders `texts`, each with its `cosine` to the first and
    its `embedding`.
    """
    if not folder.exists():
        raise SourceNotFoundError(f"no such folder: {folder}", hint="make one with: onnxpress build MODEL")
    opened = open_folder(folder, threads=threads)
    if opened.embeds_text:
        vectors = embed(opened, prompts)
        cosines = cosine(vectors, vectors[:1]).tolist()
        rows = zip(prompts, cosines, vectors.tolist(), strict=True)
        return {"texts": [{"text": text, "cosine": value, "embedding": vector} for text, value, vector in rows]}
    if len(prompts) > 1:
        raise UsageError("a decoder takes one prompt", hint="put it in quotes")
    generator = TextGenerator(opened)
    began, pieces = time.perf_counter(), []
    for piece in generator.stream(
        prompts[0], raw=raw, max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed
    ):
        pieces.append(piece)
        on_text(piece)
    speed = len(pieces) / (time.perf_counter() - began)
    return {"prompt": prompts[0], "text": "".join(pieces), "pieces": len(pieces), "pieces_per_s": speed}

"""How good a model is compared with its reference: on a prompt, on cached decoding, and in a padded batch.

Checking one of the three is not enough: integer activations that look fine one token at a time can lose half of a long
prompt, and a graph that is right on one row can be wrong on a padded one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from onnxpress.arrays import Ids
from onnxpress.errors import BadInputError
from onnxpress.evaluation.opening import Opened, open_model
from onnxpress.evaluation.quality import Evaluation
from onnxpress.evaluation.reading import compare_reading
from onnxpress.evaluation.restriction import restricted
from onnxpress.evaluation.samples import decoder_windows
from onnxpress.evaluation.text_quality import evaluate_decoders, evaluate_translators
from onnxpress.evaluation.texts import Progress, load_tokenizer
from onnxpress.evaluation.vector_quality import evaluate_encoders, evaluate_graphs

__all__ = ["Evaluation", "evaluate"]


def evaluate(
    candidate: Any,
    reference: Any,
    *,
    text: str | Path | Sequence[Ids] | None = None,
    pairs: str | Path | None = None,
    windows: int = 8,
    window: int = 512,
    decode_steps: int = 64,
    seed: int = 0,
    task: str | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Measure `candidate` against `reference`; either is a path (ONNX file, artifact, checkpoint) or a Checkpoint.

    `text` is a file, or windows of token ids [1, length]; by default the reference writes it. `pairs` (encoders) is a
    file of sentence, sentence, score. Decoders are measured on `windows` pieces of `window` tokens, the second half of
    the first few also by cached decoding of `decode_steps` tokens.

    Raises VerificationError where an output is NaN or infinite, BadInputError where the two cannot be compared.
    """
    measured, against = (
        open_model(what, task=task, threads=threads, all_logits=True) for what in (candidate, reference)
    )
    words = restricted(against, measured.folder)  # the reference, with the candidate's vocabulary
    if "graph" in (measured.kind, against.kind):
        return evaluate_graphs(measured, against, seed)
    if measured.kind != against.kind:
        raise BadInputError(f"{measured.name} is a {measured.kind}, {against.name} a {against.kind}")
    if measured.kind == "decoder":
        if pairs is not None:
            raise BadInputError("pairs are for encoders", hint="give --text for a decoder")
        _same_vocabulary(measured, words)
        pieces, source = decoder_windows(measured, words, text, windows, window, seed, progress)
        found = evaluate_decoders(measured, words, pieces, source, decode_steps, progress)
        if words is not against:
            figures: dict[str, Any] = dict(compare_reading(measured, against, pieces))
            found = replace(found, **figures)
        return found
    if measured.kind == "encoder":
        is_text = text is None or isinstance(text, str | Path)
        reads = is_text and load_tokenizer(against.folder) is not None  # each side with its own tokenizer
        return evaluate_encoders(measured, against if reads else words, text, pairs, window, seed, progress)
    return evaluate_translators(measured, words, text, min(windows, 4), min(window, 64), progress)


def _same_vocabulary(a: Opened, b: Opened) -> None:
    sizes = [int(getattr(opened.model, "vocabulary", 0)) for opened in (a, b)]
    if all(sizes) and sizes[0] != sizes[1]:
        raise BadInputError(f"different vocabularies: {a.name} has {sizes[0]} tokens, {b.name} has {sizes[1]}")

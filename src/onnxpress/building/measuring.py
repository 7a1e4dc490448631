"""Measurements during a build: always against the same reference, on the same inputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from onnxpress.arrays import Ids
from onnxpress.building.resolving import open_checkpoint
from onnxpress.errors import VerificationError
from onnxpress.evaluation.benchmark import benchmark
from onnxpress.evaluation.evaluate import Evaluation, evaluate
from onnxpress.evaluation.kind import Opened, Options
from onnxpress.evaluation.opening import open_model, sidecar_folder
from onnxpress.evaluation.restriction import restricted
from onnxpress.evaluation.verification import (
    EXACT_TOLERANCE,
    Reference,
    cost_of,
    largest_difference,
    verify_step,
)
from onnxpress.graph.conventions import ENCODER
from onnxpress.progress import Update
from onnxpress.requests import Judging
from onnxpress.runtime.memory import trim_memory

WINDOWS, WINDOW, SEED = 4, 512, 0
"""Pieces of text, and tokens in each, on which a decoder is judged; both sides see the same: their ratio is steady."""
CONTEXT = 256
"""Tokens in the cache at which decoding is reported."""
STEP_TOKENS = 128
"""Tokens in each of the two windows by which the perplexity after every pass is told."""
TIPPED_TOLERANCE = 0.1
"""What cutting the logits may change after a lossy pass: rounding, reordered, tips a few quantized activations."""
TIPPED, TIPPED_SHARE = 1e-3, 3.0
"""What any exact pass may cost after a lossy one, as KL or 1 − cosine: this much, or this many times of what was lost
by then. Where all tipped activations round another way, two equally good models are apart by twice their loss."""


@dataclass
class Meter:
    """The reference graph, and what it computes for a few inputs."""

    reference: Mapping[str, Path]
    judging: Judging
    session_options: Mapping[str, str]
    _expected: Reference | None = None
    _windows: tuple[list[Ids], str] | None = None
    """What a decoder is measured on, after every pass and at the end, and where it comes from."""
    _lost: float = 0.0
    """What the passes until now cost, see `cost_of`."""
    _remembered: Opened | None = None
    """A decoder's reference, whose answers are kept for one evaluation after another."""
    _folder: Path | None = None
    """The folder of the tokenizer in whose vocabulary the three above are."""

    def check_export(self, checkpoint: Any, task: str, *, exact: bool = True) -> dict[str, float]:
        """The exported graph against torch; not `exact` if its weights were rounded. Raises VerificationError."""
        # torch and the graph take turns, where the graph has no part in the inputs but to write them: memory holds one.
        exported = self._open(self.reference)
        windows = exported.verified_windows()
        like = None if windows is not None else exported
        del exported
        expected = Reference.of(open_checkpoint(checkpoint, task), windows=windows, like=like)
        trim_memory()
        exported = like or self._open(self.reference)
        metrics = verify_step(expected, exported, exact=exact, what="the exported graph")
        metrics.pop("perplexity", None)  # later steps are measured on longer text: side by side they would mislead
        return metrics

    def check_step(
        self, what: str, after: Mapping[str, Path], before: Mapping[str, Path], *, exact: bool, lossy: bool
    ) -> dict[str, float]:
        """Measure what a pass changed: an exact one against the graph before it, a lossy one against the reference.

        `lossy`: whether a pass before it was. Raises VerificationError.
        """
        folder = sidecar_folder(main_graph(after))
        if exact and lossy:
            expected = Reference.of(restricted(self._open(before), folder))
            metrics = verify_step(expected, self._open(after), exact=False, what=what)
            cost, limit = cost_of(metrics), max(TIPPED, TIPPED_SHARE * self._lost)
            if not cost <= limit:
                raise VerificationError(
                    f"{what} should be exact but costs {cost:.3g}; the limit is {limit:.3g}, after passes that lost "
                    f"{self._lost:.3g}"
                )
            return {"max_difference": metrics["max_difference"]}  # the rest would not compare with the reference
        self._reset_other_vocabulary(folder)
        if self._expected is None:
            reference = restricted(self._open(self.reference), folder)
            text = self._text(reference)
            self._expected = Reference.of(reference, windows=text[0] if text else None, length=STEP_TOKENS)
            del reference
            trim_memory()
        metrics = verify_step(self._expected, self._open(after), exact=exact, tolerance=EXACT_TOLERANCE, what=what)
        self._lost = cost_of(metrics)
        return metrics

    def check_last(self, after: Mapping[str, Path], before: Mapping[str, Path], *, lossy: bool) -> dict[str, float]:
        """A decoder with the last position's logits only against the one with all, on the very same prompts.

        Raises VerificationError.
        """
        whole, cut = (partial(self._open, paths, all_logits=False) for paths in (before, after))
        difference = largest_difference(whole, cut, ("all logits", "the last logits"))
        limit = TIPPED_TOLERANCE if lossy else EXACT_TOLERANCE
        if not difference <= limit:
            raise VerificationError(f"cutting the logits changed them by {difference:.3g}; the tolerance is {limit:g}")
        return {"max_difference": difference}

    def check_merged(self, after: Mapping[str, Path], before: Mapping[str, Path]) -> dict[str, float]:
        """Merged decoders against the two that they were made of, on the very same batch: see `check_last`.

        Raises VerificationError.
        """
        two, merged = (partial(self._open, paths) for paths in (before, after))
        difference = largest_difference(two, merged, ("the decoders", "the merged decoder"))
        if difference > EXACT_TOLERANCE:
            raise VerificationError(
                f"the merged decoder differs from its parts by {difference:.3g}; the tolerance is {EXACT_TOLERANCE:g}"
            )
        return {"max_difference": difference}

    def evaluate(self, candidate: Mapping[str, Path], update: Update) -> Evaluation:
        """The figures that the artifact is judged by."""
        self._expected = None  # its memory is better used elsewhere
        folder = sidecar_folder(main_graph(candidate))
        self._reset_other_vocabulary(folder)
        reference = self._requested_reference(folder)
        text = self._text(restricted(reference, folder))
        trim_memory()
        found = evaluate(
            self._open(candidate),
            reference,
            text=text[0] if text else self.judging.text,
            pairs=self.judging.pairs,
            windows=WINDOWS,
            threads=self.judging.threads,
            progress=update,
        )
        return replace(found, text=text[1]) if text else found

    def _requested_reference(self, folder: Path | None) -> Opened:
        """Open the reference; one whose answers are kept has given all that `evaluate` will request, and is not in
        memory any more.

        folder: of the tokenizer of what it will be compared with.
        """
        if self._remembered is not None:
            return self._remembered
        graph = main_graph(self.reference)
        reference = self._open_reference(graph)
        text = self._text(restricted(reference, folder))
        remembered = reference.remembered(lambda: self._open_reference(graph).model, graph.parent / "answers")
        if remembered is None or text is None:
            return reference
        self._remembered = remembered
        seen = restricted(remembered, folder)
        evaluate(seen, seen, text=text[0], windows=WINDOWS, threads=self.judging.threads)
        remembered.model.close()
        return remembered

    def _reset_other_vocabulary(self, folder: Path | None) -> None:
        """Forget what is in another vocabulary than that of the tokenizer in `folder`."""
        if folder != self._folder:
            self._expected = self._windows = self._remembered = None
            self._folder = folder

    def _text(self, reference: Opened) -> tuple[list[Ids], str] | None:
        """Windows of token ids from the user's text or of the reference's own, made once; None where the kind of model
        is measured on other inputs."""
        if self._windows is None:
            self._windows = reference.judged_windows(
                Options(self.judging.text, windows=WINDOWS, window=WINDOW, seed=SEED)
            )
        return self._windows

    def _open_reference(self, graph: Path) -> Opened:
        return open_model(graph, threads=self.judging.threads, all_logits=True)

    def _open(self, paths: Mapping[str, Path], all_logits: bool = True) -> Opened:
        graph = main_graph(paths)
        return open_model(
            graph, threads=self.judging.threads, session_options=self.session_options, all_logits=all_logits
        )


def main_graph(paths: Mapping[str, Path]) -> Path:
    """The graph by which a model is opened."""
    return next((path for name, path in paths.items() if name.startswith(ENCODER)), next(iter(paths.values())))


def figures(evaluation: Evaluation) -> dict[str, float]:
    """An evaluation as flat numbers: the headline figures, the loss, and each mode's as `kl_decode` and the like."""
    rows: dict[str, float] = {
        key: float(value)
        for key in ("perplexity", "kl", "top1_agreement", "cosine_mean", "cosine_min", "spearman", "more_tokens")
        if (value := getattr(evaluation, key)) is not None
    }
    rows["loss"] = evaluation.loss
    for mode, values in evaluation.modes.items():
        rows |= {f"{key}_{mode}": values[key] for key in ("kl", "perplexity", "cosine_min") if key in values}
    return rows


def speed(paths: Mapping[str, Path], threads: int | None, session_options: Mapping[str, str]) -> dict[str, float]:
    """Speed and memory of a graph on this machine, as flat numbers; decoding is at the context nearest to 256."""
    measured = benchmark(main_graph(paths), threads=threads, session_options=session_options).to_dict()
    rows: dict[str, float] = {
        key: float(measured[key])
        for key in ("prefill_tokens_per_s", "latency_ms", "load_s", "peak_rss_bytes")
        if key in measured
    }
    if decode := measured.get("decode_ms_per_token"):
        context = min(decode, key=lambda tokens: abs(int(tokens) - CONTEXT))
        rows["decode_ms_per_token"] = float(decode[context])
    return rows

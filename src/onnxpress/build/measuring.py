"""Measurements during a build: always against the same reference, on the same inputs."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from onnxpress.calibration.data import CalibrationData
from onnxpress.errors import VerificationError
from onnxpress.evaluation import probes
from onnxpress.evaluation.benchmark import benchmark
from onnxpress.evaluation.cached_decoder import RememberedDecoder
from onnxpress.evaluation.evaluate import Evaluation, evaluate
from onnxpress.evaluation.metrics import log_softmax, require_finite
from onnxpress.evaluation.opening import Opened, companions, open_model, random_feeds
from onnxpress.evaluation.restriction import restricted
from onnxpress.evaluation.samples import decoder_windows
from onnxpress.arrays import Ids
from onnxpress.evaluation.verification import EXACT_TOLERANCE, Reference, verify_step, windows_by
from onnxpress.graph.conventions import ENCODER
from onnxpress.progress import Update
from onnxpress.runtime.memory import give_back


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


@dataclass(frozen=True)
class Data:
    """What the user wants to be measured on, and calibrated with; by default the reference writes text itself."""

    text: Path | None = None
    pairs: Path | None = None
    calibration: CalibrationData = field(default_factory=CalibrationData)


@dataclass
class Meter:
    """The reference graph, and what it computes for a few inputs."""

    reference: Mapping[str, Path]
    data: Data
    threads: int | None
    session_options: Mapping[str, str]
    _expected: Reference | None = None
    _windows: tuple[list[Ids], str] | None = None
    """What a decoder is measured on, after every pass and at the end, and where it comes from."""
    _lost: float = 0.0
    """What the passes until now cost, see `_divergence`."""
    _answering: Opened | None = None
    """A decoder's reference, whose answers are kept for one evaluation after another."""
    _companions: Path | None = None
    """Whose vocabulary the three above are in."""

    def check_export(self, checkpoint: Any, task: str, *, exact: bool = True) -> dict[str, float]:
        """The exported graph against torch; not `exact` if its weights were rounded. Raises VerificationError."""
        # torch and the graph take turns: memory holds one of them.
        exported = self._open(self.reference)
        if exported.kind == "decoder":
            windows = windows_by(exported)
            del exported
            expected = Reference.of(checkpoint, task=task, windows=windows)
            give_back()
            exported = self._open(self.reference)
        else:
            expected = Reference.of(checkpoint, task=task, like=exported)
        found = verify_step(expected, exported, exact=exact, what="the exported graph")
        found.pop("perplexity", None)  # later steps are measured on longer text: side by side they would mislead
        return found

    def check_step(
        self, what: str, after: Mapping[str, Path], before: Mapping[str, Path], *, exact: bool, lossy: bool
    ) -> dict[str, float]:
        """What a pass changed: an exact one against the graph before it, a lossy one against the reference.

        `lossy`: whether a pass before it was. Raises VerificationError.
        """
        folder = companions(main_graph(after))
        if exact and lossy:
            expected = Reference.of(restricted(self._open(before), folder))
            found = verify_step(expected, self._open(after), exact=False, what=what)
            cost, limit = _divergence(found), max(TIPPED, TIPPED_SHARE * self._lost)
            if not cost <= limit:
                raise VerificationError(
                    f"{what} should be exact but costs {cost:.3g}; the limit is {limit:.3g}, after passes that lost "
                    f"{self._lost:.3g}"
                )
            return {"max_difference": found["max_difference"]}  # the rest would not compare with the reference
        self._speak(folder)
        if self._expected is None:
            self._expected = self._reference_outputs(folder)
            give_back()
        found = verify_step(self._expected, self._open(after), exact=exact, tolerance=EXACT_TOLERANCE, what=what)
        self._lost = _divergence(found)
        return found

    def check_last(self, after: Mapping[str, Path], before: Mapping[str, Path], *, lossy: bool) -> dict[str, float]:
        """A decoder with the last position's logits only against the one with all, on the very same prompts.

        Prompts of other lengths would not do: where activations share one range per prompt, each length has its own.
        Raises VerificationError.
        """
        ids = np.random.default_rng(0).integers(0, self._open(before).model.vocabulary, (2, 24))
        mask = np.ones_like(ids)
        mask[1, :7] = 0
        rows = []
        for paths in (before, after):
            model = self._open(paths, all_logits=False).model
            prompt, step = model.prefill(ids, mask), model.decode(ids[:, :1])
            rows.append(log_softmax(np.concatenate([prompt[:, -1:], step[:, -1:]])))
        difference = float(np.abs(rows[0] - rows[1]).max())
        limit = TIPPED_TOLERANCE if lossy else EXACT_TOLERANCE
        if not difference <= limit:
            raise VerificationError(f"cutting the logits changed them by {difference:.3g}; the tolerance is {limit:g}")
        return {"max_difference": difference}

    def check_merged(self, after: Mapping[str, Path], before: Mapping[str, Path]) -> dict[str, float]:
        """Merged decoders against the two that they were made of, on the very same batch: see `check_last`.

        Raises VerificationError.
        """
        two, merged = self._open(before), self._open(after)
        halves = [random_feeds(two.model.encoder, two.config, seed) for seed in (0, 1)]
        feeds = {name: np.concatenate([half[name] for half in halves]) for name in halves[0]}
        if "attention_mask" in feeds:
            feeds["attention_mask"][1, -5:] = 0
        start = np.full((2, 1), int(two.config.get("decoder_start_token_id") or 0))
        two.model.encode(feeds)
        ids = probes.continuation(two.model, start, 12)
        rows: list[Any] = []
        for model in (two.model, merged.model):
            model.encode(feeds)
            logits = np.concatenate([model.prefill(ids[:, :6]), model.decode(ids[:, 6:])], axis=1)
            require_finite(logits, "the merged decoder" if rows else "the decoders")
            rows.append(log_softmax(logits))
        difference = float(np.abs(rows[0] - rows[1]).max())
        if difference > EXACT_TOLERANCE:
            raise VerificationError(
                f"the merged decoder differs from its parts by {difference:.3g}; the tolerance is {EXACT_TOLERANCE:g}"
            )
        return {"max_difference": difference}

    def evaluate(self, candidate: Mapping[str, Path], update: Update) -> Evaluation:
        """The figures that the artifact is judged by."""
        self._expected = None  # its memory is better used elsewhere
        folder = companions(main_graph(candidate))
        self._speak(folder)
        reference = self._asked(folder)
        decodes = reference.kind == "decoder"
        windows, source = self._text(restricted(reference, folder)) if decodes else (self.data.text, None)
        give_back()
        found = evaluate(
            self._open(candidate),
            reference,
            text=windows,
            pairs=self.data.pairs,
            windows=WINDOWS,
            threads=self.threads,
            progress=lambda what, done, total: update(done, total),
        )
        return replace(found, text=source) if source else found

    def _asked(self, folder: Path | None) -> Opened:
        """The reference; a decoder has answered all that `evaluate` will ask, and is not in memory any more.

        folder: of the companions of what it will be compared with.
        """
        if self._answering is not None:
            return self._answering
        graph = main_graph(self.reference)
        reference = open_model(graph, threads=self.threads, all_logits=True)
        if reference.kind != "decoder":
            return reference
        windows, _ = self._text(restricted(reference, folder))
        answers = RememberedDecoder(
            lambda: open_model(graph, threads=self.threads, all_logits=True).model,
            graph.parent / "answers",
            reference.model.vocabulary,
            reference.model.last_only,
            reference.model,
        )
        self._answering = replace(reference, model=answers)
        asked = restricted(self._answering, folder)
        evaluate(asked, asked, text=windows, windows=WINDOWS, threads=self.threads)
        answers.close()
        return self._answering

    def _reference_outputs(self, folder: Path | None) -> Reference:
        reference = restricted(self._open(self.reference), folder)
        windows = self._text(reference)[0] if reference.kind == "decoder" else None
        return Reference.of(reference, windows=windows, length=STEP_TOKENS)

    def _speak(self, folder: Path | None) -> None:
        """Forget what is in another vocabulary than that of the companions in `folder`."""
        if folder != self._companions:
            self._expected = self._windows = self._answering = None
            self._companions = folder

    def _text(self, reference: Opened) -> tuple[list[Ids], str]:
        """Windows of token ids from the user's text or of the reference's own, made once."""
        if self._windows is None:
            self._windows = decoder_windows(reference, reference, self.data.text, WINDOWS, WINDOW, SEED, None)
        return self._windows

    def _open(self, paths: Mapping[str, Path], all_logits: bool = True) -> Opened:
        graph = main_graph(paths)
        return open_model(graph, threads=self.threads, session_options=self.session_options, all_logits=all_logits)


def _divergence(found: Mapping[str, float]) -> float:
    """KL in nats per token, or 1 − mean cosine, of a verification."""
    return found["kl"] if "kl" in found else 1 - found["cosine_mean"]


def main_graph(paths: Mapping[str, Path]) -> Path:
    """The graph by which a model is opened."""
    return next((path for stem, path in paths.items() if stem.startswith(ENCODER)), next(iter(paths.values())))


def figures(found: Evaluation) -> dict[str, float]:
    """An evaluation as flat numbers: the headline figures, the loss, and each mode's as `kl_decode` and the like."""
    rows: dict[str, float] = {
        key: float(value)
        for key in ("perplexity", "kl", "top1_agreement", "cosine_mean", "cosine_min", "spearman", "more_tokens")
        if (value := getattr(found, key)) is not None
    }
    rows["loss"] = found.loss
    for mode, values in found.modes.items():
        rows |= {f"{key}_{mode}": values[key] for key in ("kl", "perplexity", "cosine_min") if key in values}
    return rows


def speed(paths: Mapping[str, Path], threads: int | None, session_options: Mapping[str, str]) -> dict[str, float]:
    """Speed and memory of a graph on this machine, as flat numbers; decoding is at the context nearest to 256."""
    found = benchmark(main_graph(paths), threads=threads, session_options=session_options).to_dict()
    rows: dict[str, float] = {
        key: float(found[key])
        for key in ("prefill_tokens_per_s", "latency_ms", "load_s", "peak_rss_bytes")
        if key in found
    }
    if decode := found.get("decode_ms_per_token"):
        context = min(decode, key=lambda tokens: abs(int(tokens) - CONTEXT))
        rows["decode_ms_per_token"] = float(decode[context])
    return rows


def available_memory() -> int:
    """Bytes that the system can hand out without swapping, as Linux says; elsewhere the physical memory."""
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")

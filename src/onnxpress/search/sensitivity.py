"""Measure what a model loses, weighs and computes wrongly with one part in one format: each group of products in each
format, each block after each cut, each attention without each head.

Every format of every group is run by its real kernels on what the group reads in the float model; its relative error is
cheap to know. What an error does to the model's outputs is measured (see `injection`) for the coarsest of the formats
that lose alike (see `TrialRecord.alike`). Errors of one group add to the loss in proportion to their power, so that the
other formats follow from the one with the nearest error; the errors of cuts and heads are no small ones, and each is
measured. Errors of different parts are taken to be independent: their losses add up. `budget` measures how far that is
off.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import onnx_ir as ir

from onnxpress.arrays import Arrays, Feeds
from onnxpress.calibration.calibration import Calibration
from onnxpress.calibration.feeds import feed_of
from onnxpress.calibration.fingerprint import fingerprint
from onnxpress.calibration.walk import Walk, WalkStep
from onnxpress.optimizers.fitting.statistics import TINY
from onnxpress.search.formats import FLOAT, Format, Shapes, Trial, relative_errors, run_part, try_format
from onnxpress.search.groups import Group, Part, part_model
from onnxpress.search.injection import Errors, inject
from onnxpress.search.trial_records import TrialRecord, TrialRecords

Lost = Callable[[int, Errors], float]


@dataclass(frozen=True)
class Measurement:
    """A part in a format: a group of products in one, a block after a cut, or an attention without a head."""

    part: str
    format: str
    nbytes: int
    """The bytes of its constants."""
    error: float
    """|Δy|² / |y|² of what it makes, averaged over tokens."""
    loss: float
    """KL in nats per token, or 1 − cosine, of the whole model with only this part in this format."""
    measured: bool
    """Whether the loss was measured; otherwise it follows from the error."""
    left: Shapes = field(default_factory=dict)
    """What is left of the groups of a block that a cut made smaller: (inputs, outputs) of each product."""


@dataclass(frozen=True)
class TrialInputs:
    """Inputs of a graph, each one run."""

    fit: Sequence[Feeds]
    """What formats are fitted to."""
    judge: Sequence[Feeds]
    """What they are judged by: none of those above."""


def measure_parts(
    model: ir.Model,
    groups: Sequence[Group],
    formats: Sequence[Format],
    samples: TrialInputs,
    *,
    others: Sequence[Part] = (),
    cuts: Sequence[Format] = (),
    session_options: Mapping[str, str],
    every: bool = False,
    folder: Path | None = None,
    threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Measurement]:
    """Measure groups of a graph in all formats, and blocks after all cuts.

    Float32 is always one of the formats, and costs nothing but its bytes.

    Args:
        groups: see `groups.find_groups`.
        others: blocks, see `block_cuts.find_candidates`, or `head_removal.find_attention_outputs`; `cuts` are tried
            on them.
        every: measure the loss of every format, not only of the coarsest of those that lose alike.
        folder: where results are kept, by model and samples; a measurement that was killed, or asks for more formats,
            goes on from there.

    Raises:
        BadInputError: samples do not fit the graph, or an activation is NaN or infinite.
    """
    every_sample = [*samples.fit, *samples.judge]
    walk = Walk(model, every_sample, feed="original", threads=threads)
    method = f"parts {sorted(session_options.items())} {len(samples.judge)}"
    records = TrialRecords(folder / f"{fingerprint(model, every_sample, method)}.jsonl" if folder else None)
    tried: list[tuple[Part, Sequence[Format]]] = [
        *((group, formats) for group in groups),
        *((part, cuts) for part in others),
    ]
    left = {part.name: (part, kinds) for part, kinds in tried if not _is_known(part, kinds, records, every)}
    if left:
        outputs = dict.fromkeys(value for part, _ in left.values() for value in part.outputs)
        with inject(model, outputs, samples.judge, threads) as lost:
            for step in walk:
                for part, kinds in [pair for pair in left.values() if _is_complete(pair[0], step, model)]:
                    inputs = _inputs(step, part)
                    types = {name: ir.DataType.from_numpy(array.dtype) for name, array in inputs[0].items()}
                    alone = part_model(model, part, types)
                    trials = _PartTrials(part, alone, inputs, len(samples.fit), session_options, threads, lost)
                    trials.examine(kinds, records, every)
                    del left[part.name]
                    if progress is not None:
                        progress(len(tried) - len(left), len(tried))
                if not left:
                    break
    return [row for part, kinds in tried for row in _rows(part, kinds, records)]


def _is_known(part: Part, formats: Sequence[Format], records: TrialRecords, every: bool) -> bool:
    """Tell whether nothing about a part is left to measure."""
    return all(records.get(part.name, one) for one in formats) and not _unmeasured(part, formats, records, every)


def _unmeasured(part: Part, formats: Sequence[Format], records: TrialRecords, every: bool) -> list[Format]:
    """List the formats whose losses are still to be measured: the coarsest of those that lose alike, or every one."""
    known = [
        (format, record) for format in formats if (record := records.get(part.name, format)) is not None and record.fits
    ]
    chosen: list[tuple[Format, TrialRecord]] = []
    for format, record in sorted(known, key=lambda pair: -pair[1].error):
        if every or not format.losses_follow or not any(record.alike(coarser) for _, coarser in chosen):
            chosen.append((format, record))
    return [format for format, record in chosen if record.loss is None]


@dataclass
class _PartTrials:
    """One part, what it reads, and the means to run it."""

    part: Part
    alone: ir.Model
    inputs: Sequence[Arrays]
    fit_count: int
    """How many of the inputs are for fitting; the others judge."""
    session_options: Mapping[str, str]
    threads: int | None
    lost: Lost

    def examine(self, formats: Sequence[Format], records: TrialRecords, every: bool) -> None:
        """Find out and record what is not known yet."""
        fit, judge = self.inputs[: self.fit_count], self.inputs[self.fit_count :]
        calibration = Calibration(fit, threads=self.threads, memory={})
        before = run_part(self.alone, judge, self.session_options, self.threads)
        trials: dict[str, Trial | None] = {}

        def trial(format: Format) -> Trial | None:
            if format.name not in trials:
                trials[format.name] = try_format(
                    self.alone, self.part, format, calibration, judge, self.session_options, self.threads
                )
            return trials[format.name]

        for format in formats:
            if records.get(self.part.name, format) is None:
                after = trial(format)
                if after is None:
                    records.add(TrialRecord(self.part.name, format.key, -1))
                else:
                    errors = relative_errors(before.outputs, after.outputs)
                    mean, peak = float(errors.mean()), float(errors.max())
                    records.add(TrialRecord(self.part.name, format.key, after.nbytes, mean, peak, left=after.left))
        for format in _unmeasured(self.part, formats, records, every):
            after, record = trial(format), records.get(self.part.name, format)
            assert after is not None
            assert record is not None
            records.add(replace(record, loss=self._loss(before, after)))

    def _loss(self, before: Trial, after: Trial) -> float:
        """Average the loss over all samples."""
        losses = []
        for number, (expected, found) in enumerate(zip(before.outputs, after.outputs, strict=True)):
            losses.append(self.lost(number, {name: found[name] - expected[name] for name in expected}))
        return sum(losses) / len(losses)


def _rows(part: Part, formats: Sequence[Format], records: TrialRecords) -> Iterator[Measurement]:
    """Losses that were not measured follow from the one that was with the nearest error, of formats that lose alike."""
    yield Measurement(part.name, FLOAT, 4 * part.parameters, 0.0, 0.0, measured=True)
    found = [
        (format, record) for format in formats if (record := records.get(part.name, format)) is not None and record.fits
    ]
    known = [(record, record.loss) for _, record in found if record.loss is not None]
    for format, record in found:
        loss = record.loss
        if loss is None:
            nearest, its_loss = min(known, key=lambda pair: (not pair[0].alike(record), _distance(pair[0], record)))
            loss = its_loss / max(nearest.error, TINY) * record.error
        measured = record.loss is not None
        yield Measurement(part.name, format.name, record.nbytes, record.error, loss, measured, record.left)


def _distance(one: TrialRecord, other: TrialRecord) -> float:
    return abs(math.log(max(one.error, TINY) / max(other.error, TINY)))


def _is_complete(part: Part, step: WalkStep, model: ir.Model) -> bool:
    """Tell whether all that a part reads is at hand."""
    inputs = {str(value.name) for value in model.graph.inputs}
    return all(name in step.values or name in inputs for name in part.inputs)


def _inputs(step: WalkStep, part: Part) -> list[Arrays]:
    """Collect what a part reads of each sample, in the order of its inputs."""
    walk = step.walk
    given = {str(value.name): value for value in walk.model.graph.inputs if value.name in part.inputs}
    found = [{name: feed_of(value, sample) for name, value in given.items()} for sample in walk.samples]
    rest = [name for name in part.inputs if name not in given]
    if rest:
        walk.run(step.number, rest, lambda sample, arrays: found[sample].update(arrays))
    return [{name: arrays[name] for name in part.inputs} for arrays in found]

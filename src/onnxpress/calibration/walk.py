"""Walk through a graph one transformer block at a time, with the activations of all samples at hand.

    walk = Walk(model, samples)
    for step in walk:
        grams = {name: Gram() for name in ...}
        step.observe({name: [gram] for name, gram in grams.items()})
        ... edit this block's weights or nodes ...

Each block is run twice: once to look at what its products read, and once more, after the loop's body has edited it, to
hand its outputs to the next block. So every block is fitted to what the blocks before it really compute by then. A walk
that feeds the original outputs onward runs each block once.

A walk `by_product` cuts blocks where products begin to read another activation. Each part is run once, and what its
products read is at hand without running anything.

Memory holds one block, the statistics that the body asked for, and hidden states up to `memory_bytes`; more of them go
to files. None of it grows with the depth of the model. What lies outside of the blocks and is shared by them (masks,
positions, rotary tables) is computed once for each sample.

A graph without recognisable blocks is walked in a single step. Its activations are still reduced sample by sample, and
those looked at in one run take no more than `memory_bytes`: the graph is run as often as that needs.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from onnxpress.arrays import Array, Feeds
from onnxpress.calibration.feeds import Padding, check_samples, feed_of
from onnxpress.calibration.fingerprint import fingerprint
from onnxpress.calibration.results import read_results, write_results
from onnxpress.calibration.states import States
from onnxpress.calibration.subgraphs import extract_subgraph, session_of, values_by_name
from onnxpress.errors import BadInputError, UnsupportedModelError
from onnxpress.graph.anatomy import Segment, split_layers
from onnxpress.graph.io import copy_graph
from onnxpress.graph.linear import find_linears

MEMORY_BYTES = 1 << 30
FeedMode = Literal["modified", "original"]


class Accumulator(Protocol):
    """A statistic of an activation that streams by."""

    def update(self, x: NDArray[np.float32], sample: int) -> None:
        """Take in what sample number `sample` made of it, [tokens, features], padding left out."""


@dataclass
class Walk:
    """See the module.

    Raises BadInputError where samples do not fit the graph or, while iterating, where activations are not finite.
    """

    model: ir.Model
    samples: Sequence[Feeds]
    feed: FeedMode = "modified"
    """What the next block reads: the outputs of this one after it was edited, or those of the untouched graph."""
    memory_bytes: int = MEMORY_BYTES
    """Bytes of hidden states kept in memory, and of activations looked at in one run."""
    folder: Path | None = None
    """Where progress is kept, in a folder of its own for each graph, samples and method: a walk goes on from where
    another was killed. Results are kept in memory without it."""
    method: str = ""
    """Names the method and its options, for `folder`."""
    threads: int | None = None
    progress: Callable[[int, int], None] | None = None
    """Called with the segments done and all there are."""
    by_product: bool = False
    """Whether blocks are cut further, for bodies that edit products in the order in which they run."""
    reason: str | None = field(init=False, default=None)
    """Why the graph is walked in one step, if it is."""

    def __post_init__(self) -> None:
        check_samples(self.model, self.samples)
        try:
            self.segments = split_layers(self.model.graph)
        except UnsupportedModelError as error:
            self.segments, self.reason = [Segment("the graph", None, tuple(self.model.graph))], str(error)
        if self.by_product:
            self.segments = [part for segment in self.segments for part in _parts(segment)]
        self._graph = self.model if self.feed == "modified" else copy_graph(self.model)
        """What is run."""
        self._padding = Padding(self.model.graph)
        self._inputs = [[str(value.name) for value in segment.inputs()] for segment in self.segments]
        self.outputs = self._crossing()
        """By segment, what it makes and a later one reads."""
        if self.folder is not None:
            self.folder /= fingerprint(self.model, self.samples, f"{self.method} {self.feed} {len(self.segments)}")
        self._states = States(self.memory_bytes, self.folder / "states" if self.folder else None)
        self._finished = self._resume()

    def __iter__(self) -> Iterator[WalkStep]:
        try:
            for number, segment in enumerate(self.segments):
                step = WalkStep(self, number, segment)
                if number < self._finished:
                    step.known = True
                    yield step
                    continue
                yield step
                if not step.forwarded:
                    self._forward(number)
                self._commit(number)
                if self.progress is not None:
                    self.progress(number + 1, len(self.segments))
        finally:
            self._states.close()

    def discard(self) -> None:
        """Remove what is kept in `folder`, results included: call it when the graph has been written."""
        self._states.close()
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)

    def run(self, number: int, outputs: Sequence[str], receive: Callable[[int, dict[str, Array]], None]) -> None:
        """Run segment `number` as it is now on all samples; `receive(sample, arrays by name)` after each."""
        values = values_by_name(self._graph.graph)
        given = self._inputs[number]
        first = {name: self._input(values, name, 0) for name in given}
        computed = [name for name in outputs if name not in first]
        with contextlib.ExitStack() as stack:
            session = None
            if computed:
                types = {name: ir.DataType.from_numpy(array.dtype) for name, array in first.items()}
                session = stack.enter_context(session_of(extract_subgraph(self._graph, types, computed), self.threads))
                wanted = {node.name for node in session.get_inputs()}
            for sample in range(len(self.samples)):
                arrays = first if sample == 0 else {name: self._input(values, name, sample) for name in given}
                read = {name: arrays[name] for name in outputs if name in arrays}
                if session is not None:
                    feeds = {name: array for name, array in arrays.items() if name in wanted}
                    try:
                        results = session.run(computed, feeds)
                    except Exception as error:  # onnxruntime's exceptions have no common base below Exception
                        raise BadInputError(
                            f"{self.segments[number].title} cannot run on sample {sample}: "
                            f"{' '.join(str(error).split())[:300]}"
                        ) from error
                    read |= dict(zip(computed, results, strict=True))
                receive(sample, read)

    def _input(self, values: Mapping[str, ir.Value], name: str, sample: int) -> Array:
        value = values[name]
        if value.is_graph_input():
            return feed_of(value, self.samples[sample])
        return self._states.get(name, sample)

    def _crossing(self) -> list[list[str]]:
        """By segment, the values that it makes and a later one reads."""
        made = {
            str(output.name): number
            for number, segment in enumerate(self.segments)
            for node in segment.nodes
            for output in node.outputs
        }
        outputs: list[dict[str, None]] = [{} for _ in self.segments]
        for names in self._inputs:
            for name in names:
                if name in made:
                    outputs[made[name]].setdefault(name)
        return [list(names) for names in outputs]

    def _forward(self, number: int) -> None:
        """Run a segment and keep what later ones read."""
        if self.outputs[number]:
            self.run(number, self.outputs[number], lambda sample, arrays: self.keep(number, sample, arrays))

    def keep(self, number: int, sample: int, arrays: Mapping[str, Array]) -> None:
        """Keep what later segments read of what segment `number` made for a sample."""
        for name in self.outputs[number]:
            array = arrays[name]
            if self.segments[number].layer is not None and array.dtype.kind == "f" and array.ndim == 3:
                self.real_rows(number, name, array, sample)
            self._states.put(name, sample, array)

    def real_rows(self, number: int, name: str, activation: Array, sample: int) -> NDArray[np.float32]:
        """The rows of an activation without padding; BadInputError if they hold NaN or infinity."""
        if name not in self._padding:  # made by an edit
            self._padding = Padding(self._graph.graph)
        rows = self._padding.real_rows(name, activation, self.samples[sample]).astype(np.float32, copy=False)
        finite = np.isfinite(rows).all(axis=1)
        if not finite.all():
            raise BadInputError(
                f"{self.segments[number].title}: {name} is NaN or infinite in sample {sample}, row {finite.argmin()}",
                hint="this sample overflows the model, or its weights are damaged",
            )
        return rows

    def _commit(self, number: int) -> None:
        """Segment `number` is done: forget what no later one reads, and note it where another process looks."""
        for name in {name for names in self.outputs[: number + 1] for name in names}:
            if name in self._states.numbers and not any(name in names for names in self._inputs[number + 1 :]):
                self._stale.append(name)
        if self.folder is not None:
            alive = {name: n for name, n in self._states.numbers.items() if name not in self._stale}
            progress = {"finished": number + 1, "states": alive}
            aside = self.folder / ".progress.json"
            aside.write_text(json.dumps(progress), encoding="utf-8")
            aside.replace(self.folder / "progress.json")
        while self._stale:
            self._states.drop(self._stale.pop())

    def _resume(self) -> int:
        """How many segments an earlier walk finished."""
        self._stale: list[str] = []
        if self.folder is None:
            return 0
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "progress.json"
        progress: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        self._states.adopt(progress.get("states", {}))
        return int(progress.get("finished", 0))


@dataclass
class WalkStep:
    """One segment of a walk while its turn lasts."""

    walk: Walk
    number: int
    segment: Segment
    known: bool = False
    """An earlier process was here: the results are known, and nothing is run."""
    forwarded: bool = False
    """Whether the outputs for later segments are kept by now."""

    @property
    def title(self) -> str:
        return self.segment.title

    @property
    def values(self) -> set[str]:
        """The values that can be observed here: all that the segment reads or makes."""
        made = {str(output.name) for node in self.segment.nodes for output in node.outputs}
        return made | {str(value.name) for value in self.segment.inputs()}

    def observe(self, wanted: Mapping[str, Sequence[Accumulator]]) -> None:
        """Run this segment on all samples and hand the rows of each value named in `wanted` to its accumulators.

        Padding is left out. Raises BadInputError for NaN or infinity, naming segment, value and sample.
        """
        walk = self.walk
        for names in self._groups(list(wanted)):
            onward = [] if walk.feed == "modified" or self.forwarded else walk.outputs[self.number]

            def receive(
                sample: int, arrays: dict[str, Array], names: list[str] = names, keep: bool = bool(onward)
            ) -> None:
                for name in names:
                    rows = walk.real_rows(self.number, name, arrays[name], sample)
                    for accumulator in wanted[name]:
                        accumulator.update(rows, sample)
                if keep:
                    walk.keep(self.number, sample, arrays)

            walk.run(self.number, list(dict.fromkeys([*names, *onward])), receive)
            self.forwarded |= bool(onward)

    def results(self, key: str, compute: Callable[[], Mapping[str, Array]]) -> dict[str, ir.TensorProtocol]:
        """Take what `compute` returns, or returned in an earlier process; in a file if the walk has a folder."""
        if self.walk.folder is None:
            return {name: ir.tensor(array, name=name) for name, array in compute().items()}
        path = self.walk.folder / f"result_{self.number}_{key}.bin"
        return read_results(path) or write_results(path, compute())

    def _groups(self, names: Sequence[str]) -> Iterator[list[str]]:
        """Cut values into groups that together take no more than the walk's memory; one of unknown size goes alone."""
        values = values_by_name(self.walk.model.graph)
        tokens = max(_rows(sample) for sample in self.walk.samples)
        group: list[str] = []
        total = 0
        for name in names:
            shape = values[name].shape if name in values else None
            width = shape[-1] if shape is not None and len(shape) in (2, 3) else None
            size = 4 * tokens * width if isinstance(width, int) else self.walk.memory_bytes
            if group and total + size > self.walk.memory_bytes:
                yield group
                group, total = [], 0
            group.append(name)
            total += size
        if group:
            yield group


def _parts(segment: Segment) -> Iterator[Segment]:
    """A layer, cut before each product that reads another activation than those before it; other segments whole."""
    if segment.layer is None:
        yield segment
        return
    activations: set[ir.Value] = set()
    nodes: list[ir.Node] = []
    for node in segment.nodes:
        linear = next(find_linears([node]), None)
        if linear is not None and linear.activation not in activations:
            if nodes:
                yield replace(segment, nodes=tuple(nodes))
            nodes = []
            activations.add(linear.activation)
        nodes.append(node)
    yield replace(segment, nodes=tuple(nodes))


def _rows(sample: Feeds) -> int:
    """Tokens of the longest input of a sample, padding included."""
    return max(int(np.prod(array.shape[:2])) for array in sample.values())

"""Any other graphs: pixels, samples or whatever else in, arrays out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import numpy as np

from onnxpress.arrays import Array, Feeds, Ids
from onnxpress.errors import BadInputError
from onnxpress.evaluation.inputs import random_feeds
from onnxpress.evaluation.kind import PREFILL, Case, GraphFile, Opened, Options
from onnxpress.evaluation.metrics import Deviation, Similarity, require_finite_output
from onnxpress.evaluation.vector_model import Outputs, VectorModel, common_names
from onnxpress.runtime.sessions import EncoderSession
from onnxpress.runtime.timing import median_ms, seconds

LARGEST_ARRAY = 4096
"""Values recorded of one output; a larger one is sampled evenly."""


class OutputDeviation(Deviation):
    """`Deviation` of every output that both models have."""

    def compare(self, expected: Outputs, found: Outputs) -> None:
        for name in common_names(expected, found):
            require_finite_output(found[name], name)
            self.add(expected[name], found[name])


class OutputSimilarity(Similarity):
    """`Similarity` of every output that both models have."""

    def compare(self, expected: Outputs, found: Outputs) -> None:
        for name in common_names(expected, found):
            require_finite_output(found[name], name)
            self.add(expected[name], found[name], name)


class Graph(VectorModel):
    """Any graph, run by an `EncoderSession` or anything with its `run`. One mode: `prefill`."""

    kind = "graph"
    verified_by, judged_by = OutputDeviation, OutputSimilarity

    @classmethod
    def open(cls, file: GraphFile) -> Self | None:
        return cls(file.path.name, EncoderSession(file.session()), file.config, file.folder)

    def verification_cases(
        self, like: Opened, windows: Sequence[Ids] | None, seed: int, length: int | None
    ) -> list[Case]:
        """Two sets of random inputs."""
        session = _session(self, like)
        if session is None:
            raise BadInputError(f"the inputs of {self.name} are unknown", hint="verify against its fp32 graph")
        return [Case(random_feeds(session, self.config, seed + i), (PREFILL,)) for i in range(2)]

    def evaluation_cases(self, candidate: Opened, options: Options) -> tuple[list[Case], str]:
        """Four sets of random inputs."""
        session = _session(candidate, self)
        if session is None:
            raise BadInputError(f"{candidate.name} cannot be measured: its inputs are unknown")
        config = candidate.config or self.config
        cases = [Case(random_feeds(session, config, options.seed + i), (PREFILL,)) for i in range(4)]
        return cases, "random inputs"

    def run(self, mode: str, inputs: Feeds) -> list[Outputs]:
        return [self.outputs_of(inputs)]

    def seen_by(self, candidate: Opened, restricted: Self, options: Options) -> Self:
        """Compare with the model as it came: random inputs mean the same to both."""
        return self

    def headline(self, modes: Mapping[str, Any], cases: Sequence[Case]) -> dict[str, Any]:
        return {"tokens": 0, **super().headline(modes, cases)}

    def recorded_inputs(self, seed: int) -> tuple[dict[str, Any], dict[str, Array]]:
        return {}, random_feeds(self.model, self.config, seed)

    def recorded_outputs(
        self, inputs: Mapping[str, Any], arrays: Mapping[str, Array], expected: Mapping[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Array]]:
        """All outputs, sampled where they are large."""
        outputs = self.model.run(arrays)
        for name, value in outputs.items():
            require_finite_output(value, name)
        return {}, {name: _sample(value) for name, value in outputs.items()}

    def speed(self, prompt: int, context: Sequence[int], repeats: int) -> tuple[Callable[[], object], dict[str, Any]]:
        """Latency of one run on random inputs."""
        feeds = random_feeds(self.model, self.config)

        def run() -> object:
            return self.model.run(feeds)

        run()
        return run, {"latency_ms": median_ms([seconds(run) for _ in range(repeats * 10)])}


def _session(first: Opened, second: Opened) -> EncoderSession | None:
    """Return what knows the shapes of its inputs."""
    return next((one.model for one in (first, second) if isinstance(one.model, EncoderSession)), None)


def _sample(values: Array) -> Array:
    flat = values.ravel()
    return flat if flat.size <= LARGEST_ARRAY else flat[np.linspace(0, flat.size - 1, LARGEST_ARRAY).astype(np.int64)]

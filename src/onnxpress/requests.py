"""Requests: the source of a model, and how what is made of it is judged.

The command line makes these objects from its options, the Python API takes them as they are: one list of fields for
both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from onnxpress.artifact.manifest import GateRecord
from onnxpress.calibration.data import CalibrationData
from onnxpress.errors import UnsupportedModelError

Logits = Literal["all", "last"]
Objective = Literal["loss", "size", "latency", "prompt"]


@dataclass(frozen=True)
class ModelSource:
    """The place that a model comes from, how it is exported, and what is allowed on the way."""

    model: str
    """A catalog name, a Hugging Face folder, `hf:owner/name[@revision]`, a .gguf file, an ONNX file or a folder."""
    task: str | None = None
    """optimum's name of the task; None: as the architecture says. For checkpoints."""
    context_length: int | None = None
    """The longest sequence, in tokens; None: as the configuration says. For checkpoints."""
    logits: Logits | None = None
    """The positions that a decoder computes logits for; None: the last one, or all of them where nothing but an export
    or a pass was asked for."""
    offline: bool = False
    """Fetch nothing: use what is on this machine."""
    allow_pickle: bool = False
    """Read pickled weights, which can run any code."""
    trust_remote_code: bool = False
    """Run Python code that the checkpoint brings along."""

    @classmethod
    def of(cls, source: str | Path | ModelSource) -> ModelSource:
        """Return `source`, a name or path as a source without options."""
        return source if isinstance(source, ModelSource) else cls(str(source))


class Share(float):
    """A limit as a part of what the float32 model has: `Gates(max_size=Share(0.25))`."""


@dataclass(frozen=True)
class Gates:
    """Limits that an artifact is held to before it is put in place; None where there is none."""

    max_loss: float | None = None
    """The rise of perplexity (decoders) or 1 - the mean cosine (the others), as a fraction."""
    max_size: float | None = None
    """Bytes of the graphs with their weights, or a `Share` of them."""
    max_latency: float | None = None
    """Milliseconds per token (decoders) or per call."""
    max_memory: float | None = None
    """Bytes of peak resident memory."""
    max_parameters: float | None = None
    """Numbers in the weights, or a `Share` of them."""

    def in_amounts(self, size_bytes: float, parameters: float | None) -> Gates:
        """Replace shares by amounts. Raises UnsupportedModelError for a share of what is not known.

        Args:
            size_bytes, parameters: of the float32 model.
        """
        if isinstance(self.max_parameters, Share) and parameters is None:
            raise UnsupportedModelError(
                f"{self.max_parameters:.0%} of how many parameters? No transformer layers were recognised in the model"
            )
        return replace(
            self,
            max_size=_amount_of(self.max_size, size_bytes),
            max_parameters=_amount_of(self.max_parameters, parameters or 0),
        )

    @property
    def need_benchmark(self) -> bool:
        """True if a limit is on what only a benchmark tells."""
        return self.max_latency is not None or self.max_memory is not None

    def check(self, after: Mapping[str, float]) -> list[GateRecord]:
        """Hold the measured values to every limit that is set."""
        latency = after.get("decode_ms_per_token", after.get("latency_ms"))
        rows = (
            ("max_loss", self.max_loss, after.get("loss")),
            ("max_size_bytes", self.max_size, after.get("size_bytes")),
            ("max_latency_ms", self.max_latency, latency),
            ("max_memory_bytes", self.max_memory, after.get("peak_rss_bytes")),
            ("max_parameters", self.max_parameters, after.get("parameters")),
        )
        return [
            # A value that could not be measured does not pass.
            GateRecord(
                name=name,
                limit=limit,
                value=-1.0 if value is None else value,
                passed=value is not None and value <= limit,
            )
            for name, limit, value in rows
            if limit is not None
        ]


@dataclass(frozen=True)
class SearchOptions:
    """The choice between mixes of formats and cuts that all keep the gates."""

    minimize: Objective | None = None
    """What is to be least: the loss, the bytes, the time of a token (decoders) or a call, or that of a prompt."""
    kernel_table: str | Path | None = None
    """A file of another device's kernel times, see `onnxpress.pipeline.kernels`; None: those of this machine are
    measured."""
    structure: bool = False
    """Whether blocks are cut, too, where no recipe says what there is to choose from."""

    def objective(self, gates: Gates) -> Objective:
        """Return `minimize`, or the first of size, loss and latency that has no limit."""
        if self.minimize is not None:
            return self.minimize
        if gates.max_size is None and gates.max_memory is None and gates.max_loss is not None:
            return "size"
        if gates.max_loss is None:
            return "loss"
        return "latency" if gates.max_latency is None else "loss"


@dataclass(frozen=True)
class Judging:
    """The data that a model is measured on, and the limits that it is held to."""

    text: str | Path | None = None
    """Text that quality is measured on; None: text that the reference writes itself."""
    pairs: str | Path | None = None
    """Scored sentence pairs that an encoder is measured on, CSV or TSV: two texts and a score."""
    calibration: CalibrationData = field(default_factory=CalibrationData)
    """The samples for passes that look at activations."""
    gates: Gates = field(default_factory=Gates)
    """Limits; nothing is written where one is missed."""
    search: SearchOptions = field(default_factory=SearchOptions)
    """What a search takes of all that keeps the gates."""
    benchmark: bool = True
    """Measure speed and memory even where no gate asks for it."""
    threads: int | None = None
    """Threads of onnxruntime; None: one for each core."""


def _amount_of(limit: float | None, whole: float) -> float | None:
    return float(limit * whole) if isinstance(limit, Share) else limit

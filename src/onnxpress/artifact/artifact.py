"""The artifact between two passes: graphs, the files that travel with them, and how they were made.

Passes edit graphs; only the driver (`onnxpress.pipeline`) builds new Artifacts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import onnx_ir as ir


@dataclass(frozen=True)
class Source:
    """The origin of a model, as recorded in artifact.json."""

    name: str
    """What the user asked for: a catalog name, a folder, `hf:owner/name`, a file."""
    kind: str
    """`huggingface-folder`, `hub`, `gguf` or `onnx`."""
    revision: str | None = None
    licence: str | None = None
    sha256: str | None = None
    """Checksum of the fetched file, where the catalog pins one."""


@dataclass(frozen=True)
class Step:
    """One pass that ran: its options, how long it took, what it changed and what verification measured."""

    name: str
    options: Mapping[str, Any]
    seconds: float
    matched: Mapping[str, int] = field(default_factory=dict)
    """What the pass did, as counts: `{"SkipSimplifiedLayerNormalization": 60}`."""
    skipped: Mapping[str, int] = field(default_factory=dict)
    """What it looked at and left alone, by reason."""
    errors: Mapping[str, float] = field(default_factory=dict)
    """What was lost where, by weight: |x·Ŵ − x·W|² / |x·W|² on the samples, of passes that know it."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Measured against the reference after this step: `kl`, `top1_agreement`, `max_difference`, ..."""


@dataclass(frozen=True)
class Artifact:
    """Graphs and their sidecar files between two steps of the pipeline."""

    task: str
    """optimum's task name: `text-generation`, `feature-extraction`, `text2text-generation`, ..."""
    graphs: Mapping[str, ir.Model]
    """By graph name: `model`; for encoder-decoders `encoder_model`, `decoder_model`, `decoder_with_past_model`."""
    config: Mapping[str, Any]
    """The checkpoint's config.json; empty for a foreign ONNX file without one."""
    files: Mapping[str, Path]
    """Sidecar files by their name in the artifact: tokenizer.json, generation_config.json, chat_template.jinja."""
    source: Source
    export: Mapping[str, Any] = field(default_factory=dict)
    """How the graph was made: `method` (fused, stamped, fallback, foreign), and whatever the exporter wants to say."""
    history: tuple[Step, ...] = ()

    def with_step(self, step: Step) -> Artifact:
        """Return the artifact with one more step in its history."""
        return replace(self, history=(*self.history, step))

"""The exporter tried on each architecture: a tiny random model of it is exported and compared.

The models are listed in `architectures.toml`. `table` is what `onnxpress list models --architectures` prints; the tests
hold each row to its tolerance.
"""

from __future__ import annotations

import tempfile
import tomllib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from onnxpress.artifact.artifact import Source
from onnxpress.errors import OnnxpressError, UsageError

TOLERANCE = 1e-3
"""Largest difference of log-probabilities or (relative) outputs that counts as the same model; typical is 1e-5."""


@dataclass(frozen=True)
class Support:
    architecture: str
    task: str
    method: str
    """`fused`, `stamped` (no fused attention), `traced` (every layer), `fallback`, `refused`, or `failed`."""
    operators: tuple[str, ...] = ()
    traced_layers: str = ""
    not_fused: dict[str, str] = field(default_factory=dict)
    """Part -> why it is not fused."""
    differences: dict[str, float] = field(default_factory=dict)
    """From torch: see `parity.differences`."""
    error: str | None = None


@cache
def catalog() -> dict[str, dict[str, Any]]:
    """Architecture -> its task and tiny config."""
    data = tomllib.loads(files("onnxpress.exporter").joinpath("architectures.toml").read_text(encoding="utf-8"))
    common = data["common"]

    def filled(settings: dict[str, Any]) -> dict[str, Any]:
        own = {key: filled(value) if isinstance(value, dict) else value for key, value in settings.items()}
        return {**common, **own} if own.pop("common", False) else own

    return {name: {**entry, "config": filled(entry["config"])} for name, entry in data["architecture"].items()}


def architecture_names() -> list[str]:
    """The architectures that are tried, by name."""
    return list(catalog())


def tiny_model(architecture: str, folder: Path, *, seed: int = 0, **changes: Any) -> Any:
    """Write a tiny random checkpoint to `folder` and return its torch model (float32, eval, plain attention).

    `changes`: of its config.

    Weights are large enough that attention is far from uniform: an export that ignored positions or masks would show.
    """
    from onnxpress.exporter import tasks

    config, task = tiny_config(architecture, **changes), catalog()[architecture]["task"]
    torch.manual_seed(seed)
    attention = tasks.reference_attention(config)
    model = tasks.model_class(config, task)._from_config(config, attn_implementation=attention, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:  # computed, such as sinusoidal positions
                continue
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.15)
            elif "norm" in name or "ln" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            else:
                parameter.normal_(0.0, 0.1)
    model.eval().save_pretrained(folder)
    return model


def tiny_config(architecture: str, **changes: Any) -> Any:
    """The transformers config of a tiny model."""
    from transformers import CONFIG_MAPPING

    return CONFIG_MAPPING[architecture](**{**catalog()[architecture]["config"], **changes})


def try_architecture(architecture: str, folder: Path, **changes: Any) -> Support:
    """Export a tiny model of `architecture` in `folder` and compare it with torch; `changes` are to its config. Raises
    what goes wrong."""
    from onnxpress.exporter import parity
    from onnxpress.exporter.export import export
    from onnxpress.exporter.sources.checkpoint import load_folder

    task = catalog()[architecture]["task"]
    model = tiny_model(architecture, folder, **changes)
    artifact = export(load_folder(folder, Source(architecture, "huggingface-folder")), task=task, remember=False)
    made = artifact.export
    return Support(
        architecture,
        task,
        made["method"],
        tuple(made["operators"]),
        "; ".join(dict.fromkeys(made["traced_layers"].values())),
        dict(made.get("not_fused", {})),
        parity.differences(artifact, model, folder),
    )


def table(
    architectures: Iterable[str] | None = None, progress: Callable[[int, int, str], None] | None = None
) -> Iterator[Support]:
    """Try each architecture (all by default) and yield its row; takes seconds for each. Raises UsageError for a name
    that is not in the list."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    wanted = list(architectures) if architectures is not None else architecture_names()
    for name in wanted:
        if name not in catalog():
            raise UsageError(
                f"no tiny model of architecture {name!r}", hint=f"one of {', '.join(architecture_names())}"
            )
    for done, name in enumerate(wanted):
        if progress is not None:
            progress(done, len(wanted), name)
        with tempfile.TemporaryDirectory() as folder:
            try:
                yield try_architecture(name, Path(folder))
            except OnnxpressError as error:
                yield Support(name, catalog()[name]["task"], "refused", error=str(error))
            except Exception as error:  # torch's or onnxruntime's: one architecture must not cost the others
                reason = next(iter(str(error).splitlines()), "")
                yield Support(name, catalog()[name]["task"], "failed", error=f"{type(error).__name__}: {reason}")

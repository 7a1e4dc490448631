"""An export compared with torch, number by number: a prompt, cached decode steps, and a batch with padding."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from onnxpress.artifact.artifact import Artifact
from onnxpress.evaluation.encoder_decoder import EncoderDecoder
from onnxpress.evaluation.kind import compare
from onnxpress.evaluation.opening import open_model
from onnxpress.exporter.reference import TorchModel
from onnxpress.graph.conventions import ENCODER
from onnxpress.graph.io import save_graph


def differences(artifact: Artifact, model: Any, folder: Path, *, seed: int = 0) -> dict[str, float]:
    """Largest differences between an exported artifact and the torch model that it came from, on random inputs.

    By mode, see `Opened.parity_cases`: of log-probabilities for models that write text, of outputs relative to the
    largest number for others. Writes the graphs to `folder`.

    Raises VerificationError where an output is NaN or infinite, or is none of torch's.
    """
    paths = {name: folder / f"{name}.onnx" for name in artifact.graphs}
    for name, graph in artifact.graphs.items():
        save_graph(graph, paths[name], external_data=f"{name}.onnx_data")
    exported = open_model(paths.get(ENCODER) or paths["model"])
    torch_model = TorchModel(model, has_encoder=isinstance(exported, EncoderDecoder))
    original = replace(exported, model=torch_model, config=model.config.to_dict())
    cases = original.parity_cases(exported, seed)
    answers = [(case, original.run(case.reference_mode, case.inputs)) for case in cases]
    found = compare(exported, answers, exported.parity_by)
    return {mode: difference.figures()["max_difference"] for mode, difference in found.items()}

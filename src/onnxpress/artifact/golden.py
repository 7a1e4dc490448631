"""A self-test inside the artifact: inputs with the outputs that it had where it was built.

golden/golden.json   kind, tolerance, and for token models inputs and expectations as plain numbers, for any platform
golden/golden.npz    inputs and outputs of other graphs

Decoders are compared by the log-probabilities of the most likely words, with the recorded tokens fed back, so that one
flipped choice does not end the comparison. Other CPUs round differently (4-bit kernels on ARM by 1.5%), hence the
tolerances by format.
"""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxpress.arrays import Ids
from onnxpress.errors import CorruptFileError, SourceNotFoundError, VerificationError
from onnxpress.evaluation import probes
from onnxpress.evaluation.metrics import cosine, log_softmax, require_finite
from onnxpress.evaluation.opening import Opened, open_model, random_feeds, read_json
from onnxpress.runtime.sessions import pool

FOLDER, RECORD, ARRAYS = "golden", "golden.json", "golden.npz"
SCHEMA_VERSION = 1
PROMPT, STEPS, WORDS = 12, 8, 5
LARGEST_ARRAY = 4096
"""Values kept of one output; a larger one is sampled evenly."""

TOLERANCES = {"float32": 0.02, "float16": 0.1, "quantized": 0.5}
"""Largest difference of a log-probability, by format (see `golden_format`)."""
SMALLEST_COSINES = {"float32": 0.9999, "float16": 0.999, "quantized": 0.98}


def golden_format(graph: str) -> str:
    """The coarse format of a graph, by the suffix of its file name."""
    stem = graph.removesuffix(".onnx")
    if stem.endswith("_fp16"):
        return "float16"
    return "quantized" if stem.endswith(("_quantized", "_int8", "_uint8", "_q4", "_q4f16", "_q8")) else "float32"


def write_golden(
    folder: str | Path, *, precision: str | None = None, threads: int | None = None, seed: int = 0
) -> Path:
    """Run the artifact in `folder` and record what it computes; `precision` is a key of `TOLERANCES`.

    Returns golden/golden.json. A few kilobytes for models of tokens.
    """
    folder = Path(folder)
    opened = open_model(folder, threads=threads)
    if precision is None:
        names = [path.name for path in sorted(folder.glob("onnx/*.onnx")) or sorted(folder.glob("*.onnx"))]
        found = {golden_format(name) for name in names}
        precision = next(name for name in ("quantized", "float16", "float32") if name in found)
    inputs, arrays = _inputs(opened, seed)
    record: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "kind": opened.kind,
        "tolerance": TOLERANCES[precision],
        "smallest_cosine": SMALLEST_COSINES[precision],
        "inputs": inputs,
    }
    expected, outputs = _run(opened, inputs, arrays)
    record["expected"] = expected
    target = folder / FOLDER
    target.mkdir(exist_ok=True)
    if arrays:
        stored: dict[str, Any] = {**{f"input:{name}": value for name, value in arrays.items()}, **outputs}
        np.savez(target / ARRAYS, **stored)
    (target / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return target / RECORD


def replay_golden(folder: str | Path, *, threads: int | None = None) -> dict[str, float]:
    """Run the recorded inputs again; returns `max_difference` (log-probabilities) or `cosine_min`.

    Raises VerificationError with the figure and the tolerance, SourceNotFoundError without golden/golden.json.
    """
    folder = Path(folder)
    record = read_json(folder / FOLDER / RECORD)
    if not record:
        raise SourceNotFoundError(f"{folder} has no {FOLDER}/{RECORD}: nothing to replay")
    try:
        kind, inputs, expected = record["kind"], record["inputs"], record["expected"]
        tolerance, smallest = float(record["tolerance"]), float(record["smallest_cosine"])
        stored = _load(folder / FOLDER / ARRAYS) if (folder / FOLDER / ARRAYS).is_file() else {}
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptFileError(f"{folder / FOLDER / RECORD} cannot be read: {error!r}") from error
    opened = open_model(folder, threads=threads)
    if opened.kind != kind:
        raise VerificationError(f"{folder} has kind {opened.kind}, its golden outputs are of kind {kind}")
    arrays = {name.removeprefix("input:"): value for name, value in stored.items() if name.startswith("input:")}
    found, outputs = _run(opened, inputs, arrays, expected.get("words"))
    if "log_probabilities" in expected:
        difference = np.abs(np.array(expected["log_probabilities"]) - np.array(found["log_probabilities"])).max()
        if difference > tolerance:
            raise VerificationError(
                f"log-probabilities differ from the golden ones by {difference:.3g}; the tolerance is {tolerance:g}"
            )
        return {"max_difference": float(difference)}
    if kind == "graph":
        pairs = [(value, outputs[name]) for name, value in stored.items() if not name.startswith("input:")]
    else:
        pairs = [(np.array(expected["embedding"]), np.array(found["embedding"]))]
    worst = min(float(cosine(a.ravel(), b.ravel())) for a, b in pairs)
    if worst < smallest:
        raise VerificationError(f"outputs have cosine {worst:.5f} with the golden ones; the limit is {smallest}")
    return {"cosine_min": worst}


def _inputs(opened: Opened, seed: int) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """Recorded inputs: plain numbers for models of tokens, arrays for others."""
    if opened.kind == "graph":
        return {}, random_feeds(opened.model, opened.config, seed)
    config = opened.config
    size = int(getattr(opened.model, "vocabulary", 0) or config.get("vocab_size") or 16)
    ids = np.random.default_rng(seed).integers(0, size, (1, PROMPT))
    if opened.kind == "encoder":
        return {"input_ids": ids.tolist()}, {}
    if opened.kind == "decoder":
        ids[0, 0] = opened.starts[0]
        return {"input_ids": probes.continuation(opened.model, ids[:, :4], PROMPT + STEPS - 4).tolist()}, {}
    encoder_inputs = {}
    arrays = random_feeds(opened.model.encoder, config, seed)
    if set(arrays) <= {"input_ids", "attention_mask"}:
        encoder_inputs, arrays = {name: value.tolist() for name, value in arrays.items()}, {}
    opened.model.encode({**arrays, **{name: np.array(value) for name, value in encoder_inputs.items()}})
    start = np.array([[int(config.get("decoder_start_token_id") or 0)]])
    return {"encoder": encoder_inputs, "input_ids": probes.continuation(opened.model, start, STEPS).tolist()}, arrays


def _run(
    opened: Opened, inputs: dict[str, Any], arrays: dict[str, NDArray[Any]], words: list[list[int]] | None = None
) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """(expectations as plain numbers, sampled outputs of a graph)."""
    if opened.kind == "graph":
        outputs = opened.model.run(arrays)
        for name, value in outputs.items():
            require_finite(value, name)
        return {}, {f"output:{name}": _sample(value) for name, value in outputs.items()}
    ids: Ids = np.array(inputs["input_ids"], np.int64)
    if opened.kind == "encoder":
        outputs = opened.model.encode(ids)
        vector = pool(outputs)[0]
        require_finite(vector, "embedding")
        return {"embedding": [round(float(x), 6) for x in vector]}, {}
    if opened.kind == "encoder-decoder":
        opened.model.encode({**arrays, **{name: np.array(value) for name, value in inputs["encoder"].items()}})
    # The last logits of the prompt, then one cached step per recorded token.
    steps = min(STEPS, ids.shape[1] - 1)
    first = ids.shape[1] - steps
    last = opened.model.prefill(ids[:, :first])[0, -1:]
    logits = np.concatenate([last, *(opened.model.decode(ids[:, i : i + 1])[0] for i in range(first, ids.shape[1]))])
    require_finite(logits, "logits")
    scores = log_softmax(logits)
    chosen = np.argsort(-scores, axis=1)[:, :WORDS] if words is None else np.array(words, np.int64)
    picked = np.take_along_axis(scores, chosen, axis=1)
    return {"words": chosen.tolist(), "log_probabilities": np.round(picked, 5).tolist()}, {}


def _sample(values: NDArray[Any]) -> NDArray[Any]:
    flat = values.ravel()
    return flat if flat.size <= LARGEST_ARRAY else flat[np.linspace(0, flat.size - 1, LARGEST_ARRAY).astype(np.int64)]


def _load(path: Path) -> dict[str, NDArray[Any]]:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return dict(arrays)
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise CorruptFileError(f"cannot read {path}: {error}") from error

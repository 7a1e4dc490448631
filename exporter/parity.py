"""An export compared with torch, number by number: a prompt, cached decode steps, and a batch with padding."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray

from onnxpress.artifact.artifact import Artifact
from onnxpress.graph.io import save_graph

Arrays = dict[str, NDArray[Any]]
PROMPT, STEPS, PADDING = 12, 3, 5


def differences(artifact: Artifact, model: Any, folder: Path, *, seed: int = 0) -> dict[str, float]:
    """Largest differences between an exported artifact and the torch model that it came from, on random inputs.

    `prompt`, `decode` and `padded` for decoders (of log-probabilities; the padded batch mixes a left-padded, a
    right-padded and a full row, and then decodes), `single` and `padded` for encoders, `prompt` and `decode` for
    encoder-decoders (of outputs, relative to the largest one). Writes the graphs to `folder`.
    """
    sessions = {}
    for stem, graph in artifact.graphs.items():
        save_graph(graph, folder / f"{stem}.onnx", external_data=f"{stem}.onnx_data")
        sessions[stem] = onnxruntime.InferenceSession(folder / f"{stem}.onnx", providers=["CPUExecutionProvider"])
    generator = np.random.default_rng(seed)
    with torch.no_grad():
        if artifact.task == "text-generation":
            return _decoder(sessions["model"], model, generator)
        if "decoder_model" in sessions:
            return _encoder_decoder(sessions, model, generator)
        return _encoder(sessions["model"], model, generator)


def _tokens(model: Any, generator: np.random.Generator, *shape: int) -> NDArray[np.int64]:
    vocabulary = model.config.get_text_config().vocab_size
    return generator.integers(3, vocabulary - 1, shape)


def _log_probabilities(logits: NDArray[Any]) -> NDArray[Any]:
    shifted = logits - logits.max(-1, keepdims=True)
    result: NDArray[Any] = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return result


def _torch_log_probabilities(model: Any, ids: NDArray[np.int64]) -> NDArray[Any]:
    return _log_probabilities(model(input_ids=torch.from_numpy(ids)).logits.numpy())


def _run(session: Any, feeds: Mapping[str, NDArray[Any]]) -> Arrays:
    wanted = {value.name: feeds[value.name] for value in session.get_inputs()}
    return dict(zip([value.name for value in session.get_outputs()], session.run(None, wanted), strict=True))


def _as_past(outputs: Arrays) -> Arrays:
    return {
        name.replace("present", "past_key_values", 1): value
        for name, value in outputs.items()
        if name.startswith("present")
    }


def _decoder(session: Any, model: Any, generator: np.random.Generator) -> dict[str, float]:
    def empty(batch: int) -> Arrays:
        return {
            value.name: np.zeros((batch, value.shape[1], 0, value.shape[3]), np.float32)
            for value in session.get_inputs()
            if value.name.startswith("past_key_values")
        }

    def step(ids: NDArray[np.int64], mask: NDArray[np.int64], past: Arrays) -> tuple[NDArray[Any], Arrays]:
        outputs = _run(session, {"input_ids": ids, "attention_mask": mask, **past})
        return _log_probabilities(outputs["logits"]), _as_past(outputs)

    ids = _tokens(model, generator, 1, PROMPT + STEPS)
    expected = _torch_log_probabilities(model, ids)
    found, past = step(ids[:, :PROMPT], np.ones((1, PROMPT), np.int64), empty(1))
    result = {"prompt": float(np.abs(found - expected[:, :PROMPT]).max()), "decode": 0.0, "padded": 0.0}
    for at in range(PROMPT, PROMPT + STEPS):
        found, past = step(ids[:, at : at + 1], np.ones((1, at + 1), np.int64), past)
        result["decode"] = max(result["decode"], float(np.abs(found - expected[:, at : at + 1]).max()))
    ids = _tokens(model, generator, 3, PROMPT + STEPS)
    mask = np.ones((3, PROMPT), np.int64)
    mask[0, :PADDING] = 0  # padded on the left, as transformers generates
    mask[1, -PADDING:] = 0  # on the right, as onnxruntime-genai does
    real = [np.concatenate((row[:PROMPT][keep == 1], row[PROMPT:])) for row, keep in zip(ids, mask, strict=True)]
    wanted = [_torch_log_probabilities(model, row[None])[0] for row in real]
    found, past = step(ids[:, :PROMPT], mask, empty(3))
    for row in range(3):
        kept = found[row][mask[row] == 1]
        result["padded"] = max(result["padded"], float(np.abs(kept - wanted[row][: len(kept)]).max()))
    for at in range(STEPS):
        mask = np.concatenate((mask, np.ones((3, 1), np.int64)), axis=1)
        found, past = step(ids[:, PROMPT + at : PROMPT + at + 1], mask, past)
        for row in range(3):
            position = len(real[row]) - STEPS + at
            result["padded"] = max(result["padded"], float(np.abs(found[row, 0] - wanted[row][position]).max()))
    return result


def _encoder(session: Any, model: Any, generator: np.random.Generator) -> dict[str, float]:
    def compare(batch: int, length: int, padding: int) -> float:
        feeds: Arrays = {}
        for value in session.get_inputs():
            if value.name == "input_ids":
                feeds["input_ids"] = _tokens(model, generator, batch, length)
                feeds["input_ids"][:, -1] = model.config.get_text_config().vocab_size - 1  # CLIP's end of text
            elif value.name == "attention_mask":
                feeds["attention_mask"] = np.ones((batch, length), np.int64)
            elif value.name == "token_type_ids":
                feeds["token_type_ids"] = np.repeat([[0, 1]], batch, 0).repeat((length + 1) // 2, 1)[:, :length]
            elif value.name == "pixel_values":
                feeds["pixel_values"] = generator.normal(size=(batch, *value.shape[1:])).astype(np.float32)
            else:
                feeds[value.name] = generator.normal(size=(batch, 3000 + 100 * length)).astype(np.float32)
        keep = feeds.get("attention_mask")
        if padding and keep is not None and "pixel_values" not in feeds:
            keep[0, -padding:] = 0
            feeds["input_ids"][0, -padding:] = model.config.pad_token_id or 0
        expected = model(**{name: torch.from_numpy(array) for name, array in feeds.items()})
        worst = 0.0
        for name, found in _run(session, feeds).items():
            if name == "sentence_embedding":
                continue
            wanted = expected[name].numpy()
            error = np.abs(found - wanted) / max(1.0, float(np.abs(wanted).max()))
            if keep is not None and wanted.ndim == 3 and wanted.shape[1] == length:
                error = error * keep[..., None]  # what a padded position gives is nobody's business
            worst = max(worst, float(error.max()))
        return worst

    return {"single": compare(1, 11, 0), "padded": compare(3, 20, 6)}


def _encoder_decoder(sessions: dict[str, Any], model: Any, generator: np.random.Generator) -> dict[str, float]:
    encoder = sessions["encoder_model"]
    feeds: Arrays = {}
    for value in encoder.get_inputs():
        if value.name == "input_ids":
            feeds["input_ids"] = _tokens(model, generator, 2, 9)
        elif value.name == "attention_mask":
            feeds["attention_mask"] = np.ones((2, 9), np.int64)
            feeds["attention_mask"][0, -3:] = 0
        else:
            feeds[value.name] = generator.normal(size=(2, *value.shape[1:])).astype(np.float32)
    ids = _tokens(model, generator, 2, 3 + STEPS)
    expected = model(
        **{name: torch.from_numpy(array) for name, array in feeds.items()}, decoder_input_ids=torch.from_numpy(ids)
    ).logits.numpy()
    scale = max(1.0, float(np.abs(expected).max()))
    shared: Arrays = {"encoder_hidden_states": _run(encoder, feeds)["last_hidden_state"]}
    if "attention_mask" in feeds:
        shared["encoder_attention_mask"] = feeds["attention_mask"]
    outputs = _run(sessions["decoder_model"], {"input_ids": ids[:, :3], **shared})
    result = {"prompt": float(np.abs(outputs["logits"] - expected[:, :3]).max()) / scale, "decode": 0.0}
    past = _as_past(outputs)
    for at in range(3, 3 + STEPS):
        outputs = _run(sessions["decoder_with_past_model"], {"input_ids": ids[:, at : at + 1], **shared, **past})
        error = float(np.abs(outputs["logits"] - expected[:, at : at + 1]).max()) / scale
        result["decode"] = max(result["decode"], error)
        past |= _as_past(outputs)
    return result

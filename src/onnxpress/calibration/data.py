"""Sample inputs for passes that look at activations: from the user's data, or from what the model writes itself."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from onnxpress.arrays import Feeds, Ids
from onnxpress.calibration.files import CalibrationRecord, Inputs, Recording, Texts, read_records
from onnxpress.calibration.fingerprint import fingerprint
from onnxpress.errors import BadInputError, UnsupportedModelError
from onnxpress.evaluation.inputs import encoder_rows, first_token, longest, random_feeds
from onnxpress.evaluation.kind import Opened
from onnxpress.evaluation.modes import continuation
from onnxpress.evaluation.opening import open_model
from onnxpress.evaluation.restriction import restricted
from onnxpress.evaluation.texts import cut, load_tokenizer, pad_rows, written_windows
from onnxpress.files.cache import cache_folder
from onnxpress.files.json_files import read_optional_json
from onnxpress.files.staging import replacing_file
from onnxpress.graph.checks import load_graph
from onnxpress.graph.conventions import DECODER, DECODER_WITH_PAST, ENCODER
from onnxpress.runtime.sessions import EncoderSession

ROWS, LENGTH = 4, 64
BATCH = 8
"""Rows in one run."""
WRITTEN = 16
"""Rows that a decoder writes at once: more take hardly less time each, and memory for a cache each."""
SEED = 1
"""Not evaluation's, so that nothing is judged on the text that it was fitted to."""
ANSWER = 24
"""Tokens that an encoder-decoder answers with where the data does not say what it should."""
SAMPLING_RATE = 16_000
STALE = 7 * 24 * 3600
"""Seconds after which what an interrupted calibration left is of no use."""


def calibration_folder() -> Path:
    """The folder where calibrations keep what they know, so that one that was killed goes on; removes old ones."""
    folder = cache_folder() / "calibration"
    for old in folder.iterdir() if folder.is_dir() else ():
        if time.time() - old.stat().st_mtime > STALE:
            shutil.rmtree(old, ignore_errors=True)
    return folder


@dataclass(frozen=True)
class CalibrationData:
    """The data to calibrate with; anything left out is decided by the pass that asks."""

    source: str | None = None
    """A file, a folder or the name of a data set, see `read_records`; none: what the model writes itself."""
    samples: int | None = None
    """Rows: windows of text, sentences, recordings."""
    length: int | None = None
    """Tokens in a row."""
    seed: int = SEED
    """The seed of the text that the model writes."""

    def feeds(
        self,
        graph: Path,
        rows: int = ROWS,
        length: int = LENGTH,
        threads: int | None = None,
        sidecar_folder: Path | None = None,
    ) -> dict[str, list[Feeds]]:
        """Samples for each graph of a model, by its name ("" for a model of one graph).

        Args:
            graph: by which the model is opened.
            rows, length: what the pass wants, unless the user said something else.
            sidecar_folder: one whose tokenizer and vocabulary the samples are for, where they are not the graph's.

        Raises:
            BadInputError: there is too little data, or it is of a kind that the model does not take.
        """
        rows, length = self.samples or rows, self.length or length
        opened = restricted(open_model(graph, threads=threads), sidecar_folder)
        if self.source is None:
            return _self_made(opened, graph, rows, length, self.seed)
        records = list(islice(read_records(self.source), 100_000))
        if not records:
            raise BadInputError(f"{self.source} holds no samples")
        if isinstance(records[0], Mapping):
            inputs = [str(value.name) for value in load_graph(graph).graph.inputs]
            if unknown := [name for name in records[0] if name not in inputs]:
                raise BadInputError(
                    f"{self.source} holds {', '.join(unknown)}, which the model does not take",
                    hint=f"its inputs are {', '.join(inputs[:6])}{', …' if len(inputs) > 6 else ''}",
                )
        return _from_records(opened, records, rows, length, self.source)


def _self_made(opened: Opened, graph: Path, rows: int, length: int, seed: int) -> dict[str, list[Feeds]]:
    """A decoder writes; an encoder gets the built-in sentences, a graph of neither kind random inputs."""
    if opened.kind == "decoder":
        length = longest(opened, length)
        written = _written(opened, graph, rows, length, seed)
        return {"": [_decoder_feeds(ids) for ids in _batches(written)]}
    if opened.kind in ("encoder", "encoder-decoder") and _takes_tokens(opened):
        token_rows, _ = encoder_rows((opened,), None, length, seed)
        token_rows = token_rows[: max(rows, 32)]
        if opened.kind == "encoder":
            return {"": [_encoder_feeds(token_rows)]}
        batches = [_encoder_feeds(token_rows[i : i + BATCH]) for i in range(0, rows, BATCH)]
        return _encoder_decoder_feeds(opened, batches, None)
    if opened.kind == "encoder-decoder":
        feeds = [random_feeds(opened.model.encoder, opened.config, seed + i) for i in range(min(rows, 4))]
        return _encoder_decoder_feeds(opened, feeds, None)
    if isinstance(opened.model, EncoderSession):
        return {"": [random_feeds(opened.model, opened.config, seed)]}
    return {}


def _written(opened: Opened, graph: Path, rows: int, length: int, seed: int) -> Ids:
    """Text that a decoder writes, [rows, length]: kept in the cache, as it takes up to minutes."""
    kept = getattr(opened.model, "kept", np.zeros(0, np.int64)).tolist()  # tokens, where some were taken away
    key = fingerprint(load_graph(graph), [], f"text {rows} {length} {seed} {WRITTEN} {opened.starts} {kept}")
    path = cache_folder() / "texts" / f"{key}.npy"
    with contextlib.suppress(OSError, ValueError, EOFError):  # none yet, or a damaged one
        found = np.load(path, allow_pickle=False)
        if found.shape == (rows, length) and found.dtype == np.int64:
            return np.asarray(found)
    written: Ids = np.concatenate(
        [
            row
            for start in range(0, rows, WRITTEN)
            for row in written_windows(opened.model, min(WRITTEN, rows - start), length, opened.starts, seed + start)
        ]
    )
    with replacing_file(path) as aside, aside.open("wb") as file:
        np.save(file, written)
    return written


def _from_records(
    opened: Opened, records: Sequence[CalibrationRecord], rows: int, length: int, source: str
) -> dict[str, list[Feeds]]:
    kinds = {
        Texts if isinstance(record, Texts) else Recording if isinstance(record, Recording) else dict
        for record in records
    }
    if len(kinds) > 1:
        raise BadInputError(f"{source} mixes texts, recordings and inputs")
    (kind,) = kinds
    if kind is dict:
        return {"": _input_feeds([record for record in records if isinstance(record, Mapping)][:rows])}
    if kind is Recording:
        feeds = [_recording_feeds(opened, record) for record in records[:rows] if isinstance(record, Recording)]
        return _encoder_decoder_feeds(opened, feeds, None) if opened.kind == "encoder-decoder" else {"": feeds}
    texts = [record for record in records if isinstance(record, Texts)]
    tokenizer = load_tokenizer(opened.folder)
    if tokenizer is None:
        raise BadInputError("the model has no tokenizer.json to read text with", hint="give token ids, as .npz")
    length = longest(opened, length)
    if opened.kind == "decoder":
        return {"": [_decoder_feeds(ids) for ids in _batches(_windows(opened, tokenizer, texts, rows, length, source))]}
    if not _takes_tokens(opened):
        raise BadInputError(f"{opened.name} takes no text", hint="give recordings, or inputs as .npz")
    if len(texts) == 1 and texts[0].second is None:  # a whole file: a line is a sentence
        texts = [Texts(line) for line in texts[0].first.splitlines() if line.strip()]
    texts = texts[:rows]
    batches = [texts[i : i + BATCH] for i in range(0, len(texts), BATCH)]
    if opened.kind == "encoder":
        together = "SequenceClassification" in str(opened.config.get("architectures"))
        return {"": [_text_feeds(tokenizer, batch, length, together) for batch in batches]}
    answers = [
        [tokenizer.encode(text.second).ids[:length] if text.second else None for text in batch] for batch in batches
    ]
    feeds = [_text_feeds(tokenizer, [Texts(text.first) for text in batch], length, False) for batch in batches]
    return _encoder_decoder_feeds(opened, feeds, answers)


def _takes_tokens(opened: Opened) -> bool:
    encoder = getattr(opened.model, "encoder", opened.model)
    return "input_ids" in getattr(encoder, "inputs", ())


def _batches(ids: Ids) -> Iterator[Ids]:
    for start in range(0, len(ids), BATCH):
        yield ids[start : start + BATCH]


def _windows(opened: Opened, tokenizer: Any, texts: Sequence[Texts], rows: int, length: int, source: str) -> Ids:
    """Texts one after the other, cut into rows [rows, length] that begin as the model's texts do."""
    ids: list[int] = []
    for text in texts:
        for part in (text.first, text.second):
            ids += tokenizer.encode(part, add_special_tokens=False).ids if part else []
        if len(ids) >= rows * length:
            break
    return cut(ids, rows, length, first_token(opened, tokenizer), source)


def _decoder_feeds(ids: Ids) -> Feeds:
    positions = np.broadcast_to(np.arange(ids.shape[1]), ids.shape).copy()
    return {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": positions}


def _encoder_feeds(rows: Sequence[Sequence[int]]) -> Feeds:
    ids, mask = pad_rows(rows)
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}


def _text_feeds(tokenizer: Any, texts: Sequence[Texts], length: int, together: bool) -> Feeds:
    """A row a text; both texts of a pair in one row if `together`, as a cross-encoder reads them, else in two."""
    if together:
        encodings = [tokenizer.encode(text.first, text.second) for text in texts]
    else:
        encodings = [tokenizer.encode(part) for text in texts for part in (text.first, text.second) if part]
    feeds = _encoder_feeds([encoding.ids[:length] for encoding in encodings])
    types, _ = pad_rows([encoding.type_ids[:length] for encoding in encodings])
    return {**feeds, "token_type_ids": types}


def _input_feeds(records: Sequence[Inputs]) -> list[Feeds]:
    """Batches of records of one shape."""
    feeds: list[Feeds] = []
    group: list[Inputs] = []
    for record in [*records, None]:
        if group and (record is None or len(group) == BATCH or _shapes(record) != _shapes(group[0])):
            feeds.append({name: np.stack([one[name] for one in group]) for name in group[0]})
            group = []
        if record is not None:
            group.append(record)
    return feeds


def _shapes(record: Inputs) -> dict[str, tuple[int, ...]]:
    return {name: array.shape for name, array in record.items()}


def _recording_feeds(opened: Opened, recording: Recording) -> Feeds:
    """A recording as the input of a model that takes samples. Recordings are not resampled."""
    encoder = getattr(opened.model, "encoder", opened.model)
    if "input_values" not in getattr(encoder, "inputs", ()):
        raise UnsupportedModelError(
            f"{opened.name} takes no samples of sound", hint="give what its feature extractor makes of them, as .npz"
        )
    settings = read_optional_json(opened.folder / "preprocessor_config.json") if opened.folder else {}
    rate = int(settings.get("sampling_rate", SAMPLING_RATE))
    if recording.rate != rate:
        raise BadInputError(
            f"{recording.name} has {recording.rate} samples a second; the model takes {rate}",
            hint=f"resample it: ffmpeg -i {recording.name} -ar {rate} out.wav",
        )
    samples = recording.samples[None, : 30 * rate]
    if settings.get("do_normalize", True):
        samples = (samples - samples.mean()) / np.sqrt(samples.var() + 1e-7)
    return {"input_values": samples.astype(np.float32), "attention_mask": np.ones(samples.shape, np.int64)}


def _encoder_decoder_feeds(
    opened: Opened, batches: Sequence[Feeds], answers: Sequence[Sequence[Sequence[int] | None]] | None
) -> dict[str, list[Feeds]]:
    """Samples for the encoder and for both decoders, whose inputs the encoder and the first decoder compute.

    Decoders read the answers in the data, where there are some, or what the model finds most likely.
    """
    model = opened.model
    start = int(opened.config.get("decoder_start_token_id") or 0)
    samples: dict[str, list[Feeds]] = {ENCODER: [], DECODER: [], DECODER_WITH_PAST: []}
    for number, feeds in enumerate(batches):
        states = model.encode(feeds)
        known = answers[number] if answers is not None else []
        if known and all(known):
            ids, mask = pad_rows([[start, *(one or [])] for one in known])
        else:
            ids = continuation(model, np.full((len(states), 1), start, np.int64), ANSWER)
            mask = np.ones_like(ids)
            model.encode(feeds)
        context = {
            "encoder_hidden_states": states,
            "encoder_attention_mask": feeds.get("attention_mask", np.ones(states.shape[:2], np.int64)),
        }
        if context["encoder_attention_mask"].shape != states.shape[:2]:  # of samples of sound, not of states
            context["encoder_attention_mask"] = np.ones(states.shape[:2], np.int64)
        samples[ENCODER].append(feeds)
        samples[DECODER].append({"input_ids": ids, "decoder_attention_mask": mask, **context})
        half = max(1, ids.shape[1] // 2)
        model.prefill(ids[:, :half])
        cached = {name: array.copy() for name, array in model.cache.items()}
        later = {"input_ids": ids[:, half : half + 1], "decoder_attention_mask": mask[:, : half + 1]}
        if later["input_ids"].shape[1]:
            samples[DECODER_WITH_PAST].append({**later, **context, **cached})
    return samples

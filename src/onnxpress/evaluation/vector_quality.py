"""How good models that make vectors are: encoders, and any other graphs, by the angle between theirs and the
reference's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from onnxpress.arrays import Ids
from onnxpress.errors import BadInputError
from onnxpress.evaluation import probes
from onnxpress.evaluation.metrics import cosine, require_finite, spearman
from onnxpress.evaluation.opening import Opened, random_feeds
from onnxpress.evaluation.quality import Evaluation
from onnxpress.evaluation.restriction import restricted
from onnxpress.evaluation.samples import encoder_rows
from onnxpress.evaluation.texts import Progress, load_tokenizer, pad, read_pairs
from onnxpress.runtime.sessions import EncoderSession, pool


def evaluate_encoders(
    candidate: Opened,
    reference: Opened,
    text: str | Path | Sequence[Ids] | None,
    pairs: str | Path | None,
    window: int,
    seed: int,
    progress: Progress | None,
) -> Evaluation:
    """Encoders: the pooled vector of each row, alone and in a padded batch; the rank correlation of pairs."""
    if text is None or isinstance(text, str | Path):
        rows, source = encoder_rows((reference, candidate), text, window, seed)
    else:
        rows, source = [ids[0].tolist() for ids in text], "token ids"
    own = rows
    if restricted(reference, candidate.folder) is not reference:
        assert text is None or isinstance(text, str | Path)
        own, _ = encoder_rows((candidate,), text, window, seed)
    expected, single, batched = [], [], []
    name = ""
    for i in range(0, len(rows), 4):
        ids, mask = pad(own[i : i + 4])
        together = candidate.model.encode(ids, mask)
        for j, (row, ours_row) in enumerate(zip(rows[i : i + 4], own[i : i + 4], strict=True)):
            theirs = reference.model.encode(np.array([row], np.int64))
            ours = candidate.model.encode(np.array([ours_row], np.int64))
            name = name or probes.common_output(theirs, ours)
            require_finite(ours[name], f"{name} of one row")
            expected.append(pool({name: theirs[name]})[0])
            single.append(pool({name: ours[name]})[0])
            real = mask[j : j + 1]
            batched.append(pool({name: together[name][j : j + 1]}, real)[0])
            require_finite(batched[-1], f"{name} in a padded batch")
        if progress:
            progress("evaluating", min(i + 4, len(rows)), len(rows))
    modes = {}
    for mode, found in (("prefill", single), ("padded", batched)):
        cosines = cosine(np.stack(expected), np.stack(found))
        modes[mode] = {"cosine_mean": float(cosines.mean()), "cosine_min": float(cosines.min())}
    theirs_rank = ours_rank = None
    if pairs is not None:
        ours_rank, theirs_rank = _rank_pairs(candidate, reference, Path(pairs), name, window, progress)
    return Evaluation(
        kind="encoder",
        text=source,
        tokens=sum(map(len, rows)),
        cosine_mean=min(mode["cosine_mean"] for mode in modes.values()),
        cosine_min=min(mode["cosine_min"] for mode in modes.values()),
        more_tokens=sum(map(len, own)) / sum(map(len, rows)) - 1 if own is not rows else None,
        spearman=ours_rank,
        reference_spearman=theirs_rank,
        modes=modes,
    )


def _rank_pairs(
    candidate: Opened, reference: Opened, path: Path, name: str, window: int, progress: Progress | None
) -> tuple[float, float]:
    """Rank correlation of the cosine of each pair with its score: (candidate's, reference's)."""
    tokenizer = load_tokenizer(reference.folder) or load_tokenizer(candidate.folder)
    if tokenizer is None:
        raise BadInputError("neither model has a tokenizer.json to read pairs with")
    trimmed = restricted(reference, candidate.folder) is not reference
    readers = (load_tokenizer(candidate.folder) if trimmed else tokenizer, tokenizer)
    rows = read_pairs(path)
    found = []
    for number, (opened, reader) in enumerate(zip((candidate, reference), readers, strict=True)):
        tokens = [[reader.encode(sentence).ids[:window] for sentence in (row.first, row.second)] for row in rows]
        # Rows of like length together: less padding to compute, the same cosines.
        order = sorted(range(len(rows)), key=lambda i: max(map(len, tokens[i])))
        scores = np.zeros(len(rows))
        for i in range(0, len(rows), 16):
            group = order[i : i + 16]
            ids, mask = pad([sentence for row in group for sentence in tokens[row]])
            vectors = pool({name: opened.model.encode(ids, mask)[name]}, mask)
            scores[group] = cosine(vectors[0::2], vectors[1::2])
            if progress:
                progress("ranking pairs", number * len(rows) + min(i + 16, len(rows)), 2 * len(rows))
        require_finite(scores, "cosines of pairs")
        found.append(spearman(scores, np.array([row.score for row in rows])))
    return found[0], found[1]


def evaluate_graphs(candidate: Opened, reference: Opened, seed: int) -> Evaluation:
    """Any two graphs: the same random inputs, cosine of each output's last axis."""
    session = next((o.model for o in (candidate, reference) if isinstance(o.model, EncoderSession)), None)
    if session is None:
        raise BadInputError(f"{candidate.name} cannot be measured: its inputs are unknown")
    cosines = []
    for i in range(4):
        feeds = random_feeds(session, candidate.config or reference.config, seed + i)
        ours, theirs = candidate.model.run(feeds), reference.model.run(feeds)
        names = [name for name in ours if name in theirs] or [probes.common_output(theirs, ours)]
        for name in names:
            require_finite(ours[name], name)
            if ours[name].shape != theirs[name].shape:
                raise BadInputError(f"{name}: shapes {theirs[name].shape} and {ours[name].shape}")
            cosines.append(np.atleast_1d(cosine(theirs[name], ours[name])).ravel())
    values = np.concatenate(cosines)
    figures = {"cosine_mean": float(values.mean()), "cosine_min": float(values.min())}
    return Evaluation(kind="graph", text="random inputs", tokens=0, modes={"prefill": figures}, **figures)

"""Tokenizer files and configs with the kept tokens only, under their new ids: the n-th of the kept ids becomes n."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from onnxpress.arrays import Ids
from onnxpress.errors import UnsupportedModelError
from onnxpress.vocabulary.tokens import pair, read_vocabulary

Renumber = Callable[[int], int | None]

_ID = re.compile(r"(.*_)?token_(ids?|index)")
_ID_LISTS = ("suppress_tokens", "begin_suppress_tokens", "bad_words_ids")


def renumbering(kept: Ids) -> Renumber:
    """The new id of an old one, None where it is gone."""
    new = {int(old): number for number, old in enumerate(kept)}
    return new.get


def trimmed(tokenizer: Mapping[str, Any], kept: Ids) -> dict[str, Any]:
    """A tokenizer.json with these tokens only; merges whose parts or result are gone go as well.

    UnsupportedModelError where a token that the file refers to is not among them.
    """
    new = renumbering(kept)
    result = copy.deepcopy(dict(tokenizer))
    model = result["model"]
    vocabulary = read_vocabulary(tokenizer)
    if vocabulary.kind == "Unigram":
        model["vocab"] = [entry for number, entry in enumerate(model["vocab"]) if new(number) is not None]
        if model.get("unk_id") is not None:
            model["unk_id"] = _surely(new, model["unk_id"], "the unknown token")
    else:
        model["vocab"] = {token: number for token, old in model["vocab"].items() if (number := new(old)) is not None}
    if vocabulary.kind == "BPE":
        model["merges"] = [merge for merge in model["merges"] if _possible(pair(merge), model["vocab"])]
    for one in result.get("added_tokens") or ():
        one["id"] = _surely(new, one["id"], f"the added token {one['content']}")
    _renumber_templates(result.get("post_processor"), new)
    if result.get("padding"):
        result["padding"]["pad_id"] = _surely(new, result["padding"]["pad_id"], "the padding token")
    return result


def _possible(merge: tuple[str, str], vocabulary: Mapping[str, int]) -> bool:
    left, right = merge
    return left in vocabulary and right in vocabulary and left + right in vocabulary


def _renumber_templates(part: Any, new: Renumber) -> None:
    if not isinstance(part, dict):
        return
    for processor in part.get("processors") or ():
        _renumber_templates(processor, new)
    if isinstance(part.get("special_tokens"), dict):
        for name, token in part["special_tokens"].items():
            token["ids"] = [_surely(new, number, f"{name} of the template") for number in token["ids"]]
    for name in ("sep", "cls"):
        if isinstance(part.get(name), list):
            part[name] = [part[name][0], _surely(new, part[name][1], f"{part[name][0]} of the template")]


def _surely(new: Renumber, old: int, what: str) -> int:
    found = new(int(old))
    if found is None:
        raise UnsupportedModelError(f"{what} has the id {old}, which is not kept")
    return found


def config_ids(config: Any) -> set[int]:
    """Token ids that a config.json or generation_config.json names, and that a model needs to work."""
    ids: set[int] = set()
    if isinstance(config, Mapping):
        for key, value in config.items():
            if _ID.fullmatch(str(key)):
                ids.update(_numbers(value))
            elif isinstance(value, Mapping):
                ids |= config_ids(value)
    return ids


def _numbers(value: Any) -> Iterable[int]:
    values = value if isinstance(value, list) else [value]
    return (one for one in values if isinstance(one, int) and not isinstance(one, bool) and one >= 0)


def renumbered_config(config: Mapping[str, Any], kept: Ids, size: int) -> dict[str, Any]:
    """A config with new ids, and with a new `vocab_size` where it was `size`.

    Lists of what must not be written lose the words that are gone.
    """
    new = renumbering(kept)
    result: dict[str, Any] = {}
    for key, value in config.items():
        if key == "vocab_size" and value == size:
            result[key] = len(kept)
        elif _ID.fullmatch(key) or key in _ID_LISTS:
            result[key] = _renumbered(value, new)
        elif isinstance(value, Mapping):
            result[key] = renumbered_config(value, kept, size)
        else:
            result[key] = value
    return result


def _renumbered(value: Any, new: Renumber) -> Any:
    """New ids in the place of old ones; negative numbers mean none."""
    if isinstance(value, list):
        found = [_renumbered(one, new) for one in value]
        return [one for one in found if one is not None and one != []]
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return new(value)
    return value


def renumbered_settings(settings: Mapping[str, Any], kept: Ids) -> dict[str, Any]:
    """A tokenizer_config.json: its added tokens are listed by their ids."""
    if "added_tokens_decoder" not in settings:
        return dict(settings)
    new = renumbering(kept)
    tokens = settings["added_tokens_decoder"].items()
    listed = {str(number): token for old, token in tokens if (number := new(int(old))) is not None}
    return {**settings, "added_tokens_decoder": listed}


def word_files(tokenizer: Mapping[str, Any]) -> dict[str, str]:
    """The older files that hold what a tokenizer.json does, by their names: vocab.json and merges.txt, or vocab.txt."""
    import json

    vocabulary = tokenizer["model"]["vocab"]
    if "merges" in tokenizer["model"]:
        merges = "".join(f"{' '.join(pair(merge))}\n" for merge in tokenizer["model"]["merges"])
        return {
            "vocab.json": json.dumps(vocabulary, ensure_ascii=False),
            "merges.txt": f"#version: 0.2\n{merges}",
        }
    if isinstance(vocabulary, dict):
        return {"vocab.txt": "".join(f"{token}\n" for token in sorted(vocabulary, key=vocabulary.__getitem__))}
    return {}

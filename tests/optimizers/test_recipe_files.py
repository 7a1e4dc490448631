"""`extends`: which tables a recipe inherits, what changes them, and what is said when that cannot be."""

from __future__ import annotations

import json
import tomllib
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxpress.errors import UsageError
from onnxpress.optimizers import recipe
from onnxpress.optimizers.recipe_files import ENTRIES, extend, packaged

BASE = """
name = "base"
description = "below"
[[pass]]
name = "clean-up"
optional = true
[[pass]]
name = "quantize-dynamic"
max_error = 0.1
[[pass]]
name = "quantize-dynamic"
activations = "per_token"
[[format]]
name = "small"
pass = "quantize-blocks"
bits = 4
[[format]]
name = "two"
passes = [{ name = "rotate" }, { name = "quantize-dynamic" }]
[importance]
"*.0.*" = 2.0
"*.1.*" = 3.0
[[after]]
name = "last-logits"
"""


@pytest.fixture
def extended(tmp_path: Path) -> Any:
    """Write `text` as a recipe that extends BASE, and read it."""
    (tmp_path / "base.toml").write_text(BASE)

    def read(text: str) -> dict[str, Any]:
        (tmp_path / "mine.toml").write_text(f'extends = "base.toml"\n{text}')
        return recipe.load_recipe(str(tmp_path / "mine.toml")).to_dict()

    return read


def names(found: dict[str, Any], key: str = "pass") -> list[str]:
    return [row["name"] for row in found[key]]


def test_nothing_changed_is_all_but_the_name(extended: Any) -> None:
    whole = tomllib.loads(BASE)
    del whole["description"]
    assert extended("") == whole | {"name": "mine"}


def test_named_options_change_and_the_others_stay(extended: Any) -> None:
    found = extended('[[pass]]\nname = "quantize-dynamic"\nweight_type = "int8"')
    assert found["pass"][1:] == [
        {"name": "quantize-dynamic", "max_error": 0.1, "weight_type": "int8"},
        {"name": "quantize-dynamic", "activations": "per_token"},
    ]


def test_the_second_of_a_name_is_for_the_second_and_the_third_is_new(extended: Any) -> None:
    found = extended("\n".join(f'[[pass]]\nname = "quantize-dynamic"\nmin_features = {size}' for size in (1, 2, 3)))
    assert [row.get("min_features") for row in found["pass"]] == [None, 1, 2, 3]
    assert found["pass"][3] == {"name": "quantize-dynamic", "min_features": 3}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('name = "smooth"', ["clean-up", "quantize-dynamic", "quantize-dynamic", "smooth"]),
        ('name = "smooth"\nbefore = "clean-up"', ["smooth", "clean-up", "quantize-dynamic", "quantize-dynamic"]),
        (
            'name = "smooth"\nbefore = "quantize-dynamic"',
            ["clean-up", "smooth", "quantize-dynamic", "quantize-dynamic"],
        ),
        ('name = "quantize-dynamic"\nbefore = "clean-up"', ["quantize-dynamic", "clean-up", "quantize-dynamic"]),
    ],
)
def test_where_an_entry_stands(text: str, expected: list[str], extended: Any) -> None:
    assert names(extended(f"[[pass]]\n{text}")) == expected


def test_entries_are_removed_by_name_before_others_are_added(extended: Any) -> None:
    found = extended('remove = ["quantize-dynamic", "two", "last-logits"]\n[[pass]]\nname = "quantize-dynamic"')
    assert found["pass"] == [{"name": "clean-up", "optional": True}, {"name": "quantize-dynamic"}]
    assert names(found, "format") == ["small"]
    assert "after" not in found


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("block_size = 32", {"pass": "quantize-blocks", "bits": 4, "block_size": 32}),
        ('pass = "quantize-blocks"\nbits = 8', {"pass": "quantize-blocks", "bits": 8}),
        ('pass = "quantize-dynamic"', {"pass": "quantize-dynamic"}),
        ('passes = [{name = "rotate"}, {name = "smooth"}]', {"passes": [{"name": "rotate"}, {"name": "smooth"}]}),
    ],
)
def test_a_format_that_names_another_pass_keeps_nothing(text: str, expected: dict[str, Any], extended: Any) -> None:
    assert extended(f'[[format]]\nname = "small"\n{text}')["format"][0] == {"name": "small", **expected}


def test_own_importance_comes_first(extended: Any) -> None:
    found = extended('[importance]\n"*.9.*" = 9.0\n"*.1.*" = 5.0')["importance"]
    assert list(found.items()) == [("*.9.*", 9.0), ("*.1.*", 5.0), ("*.0.*", 2.0)]


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ('remove = ["quantize-dynamik"]', "unknown entry to remove in mine.toml: quantize-dynamik", "quantize-dynamic"),
        ('remove = "clean-up"', "remove is a list of names", None),
        ('[[pass]]\nname = "smooth"\nbefore = "clean_up"', "to put smooth before in mine.toml: clean_up", "clean-up"),
        ('[[pass]]\nname = "smooth"\nbefore = 3', "to put smooth before in mine.toml: 3", None),
        ('[[format]]\nname = "two"\nbits = 4', "format two has passes, and bits beside them", None),
        ('[[pass]]\nname = "quantize-dynamik"', "unknown pass", "quantize-dynamic"),
        ("importance = 3", "importance is a table", None),
    ],
)
def test_what_is_wrong_is_said(text: str, message: str, hint: str | None, extended: Any) -> None:
    with pytest.raises(UsageError) as caught:
        extended(text)
    assert message in str(caught.value)
    if hint is not None:
        assert hint in (caught.value.hint or "")


def test_options_are_checked_after_the_merge(extended: Any, tmp_path: Path) -> None:
    extended('[[pass]]\nname = "quantize-dynamic"\nmax_errror = 1')
    with pytest.raises(UsageError, match="unknown option of quantize-dynamic: max_errror"):
        recipe.load_recipe(str(tmp_path / "mine.toml")).build()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('extends = "cpu-decodr"', "unknown recipe that recipe extends: cpu-decodr"),
        ('extends = "nowhere.toml"', "unknown recipe that recipe extends: nowhere.toml"),
        ("extends = 3", "extends is the name of a recipe or a path"),
        ('remove = ["x"]', "remove is for a recipe that extends another"),
        ('[[pass]]\nname = "smooth"\nbefore = "rotate"', "before is for a recipe that extends another"),
    ],
)
def test_what_cannot_be_extended(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        recipe.parse_recipe(text)


@pytest.mark.parametrize("files", [["a"], ["a", "b"], ["a", "b", "c"]])
def test_a_circle_is_an_error(files: list[str], tmp_path: Path) -> None:
    for name, below in zip(files, [*files[1:], files[0]], strict=True):
        (tmp_path / f"{name}.toml").write_text(f'extends = "{below}.toml"')
    with pytest.raises(UsageError, match=r"circle: a\.toml → .*a\.toml"):
        recipe.load_recipe(str(tmp_path / "a.toml"))


def test_paths_are_relative_to_the_file_that_names_them(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    (tmp_path / "base.toml").write_text('extends = "fp32"')
    (tmp_path / "inner" / "middle.toml").write_text('extends = "../base.toml"')
    (tmp_path / "mine.toml").write_text('extends = "inner/middle.toml"')
    assert names(recipe.load_recipe(str(tmp_path / "mine.toml")).to_dict()) == ["clean-up", "pack-projections"]


entries = st.lists(
    st.builds(
        lambda name, options: {"name": name, **options},
        st.sampled_from("abc"),
        st.dictionaries(st.sampled_from(["bits", "ratio"]), st.integers(0, 3)),
    ),
    max_size=5,
)
tables = st.fixed_dictionaries({}, optional=dict.fromkeys(ENTRIES, entries))


@given(tables)
def test_extending_with_nothing_or_with_itself_changes_nothing(base: dict[str, Any]) -> None:
    whole = {key: value for key, value in base.items() if value}
    assert extend(base, {}, "x") == whole
    assert extend(base, base, "x") == whole


@given(tables, tables)
def test_inherited_names_stay_in_order_and_own_options_win(base: dict[str, Any], own: dict[str, Any]) -> None:
    found = extend(base, own, "x")
    for key in ENTRIES:
        before, after, mine = base.get(key, []), found.get(key, []), own.get(key, [])
        assert [row["name"] for row in after[: len(before)]] == [row["name"] for row in before]
        for row in mine:
            assert any(row.items() <= other.items() for other in after)


GOLDEN = {
    "as-stored": "clean-up pack-projections compute-rotary keep-blocks",
    "budget": "clean-up pack-projections compute-rotary smooth "
    "| embedding 8 bits, embedding 4 bits, int8, int8 rotated, 8 bits, 4 bits",
    "budget-stored": "clean-up pack-projections compute-rotary | as stored, embedding 8 bits, int8 rotated, 8 bits",
    "budget-structure": "clean-up smooth | ffn 37.5%, ffn 50%, ffn 62.5%, ffn 75%, ffn 87.5%, heads 33%, heads 50%, "
    "heads 67%, removed | embedding 8 bits, embedding 4 bits, int8, 8 bits, 4 bits | compute-rotary",
    "cpu-blocks": "clean-up pack-projections compute-rotary quantize-experts quantize-embedding quantize-blocks",
    "cpu-decoder": "clean-up pack-projections compute-rotary smooth quantize-experts quantize-embedding "
    "quantize-dynamic quantize-blocks",
    "cpu-encoder": "clean-up pack-projections smooth quantize-embedding quantize-dynamic quantize-dynamic",
    "cpu-prompts": "clean-up pack-projections compute-rotary smooth quantize-embedding quantize-dynamic rotate "
    "quantize-dynamic",
    "fp32": "clean-up pack-projections",
    "smallest": "clean-up pack-projections compute-rotary smooth quantize-experts quantize-embedding quantize-dynamic "
    "quantize-blocks integer-prompts",
    "static-encoder": "clean-up pack-projections smooth quantize-embedding quantize-static quantize-blocks",
}


def test_recipes_of_the_package_resolve_to_these_entries() -> None:
    found = {}
    for name in recipe.recipe_names():
        whole = recipe.load_recipe(name)
        parts = [" ".join(spec.name for spec in whole.passes), ", ".join(whole.cuts), ", ".join(whole.formats)]
        found[name] = " | ".join(filter(None, [*parts, " ".join(spec.name for spec in whole.after)]))
    assert found == GOLDEN


def test_no_table_stands_in_three_recipes() -> None:
    files = defaultdict(set)
    for name, text in packaged().items():
        table = tomllib.loads(text)
        for row in (row for key in ENTRIES for row in table.get(key, [])):
            files[json.dumps(row, sort_keys=True)].add(name)
    assert {row: where for row, where in files.items() if len(where) > 2} == {}


def test_a_recipe_holds_all_that_it_inherits() -> None:
    """Nothing of `extends` is left in what the artifact keeps."""
    whole = recipe.load_recipe("smallest").to_dict()
    assert whole.keys() == {"name", "description", "pass"}
    assert not any("before" in row for row in whole["pass"])

"""What the benchmarks compute from figures; measuring itself is not tested here."""

from __future__ import annotations

import importlib
import random
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import onnxpress

BENCHMARKS = Path(onnxpress.__file__).parents[2] / "benchmarks"


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a file of benchmarks/, as its scripts do, and forgets it afterwards."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    before = set(sys.modules)

    def load(name: str) -> ModuleType:
        return importlib.import_module(name)

    yield load
    for name in set(sys.modules) - before:
        if getattr(sys.modules[name], "__file__", None) and Path(str(sys.modules[name].__file__)).parent == BENCHMARKS:
            del sys.modules[name]


def rows(*points: tuple[str, str, int, float]) -> dict[str, dict[str, Any]]:
    return {name: {"family": family, "bytes": size, "KL": loss} for name, family, size, loss in points}


def test_the_frontier_is_what_nobody_equals_or_beats_at_both(module: Any) -> None:
    given = rows(
        ("a", "x", 10, 0.5), ("b", "x", 20, 0.1), ("c", "y", 20, 0.2), ("d", "y", 30, 0.1), ("e", "y", 10, 0.5)
    )
    assert module("comparison").frontier(given) == {"a", "b", "e"}


def test_ours_name_those_that_beat_them(module: Any) -> None:
    given = rows(("mine", "onnxpress", 20, 0.2), ("small", "onnxpress", 9, 0.9), ("theirs", "llama.cpp", 19, 0.2))
    found = {row["ours"]: list(row.values())[1] for row in module("comparison").beaten(given)}
    assert found == {"mine": "theirs", "small": "nobody"}


def test_tables_go_between_their_marks_and_nowhere_else(module: Any) -> None:
    page = "before\n<!-- A -->\nold\n<!-- end -->\nbetween\n<!-- B -->\n<!-- end -->\nafter\n"
    once = module("comparison").page_with(page, {"A": r"| \1 |"})
    assert once == "before\n<!-- A -->\n\n| \\1 |\n\n<!-- end -->\nbetween\n<!-- B -->\n<!-- end -->\nafter\n"
    assert module("comparison").page_with(once, {"A": r"| \1 |"}) == once


def test_contenders_that_failed_are_named_with_the_reason(module: Any) -> None:
    given = rows(("onnxruntime fp32", "onnxruntime", 40, 0.0)) | {"Olive": {"family": "Olive", "failed": "no wheel"}}
    text = module("comparison").tables({"subjects": {"decoder": given}})["SmolLM2-135M-Instruct"]
    assert "Not run: Olive: no wheel" in text
    assert "| Olive" not in text


def test_ranks_share_the_mean_where_values_are_equal(module: Any) -> None:
    generator = random.Random(0)
    values = [generator.randrange(20) / 4 for _ in range(50)]
    counts = np.array(values)
    expected = [(counts < value).sum() + ((counts == value).sum() + 1) / 2 for value in values]
    assert module("encoder").ranks(values) == pytest.approx(expected, abs=0)


def test_options_go_to_the_subject_that_they_name(module: Any) -> None:
    subjects = module("subjects")
    given = ["one=-r a", "gpt:two=--max-loss 1%", "encoder:three=--pass x:bits=4"]
    assert subjects.named(module("contenders").Subject("gpt", "model"), given) == {
        "one": "-r a",
        "two": "--max-loss 1%",
    }
    encoder = module("contenders").Subject("encoder", "model")
    assert subjects.named(encoder, given) == {"one": "-r a", "three": "--pass x:bits=4"}


def structured(**rows: tuple[str, str, float]) -> dict[str, dict[str, Any]]:
    found = {
        name: {"family": family, "method": method, "change %": change, "KL": 0.1, "cut": "half"}
        for name, (family, method, change) in rows.items()
    }
    whole = {"onnxruntime fp32": {"family": "onnxruntime", "perplexity": 10.0, "change %": 0.0, "KL": 0.0}}
    return {name: {"bytes": 4000, "parameters": 1000, **row} for name, row in (found | whole).items()}


def test_damage_is_held_against_slicing_at_its_best(module: Any) -> None:
    given = structured(
        a=("plain", "slice: first", 900.0), b=("plain", "slice: loudest", 99.0), c=("onnxpress", "fitted", 2.0)
    )
    text = module("structure").tables({"subjects": {"gpt": given}})["A small GPT, never in 4 bits"]
    rows = [line.split("|") for line in text.splitlines() if line.startswith("|")]
    assert [row[1].strip() for row in rows[2:]] == [
        "plain slice: first",
        "plain slice: loudest",
        "**onnxpress fitted**",
    ]
    expected = np.log(1.99) / np.log(1.02)
    assert [float(row[-2]) for row in rows[2:]] == pytest.approx([np.log(1.99) / np.log(10), 1, expected], abs=0.06)


def test_cuts_come_in_the_order_of_the_list(module: Any) -> None:
    structure = module("structure")
    names = [cut["name"] for cut in structure.cuts("gpt")]
    rows = structured(**dict.fromkeys(reversed(names), ("plain", "slice", 9.0)))
    for name in names:
        rows[name]["cut"] = name
    text = structure.tables({"subjects": {"gpt": rows}})["A small GPT, never in 4 bits"]
    assert [line.strip("*") for line in text.splitlines() if line.startswith("**")] == names


def test_every_cut_of_the_list_is_of_a_subject_and_has_one_slice_or_a_reason(module: Any) -> None:
    structure, subjects = module("structure"), module("subjects")
    found = [cut for name in subjects.SUBJECTS for cut in structure.cuts(name)]
    assert found
    for cut in found:
        assert any("slice" in method for family in ("plain", "onnxpress") for method in cut.get(family, {})), cut[
            "name"
        ]


@pytest.mark.parametrize(("before", "after"), [(9, 6), (12, 4), (1536, 1152), (5, 5)])
def test_averages_have_columns_that_sum_to_one_and_count_each_head_alike(
    monkeypatch: pytest.MonkeyPatch, module: Any, before: int, after: int
) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS / "peers")
    matrix = module("plain_cuts").averaging(before, after)
    assert matrix.shape == (before, after)
    np.testing.assert_allclose(matrix.sum(0), 1)
    np.testing.assert_allclose(matrix.sum(1), after / before)


def test_equal_heads_average_without_loss(monkeypatch: pytest.MonkeyPatch, module: Any) -> None:
    """Values averaged and outputs summed is what all heads gave; the formula as it stands shrinks it."""
    monkeypatch.syspath_prepend(BENCHMARKS / "peers")
    cuts = module("plain_cuts")
    generator = np.random.default_rng(0)
    value = np.tile(generator.normal(size=(16, 4)), (1, 6))
    output = generator.normal(size=(24, 16))
    for method, factor in (("average", 1.0), ("literal", 2 / 6)):
        into, out = cuts.matrices(method, 6, 2, 0, np.ones(6))
        small = cuts.mix(value, into, 4) @ cuts.mix(output.T, out, 4).T
        np.testing.assert_allclose(small, factor * (value @ output), rtol=1e-10)

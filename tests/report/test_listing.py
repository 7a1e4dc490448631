"""`onnxpress list` prints one item in full, and every option of every pass is explained."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from onnxpress.cli import main
from onnxpress.errors import UsageError
from onnxpress.optimizers import registry
from onnxpress.report import listing


@pytest.mark.parametrize("name", sorted(registry.PASSES))
def test_every_option_has_an_explanation_of_its_own(name: str) -> None:
    options = listing.pass_details(name)["options"]
    assert [option["name"] for option in options if not option["explanation"]] == []
    times = Counter(option["explanation"] for option in options)
    shared = {option["name"] for option in options if times[option["explanation"]] > 1}
    assert shared == set()
    refers = {option["name"] for option in options if option["explanation"].startswith(("see ", "as in "))}
    assert refers == set(), "says what it means, not where that is said"


@pytest.mark.parametrize("name", sorted(registry.PASSES))
def test_nothing_is_explained_that_is_no_option(name: str) -> None:
    explained = listing.explanations(registry.pass_class(name)).keys()
    assert explained <= {option["name"] for option in listing.pass_details(name)["options"]}


class Explained:
    def __init__(self) -> None:
        """Do something: not an option.

        Args:
            first: one line: with a colon.
            second, third: two lines,
                of which this is the second.

        Raises:
            ValueError: not an option either.
        """


def test_explanations_are_read_from_the_docstring() -> None:
    both = "two lines, of which this is the second."
    expected = {"first": "one line: with a colon.", "second": both, "third": both}
    assert listing.explanations(Explained) == expected  # type: ignore[arg-type]


def test_one_pass(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "passes", "rotate"]) == 0
    text = capsys.readouterr().out
    assert "size: int = 16" in text
    assert "a power of two" in text
    assert main(["list", "passes", "rotate", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["name"], found["exact"]) == ("rotate", True)
    size = found["options"][0]
    assert (size["name"], size["type"], size["default"]) == ("size", "int", 16)
    assert "power of two" in size["explanation"]


@pytest.mark.parametrize(
    ("what", "name", "holds"),
    [
        ("recipes", "budget", ("quantize-embedding", "int8 rotated", "optional")),
        ("profiles", "cpu-arm64", ("aarch64", "cpu-decoder")),
        ("models", "all-minilm-l6-v2", ("apache-2.0", "pypi", "mean")),
    ],
)
def test_one_of_the_others(what: str, name: str, holds: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", what, name]) == 0
    text = capsys.readouterr().out
    assert [word for word in holds if word not in text] == []
    assert main(["list", what, name, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["name"] == name


@pytest.mark.parametrize(
    ("what", "name", "nearest"),
    [
        ("passes", "rotat", "rotate"),
        ("recipes", "budgett", "budget"),
        ("profiles", "cpu-arm", "cpu-arm64"),
        ("models", "all-minilm", "all-minilm-l6-v2"),
    ],
)
def test_an_unknown_name_gives_the_nearest(what: str, name: str, nearest: str) -> None:
    with pytest.raises(UsageError, match=f"unknown .*: {name}") as caught:
        listing.details(what, name)
    assert caught.value.hint == f"did you mean {nearest}?"


def test_architectures_are_not_of_one_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "models", "all-minilm-l6-v2", "--architectures"]) == 2
    assert "--architectures goes with" in capsys.readouterr().err

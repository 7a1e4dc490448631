"""Recipes: TOML is the list of passes; what is unknown or of the wrong type is refused with a helpful word."""

from __future__ import annotations

from typing import Literal

import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxpress.errors import UsageError
from onnxpress.graph.report import Report
from onnxpress.optimizers import recipe, recipe_files, registry
from onnxpress.optimizers.base import Context, Pass


class Shrink(Pass):
    name = "test-shrink"

    def __init__(
        self,
        bits: Literal[4, 8] = 8,
        ratio: float = 1.0,
        layers: tuple[str, ...] = (),
        method: str | None = None,
        exact_zero: bool = False,
    ) -> None:
        if ratio <= 0:
            raise ValueError("ratio must be positive")
        self.bits, self.ratio, self.layers, self.method, self.exact_zero = bits, ratio, layers, method, exact_zero

    def apply(self, model: ir.Model, context: Context, report: Report) -> None:
        report.match("shrunk", self.bits)


class Needy(Pass):
    name = "test-needy"

    def __init__(self, size: int) -> None:
        self.size = size

    def apply(self, model: ir.Model, context: Context, report: Report) -> None: ...


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "shrink_for_tests", sys.modules[__name__])
    monkeypatch.setitem(registry.PASSES, "test-shrink", "shrink_for_tests:Shrink")
    monkeypatch.setitem(registry.PASSES, "test-needy", "shrink_for_tests:Needy")


TOML = """
name = "mine"
description = "for the test"
[[pass]]
name = "test-shrink"
bits = 4
ratio = 2
layers = ["a", "b"]
[[pass]]
name = "test-shrink"
optional = true
method = "auto"
bits = "auto"
"""


def test_toml_becomes_typed_passes_in_order() -> None:
    found = recipe.parse_recipe(TOML)
    first, second = found.resolve({"test-shrink": {"bits": 4}}).build()
    assert isinstance(first, Shrink)
    assert isinstance(second, Shrink)
    assert (first.bits, first.ratio, first.layers) == (4, 2.0, ("a", "b"))
    assert (second.bits, second.method) == (4, None), "auto comes from the profile, or is left to the default"
    assert [spec.optional for spec in found.passes] == [False, True]
    assert (found.name, found.description) == ("mine", "for the test")


def test_a_recipe_says_the_same_as_its_toml() -> None:
    import tomllib

    assert recipe.parse_recipe(TOML).to_dict() == tomllib.loads(TOML)


FORMATS = """
name = "searched"

[[pass]]
name = "test-shrink"
bits = 8

[[format]]
name = "small"
pass = "test-shrink"
bits = 4

[[format]]
name = "two steps"
passes = [{ name = "test-shrink", ratio = 0.5 }, { name = "test-shrink", bits = 4, optional = true }]
"""


def test_a_format_is_a_pass_or_several() -> None:
    import tomllib

    found = recipe.parse_recipe(FORMATS)
    assert [[spec.name for spec in specs] for specs in found.formats.values()] == [["test-shrink"], ["test-shrink"] * 2]
    assert found.formats["two steps"][1] == recipe.PassSpec("test-shrink", {"bits": 4}, optional=True)
    assert found.to_dict() == tomllib.loads(FORMATS)
    assert found.resolve({"test-shrink": {"ratio": 0.25}}).formats["small"][0].options == {"bits": 4, "ratio": 0.25}


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ('[[pass]]\nname = "test-shrnk"', "unknown pass: test-shrnk", "test-shrink"),
        ('[[pass]]\nname = "test-shrink"\nbit = 4', "unknown option of test-shrink: bit", "bits"),
        ('[[pass]]\nname = "test-shrink"\nbits = 5', "bits must be", "4 or 8"),
        ('[[pass]]\nname = "test-shrink"\nbits = "4"', "bits must be", "4 or 8"),
        ('[[pass]]\nname = "test-shrink"\nratio = true', "ratio must be float", "number"),
        ('[[pass]]\nname = "test-shrink"\nratio = -1', "ratio must be positive", None),
        ('[[pass]]\nname = "test-shrink"\nexact_zero = 1', "exact_zero must be bool", "boolean"),
        ('[[pass]]\nname = "test-shrink"\noptional = "yes"', "optional of test-shrink", None),
        ('[[pass]]\nname = "test-needy"', "test-needy needs the option size", "size"),
        ('[[passes]]\nname = "test-shrink"', "unknown key in recipe: passes", "pass"),
        ("[[pass]]\nbits = 4", "a [[pass]] table with a name", None),
        ("pass = 3", "a [[pass]] table with a name", None),
        ("pass = [3]", "a [[pass]] table with a name", None),
        ("name = ", "not TOML", None),
        ('[[format]]\nname = "x"', "format x names no pass", "quantize-blocks"),
        ('[[format]]\nname = "x"\npasses = []', "format x names no pass", "quantize-blocks"),
        ('[[format]]\nname = "x"\npasses = [3]', "passes", None),
        (
            '[[format]]\nname = "x"\npass = "test-shrink"\npasses = [{name = "test-shrink"}]',
            "and pass beside",
            "options",
        ),
        ('[[format]]\nname = "x"\npasses = [{name = "test-shrink", bits = 5}]', "bits must be", "4 or 8"),
    ],
)
def test_what_is_wrong_is_said(text: str, message: str, hint: str | None) -> None:
    with pytest.raises(UsageError) as caught:
        recipe.parse_recipe(text).build()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    if hint is not None:
        assert hint in (caught.value.hint or "")


@pytest.mark.parametrize("option", ["bit=4", "bits=5", "ratio=true", "ratio=-1"])
def test_a_wrong_option_names_the_command_that_explains_it(option: str) -> None:
    with pytest.raises(UsageError) as caught:
        recipe.parse_pass(f"test-shrink:{option}").build()
    assert "see onnxpress list passes test-shrink" in (caught.value.hint or "")


def test_an_unknown_recipe_names_the_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipe_files, "packaged", lambda: {"smallest": ""})
    with pytest.raises(UsageError, match="unknown recipe: smalest") as caught:
        recipe.load_recipe("smalest")
    assert "smallest" in (caught.value.hint or "")


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("test-shrink", {}),
        ("test-shrink:bits=4", {"bits": 4}),
        (
            "test-shrink:bits=4,ratio=0.5,exact-zero=true,method=hqq",
            {"bits": 4, "ratio": 0.5, "exact_zero": True, "method": "hqq"},
        ),
        ('test-shrink:names=["a.*", "b"],bits=4', {"names": ["a.*", "b"], "bits": 4}),
    ],
)
def test_a_pass_on_the_command_line(text: str, options: dict[str, object]) -> None:
    assert recipe.parse_pass(text) == recipe.PassSpec("test-shrink", options)


def test_a_pass_on_the_command_line_may_be_optional() -> None:
    assert recipe.parse_pass("test-shrink:optional=true").optional


def test_a_pass_without_an_equals_sign_is_refused() -> None:
    with pytest.raises(UsageError, match="not key=value"):
        recipe.parse_pass("test-shrink:bits")


@given(st.text(max_size=40))
def test_any_text_on_the_command_line_is_a_pass_or_a_usage_error(text: str) -> None:
    try:
        recipe.parse_pass(text)
    except UsageError as error:
        assert str(error)


@pytest.mark.parametrize("name", sorted(registry.PASSES))
def test_every_registered_pass_can_be_loaded(name: str) -> None:
    assert registry.pass_class(name).name == name
    recipe.parameters(registry.pass_class(name))


@pytest.mark.parametrize("name", recipe.recipe_names())
def test_every_recipe_in_the_package_builds_on_every_profile(name: str) -> None:
    from onnxpress.runtime_profiles import profile

    for target in profile.profile_names()[1:]:
        recipe.load_recipe(name).resolve(profile.load_profile(target).auto).build()

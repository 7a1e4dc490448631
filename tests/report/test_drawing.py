"""What was cut where, drawn: numbers by hand, pictures that are well-formed and hold every layer."""

from __future__ import annotations

import json
from xml.etree import ElementTree

import jinja2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxpress.artifact.structure import AttentionSizes, LayerSizes, Structure, StructureChange
from onnxpress.artifact.structure_changes import list_changes
from onnxpress.commands import printing
from onnxpress.report.drawing import CELLS, Bar, draw_structure

SVG = "{http://www.w3.org/2000/svg}"


def layer(origin: int, heads: int = 4, width: int | None = 96, merged: tuple[int, ...] = ()) -> LayerSizes:
    parameters = 1000 * heads + 10 * (width or 0)
    return LayerSizes(origin, (AttentionSizes(heads, 2, 16),), width, parameters, merged)


def structure(*layers: LayerSizes, vocabulary: int = 120, parameters: int = 100_000) -> Structure:
    return Structure({"model.layers": layers}, {"model.layers": 64}, vocabulary, parameters)


CHANGE = StructureChange(
    structure(*map(layer, range(5))),
    structure(layer(0), layer(1, heads=2, merged=(2,)), layer(4, width=48), vocabulary=110, parameters=80_000),
    ("layers differ in feed-forward width: 48, 96",),
)


def test_bars_by_hand() -> None:
    drawing = draw_structure(CHANGE)
    assert drawing.totals == {
        "parameters": Bar(100_000, 80_000),
        "vocabulary": Bar(120, 110),
        "hidden size": Bar(64, 64),
    }
    (stack,) = drawing.stacks
    assert [one.fate for one in stack.layers] == ["", "", "merged into 1", "removed", ""]
    assert stack.layers[1].bars["query heads"] == Bar(4, 2)
    assert stack.layers[3].bars["query heads"] == Bar(4, 0)
    assert stack.layers[4].bars["feed-forward"] == Bar(96, 48)
    assert stack.layers[4].bars["parameters"] == Bar(4960, 4480)
    assert stack.sizes == {"query heads": 4, "kv heads": 2, "feed-forward": 96, "parameters": 4960}
    assert stack.summary("feed-forward") == "96 → 48–96"
    assert stack.summary("kv heads") == "2"


def test_sizes_of_heads_are_drawn_where_they_changed() -> None:
    smaller = LayerSizes(0, (AttentionSizes(4, 2, 8),), 96, 100)
    (stack,) = draw_structure(StructureChange(structure(layer(0)), structure(smaller))).stacks
    assert stack.sizes["head size"] == 16


def test_cross_attention_has_bars_of_its_own() -> None:
    one = LayerSizes(0, (AttentionSizes(4, 4, 16), AttentionSizes(8, 8, 8)), None, 100)
    (stack,) = draw_structure(StructureChange(structure(one), structure(one))).stacks
    assert stack.sizes == {
        "query heads": 4,
        "kv heads": 4,
        "cross query heads": 8,
        "cross kv heads": 8,
        "parameters": 100,
    }


@given(st.integers(0, 10**9), st.integers(0, 10**9), st.integers(0, 10**9))
def test_bars_are_never_longer_than_full(before: int, after: int, other: int) -> None:
    left, cut = Bar(before, after).cells(max(before, after, other))
    assert 0 <= left <= CELLS
    assert 0 <= cut <= CELLS - left
    assert (left > 0) == (after > 0), "what is left, however little, is seen"


def test_a_record_survives_its_json() -> None:
    assert StructureChange.of({"structure": json.loads(json.dumps(CHANGE.to_dict()))}) == CHANGE
    assert StructureChange.of({}) is None


def test_records_without_parameters_of_layers_are_read() -> None:
    """As artifacts were written before."""
    content = json.loads(json.dumps(CHANGE.to_dict()))
    for part in ("before", "after"):
        for one in content[part]["stacks"]["model.layers"]:
            del one["parameters"], one["merged"]
    found = StructureChange.of({"structure": content})
    assert found is not None
    assert found.after.stacks["model.layers"][1] == LayerSizes(1, (AttentionSizes(2, 2, 16),), 96)
    assert draw_structure(found).stacks[0].layers[0].bars["parameters"].cells(0) == (0, 0)


def test_changes_in_words() -> None:
    assert list_changes(CHANGE.before, CHANGE.after) == [
        ("model.layers", "5 layers", "3 layers, without 2–3"),
        ("model.layers.1", "4/2 heads × 16, FFN 96", "2 heads × 16, FFN 96"),
        ("model.layers.4", "4/2 heads × 16, FFN 96", "4/2 heads × 16, FFN 48"),
        ("vocabulary", "120", "110"),
        ("parameters", "100,000", "80,000 (-20.0%)"),
    ]
    assert list_changes(CHANGE.before, CHANGE.before) == []


def test_in_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    printing.print_structure(CHANGE)
    lines = capsys.readouterr().out.splitlines()
    assert any(line.split() == ["parameters", "100,000", "→", "80,000", "(-20.0%)"] for line in lines)
    rows = {line.split()[0]: line.split()[1:] for line in lines if line[:1].isdigit()}
    assert rows["0"] == ["██████████", "4", "██████████", "2", "██████████", "96", "██████████", "4,960"]
    assert rows["1"][:2] == ["█████░░░░░", "2"]
    assert rows["2"] == ["merged", "into", "1", *["░" * 10] * 4]
    assert rows["3"] == ["removed", *["░" * 10] * 4]
    assert rows["4"][4:6] == ["█████░░░░░", "48"]
    assert lines[-1] == "ONNX only  layers differ in feed-forward width: 48, 96"


def test_the_picture_has_every_layer() -> None:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("onnxpress.report"), autoescape=True, undefined=jinja2.StrictUndefined
    )
    drawing = draw_structure(CHANGE)
    tree = ElementTree.fromstring(environment.get_template("structure.svg.j2").render(drawing=drawing))
    width, height = (float(tree.get(side, "0")) for side in ("width", "height"))
    bars = {}
    for group in tree.iter(f"{SVG}g"):
        title, *rects = group
        bars[title.text] = {rect.get("class"): float(rect.get("height", "0")) for rect in rects}
        for rect in rects:
            x, y, w, h = (float(rect.get(key, "0")) for key in ("x", "y", "width", "height"))
            assert x >= 0
            assert x + w <= width
            assert y >= 0
            assert y + h <= height
    assert len(bars) == 5 * 4
    assert bars["model.layers.0, feed-forward: 96"] == {"cut": 40, "left": 40}
    assert bars["model.layers.4, feed-forward: 96 → 48"] == {"cut": 40, "left": 20}
    assert bars["model.layers.2, feed-forward: merged into 1"] == {"merged": 40}
    assert bars["model.layers.3, kv heads: removed"] == {"removed": 40}

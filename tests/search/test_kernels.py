"""Kernel tables: measured once for each kind of group, kept as a file, checked when one is given."""

from __future__ import annotations

import json
from pathlib import Path

import onnx_ir as ir
import pytest

from onnxpress.errors import BadInputError, SourceNotFoundError
from onnxpress.optimizers.recipe import PassSpec
from onnxpress.search import kernels
from onnxpress.search.formats import Format
from onnxpress.search.groups import find_groups
from onnxpress.search.kernels import KernelTable, complete, kernel_of, read_kernel_table, shape_key


def test_kinds_are_measured_once_and_only_where_a_format_fits(model: ir.Model, formats: list[Format]) -> None:
    groups, table, asked = find_groups(model.graph), KernelTable("here", "1", 1), []
    assert complete(table, groups, formats, {}, 1, lambda done, total: asked.append(total))
    # three kinds of group (gate and up, down, the table), each in float32 and in four formats
    assert asked == [15] * 15
    assert shape_key(groups[-1]) == "64x200@200x64"
    assert set(table.microseconds["float32"]) == {"64x96+64x96", "96x64", "64x200@200x64"}
    assert table.get(groups[1], formats[0], 1) is None, "a table's format on a product"
    for group, format in (
        (groups[1], formats[1]),
        (groups[0], formats[3]),
        (groups[-1], formats[0]),
        (groups[1], None),
    ):
        times = [table.get(group, format, tokens) for tokens in kernels.TOKENS]
        assert all(time is not None and 0 < time < 1e6 for time in times)
    assert not complete(table, groups, formats, {}, 1), "nothing is left to measure"


def test_fitting_does_not_change_a_kernel() -> None:
    plain, fitted, finer = (
        Format("x", (PassSpec("quantize-blocks", options),))
        for options in ({"bits": 4}, {"bits": 4, "method": "gptq"}, {"bits": 4, "block_size": 16})
    )
    assert kernel_of(plain) == kernel_of(fitted) == "quantize-blocks bits=4"
    assert kernel_of(finer) != kernel_of(plain)
    assert kernel_of(None) == "float32"


def test_a_table_survives_its_file(tmp_path: Path) -> None:
    table = KernelTable("a phone", "1.31.1", 4, {"float32": {"64x96": {"1": 2.5, "128": 100.0}}})
    path = tmp_path / "phone.json"
    path.write_text(table.to_json())
    assert read_kernel_table(path) == table
    assert table.rows() == [{"kernel": "float32", "shape": "64x96", "1 tokens, µs": 2.5, "128 tokens, µs": 100.0}]


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        '{"machine": "x", "onnxruntime": "1", "threads": 1, "surplus": 1}',
        json.dumps({"machine": "x", "onnxruntime": "1", "threads": 1, "microseconds": {"float32": {"1x1": {"1": -1}}}}),
        json.dumps(
            {"machine": "x", "onnxruntime": "1", "threads": 1, "microseconds": {"float32": {"1x1": {"1": "a"}}}}
        ),
        json.dumps({"machine": "x", "onnxruntime": "1", "threads": 1, "microseconds": {"float32": [1]}}),
    ],
)
def test_a_broken_table_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "broken.json"
    path.write_text(content)
    with pytest.raises(BadInputError, match=r"broken\.json"):
        read_kernel_table(path)


def test_a_missing_table_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceNotFoundError, match="no such kernel table"):
        read_kernel_table(tmp_path / "none.json")

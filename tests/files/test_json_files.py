from __future__ import annotations

from pathlib import Path

import pytest

from onnxpress.errors import CorruptFileError
from onnxpress.files.json_files import read_optional_json


def test_an_object_nothing_or_an_error(tmp_path: Path) -> None:
    path = tmp_path / "some.json"
    assert read_optional_json(path) == {}
    path.write_text('{"a": 1}')
    assert read_optional_json(path) == {"a": 1}
    for text, reason in (("[1]", "is not a JSON object"), ("{", "cannot read")):
        path.write_text(text)
        with pytest.raises(CorruptFileError, match=reason):
            read_optional_json(path)

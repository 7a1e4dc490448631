from __future__ import annotations

from pathlib import Path

import pytest

from onnxpress.building.outputs import artifact_name, default_output, output_folders
from onnxpress.errors import UsageError


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("smollm2-135m-instruct", "smollm2-135m-instruct"),
        ("hf:owner/name@main", "name"),
        ("folder/My model.gguf", "My-model"),
        ("models/bert.onnx", "bert"),
        ("folder/", "folder"),
        ("..", "model"),
    ],
)
def test_an_artifact_is_called_after_its_model(model: str, name: str) -> None:
    assert artifact_name(model) == name
    assert default_output(model) == Path(f"{name}-onnx")


def test_the_checkpoint_has_a_folder_of_its_own(tmp_path: Path) -> None:
    assert output_folders(tmp_path / "a", tmp_path / "b") == (tmp_path / "a", tmp_path / "b")
    assert output_folders(str(tmp_path / "a")) == (tmp_path / "a", None)
    with pytest.raises(UsageError, match="same folder"):
        output_folders(tmp_path / "a", tmp_path / "x" / ".." / "a")

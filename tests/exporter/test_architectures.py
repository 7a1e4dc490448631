"""Every promised architecture: exported tiny, run in onnxruntime, compared with torch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from onnxpress.errors import UsageError
from onnxpress.exporter import architectures

PROMISED = {
    *(
        "llama",
        "mistral",
        "qwen2",
        "qwen3",
        "gemma2",
        "gemma3_text",
        "phi3",
        "gpt2",
        "gpt_neox",
        "opt",
        "bloom",
        "falcon",
    ),
    *("olmo2", "granite", "stablelm", "starcoder2", "smollm3", "mixtral", "qwen2_moe"),
    *(
        "bert",
        "roberta",
        "xlm-roberta",
        "distilbert",
        "mpnet",
        "electra",
        "albert",
        "deberta-v2",
        "modernbert",
        "nomic_bert",
    ),
    *("t5", "bart", "marian", "whisper", "vit", "clip", "wav2vec2"),
}
UNFUSED = {"bloom", "falcon", "mpnet", "deberta-v2"}
"""They compute attention by themselves; everything else of them is stamped."""


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> object:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_the_list_holds_what_is_promised() -> None:
    assert set(architectures.names()) >= PROMISED


@pytest.mark.parametrize("architecture", architectures.names())
def test_parity(architecture: str, tmp_path: Path) -> None:
    row = architectures.try_architecture(architecture, tmp_path)
    assert row.method == ("stamped" if architecture in UNFUSED else "fused"), row.not_fused
    assert row.differences
    assert max(row.differences.values()) <= architectures.TOLERANCE, row.differences


def test_unknown_architecture_is_refused() -> None:
    with pytest.raises(UsageError, match="no tiny model"):
        list(architectures.table(["not-a-model"]))

"""Every promised architecture: exported tiny, run in onnxruntime, compared with torch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from onnxpress.artifact.artifact import Source
from onnxpress.errors import UsageError
from onnxpress.exporter import architectures
from onnxpress.exporter.export import export
from onnxpress.exporter.fusing import recognise
from onnxpress.exporter.sources.checkpoint import load_folder

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


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> object:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_the_list_holds_what_is_promised() -> None:
    assert set(architectures.architecture_names()) >= PROMISED


@pytest.mark.parametrize("architecture", architectures.architecture_names())
def test_parity(architecture: str, tmp_path: Path) -> None:
    row = architectures.try_architecture(architecture, tmp_path)
    assert row.method == "fused", row.not_fused
    assert row.differences
    assert max(row.differences.values()) <= architectures.TOLERANCE, row.differences


FALCONS = {
    "alibi": {
        "new_decoder_architecture": False,
        "multi_query": False,
        "alibi": True,
        "parallel_attn": False,
        "bias": True,
        "num_kv_heads": 4,
    },
    "one key-value head": {"new_decoder_architecture": False, "multi_query": True},
    "a key-value head each": {"new_decoder_architecture": False, "multi_query": False, "num_kv_heads": 4},
    "one norm": {"num_ln_in_parallel_attn": 1},
    "alibi and groups": {"alibi": True},
}
"""falcon-rw-1b; falcon-7b; a plain one; falcon-11b; the rest. Eager attention is no reference for ALiBi."""


@pytest.mark.parametrize("which", FALCONS)
def test_every_falcon_is_fused(which: str, tmp_path: Path) -> None:
    row = architectures.try_architecture("falcon", tmp_path, **FALCONS[which])
    assert (row.method, row.not_fused, row.operators) == ("fused", {}, ("GroupQueryAttention",))
    assert max(row.differences.values()) <= 1e-4, row.differences


def test_falcon_caches_no_more_heads_than_it_has(tmp_path: Path) -> None:
    architectures.tiny_model("falcon", tmp_path)
    graph = export(load_folder(tmp_path, Source("falcon", "huggingface-folder")), remember=False).graphs["model"].graph
    cached = next(value for value in graph.inputs if value.name == "past_key_values.0.key")
    assert cached.shape is not None
    assert cached.shape[1] == 2


def test_alibi_slopes_of_other_than_a_power_of_two_heads(tmp_path: Path) -> None:
    row = architectures.try_architecture("bloom", tmp_path, n_head=6, hidden_size=96)
    assert row.method == "fused"
    assert max(row.differences.values()) <= 1e-4, row.differences


@pytest.mark.parametrize(
    "changes",
    [
        {"share_att_key": False},
        {"pos_att_type": ["c2p"], "conv_kernel_size": 3},
        {"relative_attention": False, "pos_att_type": []},
    ],
)
def test_terms_of_disentangled_attention(changes: dict[str, object], tmp_path: Path) -> None:
    row = architectures.try_architecture("deberta-v2", tmp_path, **changes)
    assert row.method == "fused", row.not_fused
    assert max(row.differences.values()) <= 1e-4, row.differences


def test_a_linear_layer_of_its_own_must_compute_the_same() -> None:
    class Same(torch.nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return input @ self.weight.T + self.bias

    class Scaled(torch.nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return super().forward(input) * 1.01

    assert recognise.is_linear(Same(4, 4))
    assert not recognise.is_linear(Scaled(4, 4))


def test_unknown_architecture_is_refused() -> None:
    with pytest.raises(UsageError, match="no tiny model"):
        list(architectures.table(["not-a-model"]))

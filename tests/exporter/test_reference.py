from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from onnxpress.errors import BadInputError  # noqa: E402
from onnxpress.evaluation.evaluate import evaluate  # noqa: E402
from onnxpress.exporter.reference import TorchReference, open_in_torch  # noqa: E402

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 60}


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES, num_key_value_heads=2, max_position_embeddings=64)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


def test_a_decoder_against_itself_in_all_modes(llama: Path) -> None:
    reference = open_in_torch(llama)
    assert (reference.kind, reference.model.vocabulary) == ("decoder", 60)
    found = evaluate(reference, open_in_torch(llama), windows=2, window=24, decode_steps=4)
    assert found.kl is not None
    assert found.kl < 1e-9
    assert found.modes["padded"]["max_difference"] < 1e-4


def test_cached_steps_equal_the_prompt(llama: Path) -> None:
    reference = TorchReference(llama)
    ids = np.arange(10)[None]
    whole = reference.prefill(ids)
    reference.prefill(ids[:, :6])
    np.testing.assert_allclose(reference.decode(ids[:, 6:]), whole[:, 6:], atol=1e-5)


def test_an_encoder(tmp_path: Path) -> None:
    torch.manual_seed(0)
    transformers.BertModel(transformers.BertConfig(**SIZES)).save_pretrained(tmp_path)
    opened = open_in_torch(tmp_path)
    assert opened.kind == "encoder"
    reference = opened.model
    ids, mask = np.array([[5, 6, 7, 0]]), np.array([[1, 1, 1, 0]])
    padded = reference.encode(ids, mask)["last_hidden_state"][:, :3]
    np.testing.assert_allclose(padded, reference.encode(ids[:, :3])["last_hidden_state"], atol=1e-5)


def test_an_encoder_decoder(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=60, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    found = evaluate(open_in_torch(tmp_path), open_in_torch(tmp_path))
    assert found.kind == "encoder-decoder"
    assert found.kl is not None
    assert found.kl < 1e-9
    assert found.modes.keys() == {"prefill", "decode", "padded"}


def test_a_folder_without_weights(llama: Path) -> None:
    (llama / "model.safetensors").unlink()
    with pytest.raises(BadInputError, match="no safetensors"):
        TorchReference(llama)
    (llama / "config.json").unlink()
    with pytest.raises(BadInputError, match=r"no config\.json"):
        TorchReference(llama)

"""Binding against transformers' own loader: the same value for every key, on tiny random checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as t
from safetensors.torch import load_file, save_file

from onnxpress.errors import CorruptFileError, UnsupportedModelError
from onnxpress.exporter.sources.parameters import Parameters, match_parameters, same_values
from onnxpress.exporter.sources.safetensors import read_safetensors
from onnxpress.exporter.sources.torch_arrays import to_torch
from onnxpress.graph.tensors import ArrayTensor, WeightTensor, concrete_shape

DECODER = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
EXPERTS = {**DECODER, "num_local_experts": 12, "num_experts_per_tok": 2}
BERT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def llama(**more: Any) -> t.PreTrainedModel:
    return t.LlamaForCausalLM(t.LlamaConfig(**DECODER, **more))


def qwen2_moe() -> t.PreTrainedModel:
    sizes = {"num_experts": 12, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 24}
    return t.Qwen2MoeForCausalLM(t.Qwen2MoeConfig(**DECODER, **sizes))


def whisper() -> t.PreTrainedModel:
    sizes = {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
    more = {"d_model": 32, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "vocab_size": 64, "pad_token_id": 0}
    return t.WhisperForConditionalGeneration(t.WhisperConfig(**sizes, **more, max_source_positions=20))


def marian() -> t.PreTrainedModel:
    sizes = {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
    more = {"d_model": 32, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "vocab_size": 64, "pad_token_id": 0}
    return t.MarianMTModel(t.MarianConfig(**sizes, **more, decoder_start_token_id=0))


def wav2vec2() -> t.PreTrainedModel:
    convolutions = {"conv_dim": [16, 16], "conv_stride": [5, 2], "conv_kernel": [10, 3]}
    sizes = {**BERT, **convolutions, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4}
    return t.Wav2Vec2Model(t.Wav2Vec2Config(**sizes))


MODELS: dict[str, Callable[[], t.PreTrainedModel]] = {
    "llama": llama,
    "llama-tied": lambda: llama(tie_word_embeddings=True),
    "gpt2": lambda: t.GPT2LMHeadModel(t.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64, n_positions=16)),
    "bert": lambda: t.BertModel(t.BertConfig(**BERT)),
    "bert-masked-lm": lambda: t.BertForMaskedLM(t.BertConfig(**BERT)),
    "mixtral": lambda: t.MixtralForCausalLM(t.MixtralConfig(**EXPERTS)),
    "qwen2-moe": qwen2_moe,
    "t5": lambda: t.T5ForConditionalGeneration(
        t.T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    ),
    "whisper": whisper,
    "marian": marian,
    "gemma3-text": lambda: t.Gemma3ForCausalLM(t.Gemma3TextConfig(**DECODER, head_dim=8)),
    "modernbert": lambda: t.ModernBertForMaskedLM(t.ModernBertConfig(**BERT, pad_token_id=0)),
    "wav2vec2": wav2vec2,
}

NO_GROUPS = {key: value for key, value in DECODER.items() if key != "num_key_value_heads"}
PADDED = {**BERT, "pad_token_id": 0}
TOWER = {key: value for key, value in BERT.items() if key != "vocab_size"}
PIXELS = {**TOWER, "image_size": 32, "patch_size": 16}
MORE: dict[type[t.PreTrainedModel], dict[str, Any]] = {
    t.Gemma2ForCausalLM: {**DECODER, "head_dim": 8},
    t.Phi3ForCausalLM: {**DECODER, "pad_token_id": 0, "eos_token_id": 1},
    t.GPTNeoXForCausalLM: NO_GROUPS,
    t.OPTForCausalLM: {**BERT, "ffn_dim": 48, "word_embed_proj_dim": 32},
    t.BloomForCausalLM: {"vocab_size": 64, "hidden_size": 32, "n_layer": 2, "n_head": 4},
    t.FalconForCausalLM: BERT,
    t.StableLmForCausalLM: DECODER,
    t.RobertaForMaskedLM: PADDED,
    t.DistilBertModel: {"vocab_size": 64, "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4},
    t.MPNetModel: PADDED,
    t.ElectraModel: {**PADDED, "embedding_size": 16},
    t.AlbertModel: {**PADDED, "embedding_size": 16},
    t.DebertaV2ForMaskedLM: PADDED,
    t.NomicBertModel: PADDED,
    t.ViTModel: PIXELS,
    t.CLIPModel: {"text_config": {**BERT, "eos_token_id": 2}, "vision_config": PIXELS, "projection_dim": 16},
}
"""Architectures with names, ties or buffers of their own."""


def randomised(model: t.PreTrainedModel) -> t.PreTrainedModel:
    """Norms start as ones and biases as zeros, which would hide a mix-up."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.5)
    return model


def save(model: t.PreTrainedModel, folder: Path, **options: Any) -> dict[str, WeightTensor]:
    model.save_pretrained(folder, **options)
    return read_folder(folder)


def read_folder(folder: Path) -> dict[str, WeightTensor]:
    return {
        name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in read_safetensors(file).items()
    }


def on_meta(model_class: type[t.PreTrainedModel], config: t.PreTrainedConfig, **more: Any) -> t.PreTrainedModel:
    with torch.device("meta"):
        return model_class(config, **more)


def assert_same(binding: Parameters, loaded: t.PreTrainedModel) -> None:
    expected = loaded.state_dict()
    assert set(binding) == set(expected)
    for name, value in expected.items():
        source = binding[name]
        assert source.shape == tuple(value.shape), name
        got = source.numpy()
        assert got.shape == source.shape
        assert got.dtype == source.dtype.numpy()
        torch.testing.assert_close(to_torch(got).to(value.dtype), value, rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("name", MODELS)
def test_every_key_equals_from_pretrained(name: str, tmp_path: Path) -> None:
    model = randomised(MODELS[name]())
    tensors = save(model, tmp_path, max_shard_size="40KB")
    binding = match_parameters(on_meta(type(model), model.config), tensors)
    assert_same(binding, type(model).from_pretrained(tmp_path))
    assert binding.unused == []


@pytest.mark.parametrize("model_class", MORE, ids=lambda model_class: model_class.__name__)
def test_more_architectures(model_class: type[t.PreTrainedModel], tmp_path: Path) -> None:
    model = randomised(model_class(model_class.config_class(**MORE[model_class])))
    binding = match_parameters(on_meta(model_class, model.config), save(model, tmp_path))
    assert_same(binding, model_class.from_pretrained(tmp_path))
    assert binding.unused == []


@pytest.mark.parametrize("name", ["llama-tied", "mixtral", "bert"])
def test_bfloat16_stays_bfloat16(name: str, tmp_path: Path) -> None:
    model = randomised(MODELS[name]()).to(torch.bfloat16)
    binding = match_parameters(on_meta(type(model), model.config), save(model, tmp_path))
    assert_same(binding, type(model).from_pretrained(tmp_path, dtype=torch.bfloat16))


def test_base_model_reads_a_checkpoint_with_a_head(tmp_path: Path) -> None:
    masked = randomised(t.BertForMaskedLM(t.BertConfig(**BERT)))
    tensors = save(masked, tmp_path)
    assert any(name.startswith("bert.") for name in tensors)
    binding = match_parameters(on_meta(t.BertModel, masked.config, add_pooling_layer=False), tensors)
    assert_same(binding, t.BertModel.from_pretrained(tmp_path, add_pooling_layer=False))
    assert binding.unused
    assert all(name.startswith("cls.") for name in binding.unused)


def test_model_with_a_head_reads_prefixless_names(tmp_path: Path) -> None:
    """gpt2 on the hub is stored without `transformer.`, and with buffers that no longer exist."""
    model = randomised(MODELS["gpt2"]())
    model.transformer.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    assert not any(name.startswith("transformer.") for name in weights)
    save_file({**weights, "h.0.attn.bias": torch.ones(1, 1, 16, 16)}, tmp_path / "model.safetensors", {"format": "pt"})
    binding = match_parameters(on_meta(t.GPT2LMHeadModel, model.config), read_folder(tmp_path))
    assert_same(binding, t.GPT2LMHeadModel.from_pretrained(tmp_path))


def test_legacy_layer_norm_names(tmp_path: Path) -> None:
    model = randomised(MODELS["bert"]())
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    old = {
        key.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): value
        for key, value in weights.items()
    }
    assert old.keys() != weights.keys()
    save_file(old, tmp_path / "model.safetensors", {"format": "pt"})
    assert_same(match_parameters(on_meta(t.BertModel, model.config), read_folder(tmp_path)), model)


def test_tied_names_share_one_source(tmp_path: Path) -> None:
    model = randomised(llama(tie_word_embeddings=True))
    tensors = save(model, tmp_path)
    assert "lm_head.weight" not in tensors
    binding = match_parameters(on_meta(t.LlamaForCausalLM, model.config), tensors)
    assert binding["lm_head.weight"] is binding["model.embed_tokens.weight"]


@pytest.mark.parametrize("equal", [True, False])
def test_declared_tie_yields_to_different_values(equal: bool, tmp_path: Path) -> None:
    model = randomised(llama(tie_word_embeddings=True))
    tensors = save(model, tmp_path)
    head = model.lm_head.weight.detach().numpy() + (0 if equal else 1)
    binding = match_parameters(
        on_meta(t.LlamaForCausalLM, model.config), {**tensors, "lm_head.weight": ArrayTensor("head", head)}
    )
    assert (binding["lm_head.weight"] is binding["model.embed_tokens.weight"]) == equal
    np.testing.assert_array_equal(binding["lm_head.weight"].numpy(), head)


def unreadable(name: str, tensor: WeightTensor) -> WeightTensor:
    return WeightTensor(lambda: pytest.fail(f"{name} was read"), tensor.dtype, concrete_shape(tensor), name=name)


def test_binding_reads_nothing(tmp_path: Path) -> None:
    for name in ("llama-tied", "mixtral", "t5"):
        model = MODELS[name]()
        tensors = save(model, tmp_path / name)
        blind = {key: unreadable(key, tensor) for key, tensor in tensors.items()}
        assert len(match_parameters(on_meta(type(model), model.config), blind)) == len(model.state_dict())


def test_missing_parameter_is_named(tmp_path: Path) -> None:
    model = llama()
    tensors = save(model, tmp_path)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    meta = on_meta(t.LlamaForCausalLM, model.config)
    with pytest.raises(CorruptFileError, match=r"lacks 1 of the \d+.*model\.layers\.1\.mlp\.up_proj\.weight"):
        match_parameters(meta, tensors)
    assert "model.layers.1.mlp.up_proj.weight" not in match_parameters(meta, tensors, optional=[r"up_proj"])


def test_random_head_is_not_invented(tmp_path: Path) -> None:
    """transformers would initialise the missing head at random, with a warning."""
    model = MODELS["bert"]()
    tensors = save(model, tmp_path)
    with pytest.raises(CorruptFileError, match=r"lacks .* of BertForMaskedLM"):
        match_parameters(on_meta(t.BertForMaskedLM, model.config), tensors)


def test_wrong_shape_names_found_and_required(tmp_path: Path) -> None:
    tensors = save(llama(), tmp_path)
    config = t.LlamaConfig(**{**DECODER, "intermediate_size": 50})
    with pytest.raises(CorruptFileError, match=r"mlp\.\w+_proj\.weight has shape \[\d+, \d+\].*requires \[\d+, \d+\]"):
        match_parameters(on_meta(t.LlamaForCausalLM, config), tensors)


def test_lost_expert_is_a_wrong_shape(tmp_path: Path) -> None:
    model = MODELS["mixtral"]()
    tensors = save(model, tmp_path)
    del tensors[next(name for name in tensors if ".experts.3.w2" in name)]
    with pytest.raises(CorruptFileError, match=r"experts\.down_proj has shape \[11, 32, 48\].*\[12, 32, 48\]"):
        match_parameters(on_meta(t.MixtralForCausalLM, model.config), tensors)


def test_experts_of_different_shapes(tmp_path: Path) -> None:
    model = MODELS["mixtral"]()
    tensors = save(model, tmp_path)
    name = next(name for name in tensors if ".experts.3.w2" in name)
    tensors[name] = ArrayTensor(name, np.zeros((32, 47), np.float32))
    with pytest.raises(CorruptFileError, match=r"experts\.down_proj cannot be made from"):
        match_parameters(on_meta(t.MixtralForCausalLM, model.config), tensors)


def test_integer_weights_are_refused(tmp_path: Path) -> None:
    model = llama()
    tensors = save(model, tmp_path)
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = ArrayTensor(name, np.zeros(tensors[name].shape, np.int8))
    with pytest.raises(UnsupportedModelError, match=r"up_proj\.weight is stored as INT8"):
        match_parameters(on_meta(t.LlamaForCausalLM, model.config), tensors)


def test_unused_tensors_are_reported(tmp_path: Path) -> None:
    model = llama()
    extra = {"model.layers.7.mlp.up_proj.weight": ArrayTensor("x", np.zeros(3, np.float32))}
    obsolete = {"model.layers.0.self_attn.rotary_emb.inv_freq": ArrayTensor("x", np.zeros(3, np.float32))}
    binding = match_parameters(
        on_meta(t.LlamaForCausalLM, model.config), {**save(model, tmp_path), **extra, **obsolete}
    )
    assert binding.unused == ["model.layers.7.mlp.up_proj.weight"]


def test_same_values_compares_bits() -> None:
    ones = ArrayTensor("a", np.ones(10, np.float32))
    assert same_values(ones, ArrayTensor("b", np.ones(10, np.float32)), chunk=3)
    assert not same_values(ones, ArrayTensor("b", np.ones(10, np.float16)), chunk=3)
    assert not same_values(ones, ArrayTensor("b", np.ones((2, 5), np.float32)), chunk=3)
    other = np.ones(10, np.float32)
    other[9] = 2
    assert not same_values(ones, ArrayTensor("b", other), chunk=3)

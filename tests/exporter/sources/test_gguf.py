"""GGUF files: the same configuration, tokenizer and values as transformers' own loader, without loading the model."""

from __future__ import annotations

import json
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers as t
from gguf import GGMLQuantizationType as Type

from onnxpress.errors import BadInputError, CorruptFileError, UnsupportedModelError
from onnxpress.exporter import parity
from onnxpress.exporter.export import export
from onnxpress.exporter.sources.gguf import GgufTensor
from onnxpress.exporter.sources.gguf_header import read_header
from onnxpress.exporter.sources.parameters import match_parameters
from onnxpress.exporter.sources.source import Checkpoint, resolve_source

from .tiny_gguf import TOKENS, decoder_metadata, decoder_shapes, random_tensors, write_gguf


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ONNXPRESS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def checkpoint(path: Path, **options: Any) -> Checkpoint:
    found = resolve_source(str(path), **options)
    assert isinstance(found, Checkpoint)
    return found


def on_meta(found: Checkpoint) -> t.PreTrainedModel:
    with torch.device("meta"):
        return t.AutoModelForCausalLM.from_config(t.AutoConfig.from_pretrained(found.folder))


def llama(path: Path, **more: Any) -> Path:
    types = dict.fromkeys(("token_embd.weight", "blk.0.attn_q.weight", "blk.1.attn_k.weight"), Type.Q8_0)
    types |= dict.fromkeys(("blk.0.attn_k.weight", "blk.0.ffn_up.weight"), Type.Q4_1)
    types |= {"blk.0.attn_v.weight": Type.F16, "blk.1.attn_v.weight": Type.BF16}
    return write_gguf(path, "llama", decoder_metadata(**more), random_tensors(decoder_shapes()), types)


def qwen2(path: Path) -> Path:
    shapes = decoder_shapes()
    for i in range(2):
        shapes |= {f"blk.{i}.attn_q.bias": (64,), f"blk.{i}.attn_k.bias": (32,), f"blk.{i}.attn_v.bias": (32,)}
    return write_gguf(path, "qwen2", decoder_metadata(), random_tensors({**shapes, "output.weight": (len(TOKENS), 64)}))


def qwen3(path: Path) -> Path:
    shapes = decoder_shapes(head_dim=128)
    for i in range(2):
        shapes |= {f"blk.{i}.attn_q_norm.weight": (128,), f"blk.{i}.attn_k_norm.weight": (128,)}
    metadata = decoder_metadata(**{"attention.key_length": 128, "attention.value_length": 128})
    return write_gguf(path, "qwen3", metadata, random_tensors(shapes))


def gemma3(path: Path, **more: Any) -> Path:
    shapes = decoder_shapes(head_dim=32)
    for i in range(2):
        shapes |= {f"blk.{i}.attn_q_norm.weight": (32,), f"blk.{i}.attn_k_norm.weight": (32,)}
        shapes |= {f"blk.{i}.post_attention_norm.weight": (64,), f"blk.{i}.post_ffw_norm.weight": (64,)}
    keys = {"attention.key_length": 32, "attention.value_length": 32, "attention.sliding_window": 16}
    metadata = decoder_metadata(**{**keys, "rope.freq_base": 1000000.0, **more})
    return write_gguf(path, "gemma3", metadata, random_tensors(shapes), {"blk.0.attn_q.weight": Type.Q8_0})


def phi3(path: Path) -> Path:
    shapes = {
        k: v
        for k, v in decoder_shapes(kv_heads=4).items()
        if not any(x in k for x in ("attn_q", "attn_k", "attn_v", "gate", "ffn_up"))
    }
    for i in range(2):
        shapes |= {f"blk.{i}.attn_qkv.weight": (192, 64), f"blk.{i}.ffn_up.weight": (192, 64)}
    metadata = decoder_metadata(**{"attention.head_count_kv": 4})
    return write_gguf(path, "phi3", metadata, random_tensors({**shapes, "output.weight": (len(TOKENS), 64)}))


def scaled_phi3(path: Path) -> Path:
    """Factors of their own for each of 8 frequencies, as Phi 3's long models have."""
    tensors = random_tensors(
        {"output.weight": (len(TOKENS), 64)}
        | {
            name: shape
            for name, shape in decoder_shapes(kv_heads=4).items()
            if not any(part in name for part in ("attn_q", "attn_k", "attn_v", "gate", "ffn_up"))
        }
        | {f"blk.{i}.{name}.weight": (192, 64) for i in range(2) for name in ("attn_qkv", "ffn_up")}
    )
    tensors |= {"rope_factors_short.weight": SHORT, "rope_factors_long.weight": 3 * SHORT}
    scaling = {"rope.scaling.original_context_length": 32, "attention.head_count_kv": 4}
    return write_gguf(path, "phi3", decoder_metadata(**scaling), tensors)


SHORT = np.linspace(1.0, 1.4, 8, dtype=np.float32)


def qwen2_moe(path: Path) -> Path:
    shapes = {name: shape for name, shape in decoder_shapes().items() if not name.split(".")[-2].startswith("ffn_g")}
    shapes = {name: shape for name, shape in shapes.items() if "ffn_up" not in name and "ffn_down" not in name}
    for i in range(2):
        shapes |= {f"blk.{i}.attn_q.bias": (64,), f"blk.{i}.attn_k.bias": (32,), f"blk.{i}.attn_v.bias": (32,)}
        shapes |= {f"blk.{i}.ffn_{kind}_exps.weight": (4, 96, 64) for kind in ("gate", "up")}
        shapes |= {f"blk.{i}.ffn_down_exps.weight": (4, 64, 96), f"blk.{i}.ffn_gate_inp.weight": (4, 64)}
        shapes |= {f"blk.{i}.ffn_{kind}_shexp.weight": (80, 64) for kind in ("gate", "up")}
        shapes |= {f"blk.{i}.ffn_down_shexp.weight": (64, 80), f"blk.{i}.ffn_gate_inp_shexp.weight": (64,)}
    sizes = {"expert_feed_forward_length": 96, "expert_shared_feed_forward_length": 80}
    metadata = decoder_metadata(expert_count=4, expert_used_count=2, **sizes)
    return write_gguf(path, "qwen2moe", metadata, random_tensors(shapes))


MODELS = {"llama": llama, "qwen2": qwen2, "qwen3": qwen3, "gemma3": gemma3, "phi3": phi3}


@pytest.mark.parametrize("name", MODELS)
def test_values_and_configuration_equal_transformers(name: str, tmp_path: Path) -> None:
    path = MODELS[name](tmp_path / "tiny.gguf")
    found = checkpoint(path)
    expected = t.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name)
    model = on_meta(found)
    assert type(model) is type(expected)
    binding = match_parameters(model, found.tensors)
    assert binding.unused == []
    for key, value in expected.state_dict().items():
        np.testing.assert_array_equal(binding[key].numpy(), value.numpy(), err_msg=key)
    assert model.config.rms_norm_eps == pytest.approx(expected.config.rms_norm_eps)
    for key in ("hidden_size", "num_hidden_layers", "num_key_value_heads", "intermediate_size"):
        assert getattr(model.config, key) == getattr(expected.config, key)
    assert (found.task, found.source.kind, found.source.licence) == ("text-generation", "gguf", "mit")


def test_tokenizer_and_generation_config_are_written(tmp_path: Path) -> None:
    found = checkpoint(llama(tmp_path / "tiny.gguf"))
    assert {"tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"} <= set(
        found.files
    )
    ours = t.AutoTokenizer.from_pretrained(found.folder)
    theirs = t.AutoTokenizer.from_pretrained(tmp_path, gguf_file="tiny.gguf")
    assert ours("hello  he").input_ids == theirs("hello  he").input_ids
    assert ours.decode(ours("hello").input_ids) == "hello"
    assert ours.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False) == "hello</s>"
    assert json.loads(found.files["generation_config.json"].read_text())["eos_token_id"] == 2
    assert str(tmp_path) not in found.files["tokenizer_config.json"].read_text()
    assert found.config["rms_norm_eps"] == 1e-5


def test_translation_is_cached_until_the_file_changes(tmp_path: Path, cache: Path) -> None:
    path = llama(tmp_path / "tiny.gguf")
    said: list[str] = []
    first = checkpoint(path, progress=said.append)
    assert checkpoint(path, progress=said.append).folder == first.folder
    assert len(said) == 1
    llama(path, context_length=256)
    changed = checkpoint(path, progress=said.append)
    assert changed.folder != first.folder
    assert changed.config["max_position_embeddings"] == 256


@pytest.mark.parametrize("name", ["blk.0.attn_q.weight", "blk.0.attn_k.weight", "blk.0.ffn_up.weight"])
def test_blocks_are_those_of_the_parameter(name: str, tmp_path: Path) -> None:
    """Rows are reordered like the values, so that blocks can be used without quantizing again."""
    tensors = checkpoint(llama(tmp_path / "tiny.gguf")).tensors
    kinds = {"blk.0.attn_q.weight": "self_attn.q_proj", "blk.0.attn_k.weight": "self_attn.k_proj"}
    tensor = tensors[f"model.layers.0.{kinds.get(name, 'mlp.up_proj')}.weight"]
    assert isinstance(tensor, GgufTensor)
    blocks = tensor.blocks()
    assert blocks is not None
    assert blocks.shape == tensor.shape
    assert blocks.data.dtype == np.uint8
    np.testing.assert_array_equal(gguf.dequantize(blocks.data, Type[blocks.type]), tensor.numpy())


def test_no_blocks_for_floats_and_changed_values(tmp_path: Path) -> None:
    found = checkpoint(llama(tmp_path / "tiny.gguf"))
    for name in ("model.layers.0.self_attn.v_proj.weight", "model.norm.weight"):
        tensor = found.tensors[name]
        assert isinstance(tensor, GgufTensor)
        assert tensor.blocks() is None


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_rows_are_those_of_the_whole(name: str, tmp_path: Path) -> None:
    tensors = checkpoint(MODELS[name](tmp_path / "tiny.gguf")).tensors
    for tensor in tensors.values():
        whole = tensor.numpy()
        for start, stop in ((0, len(whole)), (3, 17), (5, 5)):
            np.testing.assert_array_equal(tensor.rows(start, stop), whole[start:stop], err_msg=tensor.name)
        assert tensor.reads_rows == (len(tensor.shape) > 1), tensor.name


def test_experts_are_read_one_parameter_at_a_time(tmp_path: Path) -> None:
    """Gate and up projections of all experts are two tensors in the file and one parameter."""
    path = qwen2_moe(tmp_path / "tiny.gguf")
    raw = {tensor.name: tensor.data for tensor in gguf.GGUFReader(path).tensors}
    tensors = checkpoint(path).tensors
    merged = tensors["model.layers.1.mlp.experts.gate_up_proj"]
    gate, up = raw["blk.1.ffn_gate_exps.weight"], raw["blk.1.ffn_up_exps.weight"]
    np.testing.assert_array_equal(merged.numpy(), np.concatenate([gate, up], axis=1))
    down = tensors["model.layers.1.mlp.experts.down_proj"]
    np.testing.assert_array_equal(down.numpy(), raw["blk.1.ffn_down_exps.weight"])
    assert tensors["model.layers.0.mlp.shared_expert_gate.weight"].shape == (1, 64)
    found = checkpoint(path)
    match_parameters(on_meta(found), found.tensors)


def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """Reading every weight of a deeper model peaks no higher than of a shallow one."""
    peaks = []
    for layers in (2, 16):
        path = tmp_path / f"{layers}.gguf"
        shapes = decoder_shapes(layers=layers, inner=4096)
        write_gguf(
            path, "llama", decoder_metadata(block_count=layers, feed_forward_length=4096), random_tensors(shapes)
        )
        found = checkpoint(path)
        tracemalloc.start()
        for tensor in found.tensors.values():
            tensor.numpy()
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] * 1.2 + 1e5


# What transformers leaves out


def test_llama3_rotary_scaling_is_recognised(tmp_path: Path) -> None:
    config = t.LlamaConfig(
        hidden_size=64,
        num_attention_heads=4,
        head_dim=16,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    )
    plain = 500000.0 ** -(np.arange(0, 16, 2) / 16)
    scaled = t.models.llama.modeling_llama.LlamaRotaryEmbedding(config).inv_freq.numpy()
    tensors = {**random_tensors(decoder_shapes()), "rope_freqs.weight": (plain / scaled).astype(np.float32)}
    metadata = decoder_metadata(**{"rope.freq_base": 500000.0})
    found = checkpoint(write_gguf(tmp_path / "a.gguf", "llama", metadata, tensors))
    assert found.config["rope_parameters"] == config.rope_parameters
    tensors["rope_freqs.weight"] = np.linspace(1, 32, 8).astype(np.float32)
    with pytest.raises(UnsupportedModelError, match="rotary frequencies follow no known rule"):
        checkpoint(write_gguf(tmp_path / "b.gguf", "llama", metadata, tensors))


def test_linear_and_yarn_scaling(tmp_path: Path) -> None:
    linear = {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}
    rope = checkpoint(llama(tmp_path / "a.gguf", **linear)).config["rope_parameters"]
    assert (rope["rope_type"], rope["factor"], rope["rope_theta"]) == ("linear", 4.0, 10000.0)
    yarn = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 32}
    rope = checkpoint(llama(tmp_path / "b.gguf", **yarn)).config["rope_parameters"]
    assert (rope["rope_type"], rope["original_max_position_embeddings"]) == ("yarn", 32)
    with pytest.raises(UnsupportedModelError, match="rotary scaling 'mystery' is not translated"):
        checkpoint(llama(tmp_path / "c.gguf", **{"rope.scaling.type": "mystery", "rope.scaling.factor": 4.0}))


def test_head_dimension_of_its_own(tmp_path: Path) -> None:
    """transformers assumes 128 for every Qwen3."""
    shapes = decoder_shapes(head_dim=32)
    for i in range(2):
        shapes |= {f"blk.{i}.attn_q_norm.weight": (32,), f"blk.{i}.attn_k_norm.weight": (32,)}
    metadata = decoder_metadata(**{"attention.key_length": 32})
    found = checkpoint(write_gguf(tmp_path / "tiny.gguf", "qwen3", metadata, random_tensors(shapes)))
    assert found.config["head_dim"] == 32
    match_parameters(on_meta(found), found.tensors)


def test_gemma3_scales_its_global_layers_only(tmp_path: Path) -> None:
    plain = on_meta(checkpoint(gemma3(tmp_path / "a.gguf"))).config
    assert plain.rope_parameters["full_attention"]["rope_theta"] == 1000000.0
    assert plain.rope_parameters["sliding_attention"]["rope_theta"] == 10000.0
    assert (plain.query_pre_attn_scalar, plain.sliding_window, plain.head_dim) == (32, 16, 32)
    scaled = on_meta(
        checkpoint(gemma3(tmp_path / "b.gguf", **{"rope.scaling.type": "linear", "rope.scaling.factor": 8.0}))
    ).config
    assert scaled.rope_parameters["full_attention"]["factor"] == 8.0
    assert scaled.rope_parameters["sliding_attention"]["rope_type"] == "default"


def exported_differences(path: Path, folder: Path, **expected: Any) -> tuple[dict[str, Any], dict[str, float]]:
    """What is said of the export of a .gguf, and its differences from a torch model whose config is set by hand."""
    found = checkpoint(path)
    config = t.AutoConfig.from_pretrained(found.folder)
    for key, value in expected.items():
        setattr(config, key, value)
    model = t.AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    weights = {
        name: torch.from_numpy(source.numpy()) for name, source in match_parameters(model, found.tensors).items()
    }
    model.load_state_dict({name: value * (0.15 if value.dim() > 1 else 1) for name, value in weights.items()})
    for source in found.tensors.values():  # standard normal weights saturate: the comparison wants finer answers
        if len(source.shape) > 1:
            source.numpy = lambda original=source.numpy: original() * np.float32(0.15)  # type: ignore[method-assign]
            source.rows = lambda a, b, whole=source.numpy: whole()[a:b]  # type: ignore[method-assign]
    artifact = export(found, remember=False)
    return artifact.export, parity.differences(artifact, model, folder)


def test_scaled_positions_are_exported_as_torch_computes_them(tmp_path: Path) -> None:
    scaling = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": SHORT.tolist(),
        "long_factor": (3 * SHORT).tolist(),
        "original_max_position_embeddings": 32,
        "partial_rotary_factor": 1.0,
    }
    path = scaled_phi3(tmp_path / "tiny.gguf")
    said, differences = exported_differences(path, tmp_path, rope_parameters=scaling)
    assert (said["method"], said["context_length"]) == ("fused", 32)
    assert "longrope" in said["context_limit"]
    assert max(differences.values()) <= 1e-4, differences


def test_gemma3_is_exported_as_torch_computes_it(tmp_path: Path) -> None:
    said, differences = exported_differences(gemma3(tmp_path / "tiny.gguf"), tmp_path)
    assert said["method"] == "fused"
    assert max(differences.values()) <= 1e-4, differences


# Hostile and damaged files


def header(tensors: int = 0, values: int = 0, rest: bytes = b"", version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, values) + rest


def string(text: str | bytes) -> bytes:
    data = text if isinstance(text, bytes) else text.encode()
    return struct.pack("<Q", len(data)) + data


def value(key: str, kind: int, data: bytes) -> bytes:
    return string(key) + struct.pack("<I", kind) + data


def tensor(name: str, shape: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    return string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


PAD = bytes(256)
HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "not a GGUF file"),
    "other-file": (b"PK\x03\x04" + PAD, "not a GGUF file"),
    "tensor-count": (header(tensors=2**63, rest=PAD), "claims 9223372036854775808 tensors"),
    "value-count": (header(values=2**60, rest=PAD), "metadata values, more than the file can hold"),
    "key-length": (header(values=1, rest=struct.pack("<Q", 2**62) + PAD), "bytes, more than the file"),
    "array-length": (header(values=1, rest=value("a", 9, struct.pack("<IQ", 4, 2**61)) + PAD), "array elements"),
    "string-count": (header(values=1, rest=value("a", 9, struct.pack("<IQ", 8, 2**61)) + PAD), "strings, more"),
    "nested-array": (
        header(values=1, rest=value("a", 9, struct.pack("<IQ", 9, 1)) + PAD),
        "array of elements of type 9",
    ),
    "value-type": (header(values=1, rest=value("a", 77, b"") + PAD), "metadata of unknown type 77"),
    "twice": (header(values=2, rest=value("a", 0, b"1") * 2 + PAD), "key 'a' occurs twice"),
    "not-utf8": (header(values=1, rest=string(b"\xff\xff\xff") + PAD), "not UTF-8"),
    "alignment": (header(values=1, rest=value("general.alignment", 4, struct.pack("<I", 0)) + PAD), "power of two"),
    "dimensions": (header(1, rest=string("a") + struct.pack("<I", 2**31) + PAD), "has 2147483648 dimensions"),
    "huge-tensor": (header(1, rest=tensor("a", (2**62, 2**62)) + PAD), "tensor a ends at byte"),
    "offset": (header(1, rest=tensor("a", (4,), offset=2**62) + PAD), "tensor a ends at byte"),
    "part-of-a-block": (header(1, rest=tensor("a", (33,), kind=8) + PAD), "rows of 33 elements, which 32 does not"),
    "same-name": (header(2, rest=tensor("a", (1,)) * 2 + PAD), "tensor 'a' occurs twice"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_headers_are_refused_before_anything_is_allocated(case: str, tmp_path: Path) -> None:
    content, message = HOSTILE[case]
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    tracemalloc.start()
    with pytest.raises(CorruptFileError, match=message) as caught:
        resolve_source(str(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "\n" not in str(caught.value)
    assert caught.value.hint
    assert peak < 20e6, "only modules may have been loaded"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (header(version=1, rest=PAD), "GGUF version 1 is not read"),
        (header(version=3 << 24, rest=PAD), "big-endian"),
        (header(1, rest=tensor("a", (32,), kind=999) + PAD), "unknown element type 999"),
    ],
)
def test_unsupported_files(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(content)
    with pytest.raises(UnsupportedModelError, match=message):
        resolve_source(str(tmp_path / "x.gguf"))


@pytest.mark.parametrize("keep", [0.1, 0.5, 0.9, 0.999])
def test_truncated_file(keep: float, tmp_path: Path) -> None:
    path = llama(tmp_path / "tiny.gguf")
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(CorruptFileError, match=r"truncated|more than the file can hold"):
        resolve_source(str(path))


def test_changed_bytes_are_read_or_refused(tmp_path: Path) -> None:
    path = llama(tmp_path / "tiny.gguf")
    data = path.read_bytes()
    generator = np.random.default_rng(0)
    for position in generator.integers(0, 3000, 300):
        changed = bytearray(data)
        changed[position] = generator.integers(0, 256)
        path.write_bytes(changed)
        try:
            read_header(path)
        except BadInputError as error:
            assert error.args


def test_unknown_architecture(tmp_path: Path, cache: Path) -> None:
    path = write_gguf(tmp_path / "x.gguf", "mystery", decoder_metadata(), random_tensors(decoder_shapes()))
    with pytest.raises(UnsupportedModelError, match="architecture mystery are not read"):
        resolve_source(str(path))
    assert not any((cache / "gguf").iterdir()), "nothing half-made stays"


def test_wrong_shapes_show_when_bound(tmp_path: Path) -> None:
    path = llama(tmp_path / "x.gguf", feed_forward_length=64)
    found = checkpoint(path)
    with pytest.raises(CorruptFileError, match=r"has shape \[\d+, \d+\].*requires"):
        match_parameters(on_meta(found), found.tensors)


def test_folder_with_one_gguf_or_several(tmp_path: Path) -> None:
    llama(tmp_path / "a.gguf")
    assert checkpoint(tmp_path).source.kind == "gguf"
    llama(tmp_path / "b.gguf")
    with pytest.raises(BadInputError, match=r"holds 2 \.gguf files"):
        resolve_source(str(tmp_path))

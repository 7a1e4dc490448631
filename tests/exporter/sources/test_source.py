"""What users may give, good and bad: every refusal names the trouble and says what to do."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import transformers as t
from safetensors.numpy import save_file

from onnxpress.errors import (
    BadInputError,
    CorruptFileError,
    OnnxpressError,
    SourceNotFoundError,
    UnsafeInputError,
    UnsupportedModelError,
    UsageError,
)
from onnxpress.exporter.export import export
from onnxpress.exporter.sources.parameters import match_parameters
from onnxpress.exporter.sources.source import Checkpoint, OnnxSource, resolve_source
from onnxpress.models.catalog import Pooling

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ONNXPRESS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    torch.manual_seed(0)
    t.LlamaForCausalLM(t.LlamaConfig(**SIZES)).save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "training_args.bin").write_bytes(b"")
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "model"))


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def refused(error: type[OnnxpressError], model: object, match: str, **options: Any) -> OnnxpressError:
    with pytest.raises(error, match=match) as caught:
        resolve_source(str(model), **options)
    assert type(caught.value) is error
    assert "\n" not in str(caught.value)
    assert caught.value.hint
    return caught.value


def checkpoint(model: object, **options: Any) -> Checkpoint:
    found = resolve_source(str(model), **options)
    assert isinstance(found, Checkpoint)
    return found


def onnx_source(model: object) -> OnnxSource:
    found = resolve_source(str(model))
    assert isinstance(found, OnnxSource)
    return found


def write_onnx(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(
        onnx.parser.parse_model('<ir_version: 8, opset_import: ["":18]> g (float[2] x) => (float[2] y) {y=Neg(x)}'),
        path,
    )
    return path


# Folders


def test_folder(folder: Path) -> None:
    found = checkpoint(folder)
    assert found.source.kind == "huggingface-folder"
    assert found.config["model_type"] == "llama"
    assert set(found.files) == {"tokenizer.json", "generation_config.json"}
    assert found.tensors["model.norm.weight"].shape == (32,)
    assert found.pooling is None
    assert checkpoint(folder / "model.safetensors").tensors.keys() == found.tensors.keys()


def test_sharded_folder(saved: Path, tmp_path: Path) -> None:
    model = t.LlamaForCausalLM.from_pretrained(saved)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="30KB")
    assert len(list((tmp_path / "sharded").glob("model-*.safetensors"))) > 1
    tensors = checkpoint(tmp_path / "sharded").tensors
    for name, value in model.state_dict().items():
        np.testing.assert_array_equal(tensors[name].numpy(), value.numpy())


def test_hub_style_links_to_blobs_are_followed(folder: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    for path in folder.iterdir():
        (snapshot / path.name).symlink_to(path)
    assert checkpoint(snapshot).tensors.keys() == checkpoint(folder).tensors.keys()


@pytest.mark.parametrize("name", ["no/such/folder", "./nothing", "nothing.gguf", "~/nothing-here", ""])
def test_missing_path(name: str) -> None:
    refused(SourceNotFoundError, name, "no such file or folder")


def test_missing_path_that_looks_like_a_repository() -> None:
    assert (
        refused(SourceNotFoundError, "owner/name", "no such").hint == "for a repository on the hub write hf:owner/name"
    )


def test_empty_folder(tmp_path: Path) -> None:
    refused(SourceNotFoundError, tmp_path, "is empty")


def test_folder_of_something_else(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    refused(BadInputError, tmp_path, "holds no model")
    refused(BadInputError, tmp_path / "notes.txt", "neither a .gguf nor an .onnx")


def test_config_without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    refused(BadInputError, folder, "has a config.json but no weights")


def test_weights_without_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    refused(BadInputError, folder, "no config.json")


def test_adapter_only(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    assert "merge it" in str(refused(BadInputError, folder, "no weights").hint)


@pytest.mark.parametrize("text", ["", "{", "[]", '"x"', "\x00"])
def test_damaged_config(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    refused(CorruptFileError, folder, "config.json is not")


def test_truncated_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    refused(CorruptFileError, folder, "lies at")


def test_wrong_shape_shows_when_bound(folder: Path) -> None:
    edit_config(folder, hidden_size=64)
    found = checkpoint(folder)
    with torch.device("meta"):
        model = t.AutoModelForCausalLM.from_config(t.AutoConfig.from_pretrained(found.folder))
    with pytest.raises(CorruptFileError, match=r"has shape .* requires"):
        match_parameters(model, found.tensors)


def test_nan_weights(folder: Path) -> None:
    arrays = {name: tensor.numpy().copy() for name, tensor in checkpoint(folder).tensors.items()}
    arrays["model.norm.weight"][3] = np.nan
    save_file(arrays, folder / "model.safetensors")
    tensors = checkpoint(folder).tensors
    tensors["lm_head.weight"].checked("head").numpy()
    with pytest.raises(CorruptFileError, match=r"weight norm holds NaN or infinity \(1 of 32 "):
        tensors["model.norm.weight"].checked("norm").numpy()


def test_unknown_architecture(folder: Path) -> None:
    edit_config(folder, model_type="lama")
    with pytest.raises(UnsupportedModelError, match="unknown architecture lama") as caught:
        export(checkpoint(folder), remember=False)
    assert caught.value.hint == "did you mean llama?"


def test_config_without_architecture(folder: Path) -> None:
    edit_config(folder, model_type=None)
    refused(UnsupportedModelError, folder, "does not say its model_type")


def test_quantized_by_others(folder: Path) -> None:
    edit_config(folder, quantization_config={"quant_method": "gptq"})
    refused(UnsupportedModelError, folder, r"quantized already \(gptq\)")


def test_unsupported_element_type(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes().replace(b'"F32"', b'"F99"', 1))
    refused(UnsupportedModelError, folder, "element type F99")


def test_remote_code(folder: Path) -> None:
    edit_config(folder, model_type="mystery", auto_map={"AutoModel": "modeling.Mystery"})
    assert "--trust-remote-code" in str(refused(UnsafeInputError, folder, "needs Python code").hint)
    assert checkpoint(folder, trust_remote_code=True).trust_remote_code


def test_native_class_needs_no_remote_code(folder: Path) -> None:
    edit_config(folder, auto_map={"AutoModel": "modeling.Mine"})
    checkpoint(folder)


# Shards


@pytest.mark.parametrize("shard", ["../../etc/passwd", "/etc/passwd", "sub/model.safetensors", "..\\x", "", ".."])
def test_hostile_index(folder: Path, shard: str) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": shard}}))
    refused(UnsafeInputError, folder, "names a shard outside its folder")


@pytest.mark.parametrize("index", [{}, {"weight_map": []}, {"weight_map": {"a": 1}}])
def test_damaged_index(folder: Path, index: Any) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(CorruptFileError, folder, "no weight_map")


def test_missing_shard(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-1.safetensors"}}')
    refused(CorruptFileError, folder, "lacks the shard model-1.safetensors")


def test_tensor_in_no_shard(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"lost": "model-1.safetensors"}}')
    refused(CorruptFileError, folder, "1 tensors of the index are in no shard: lost")


# Pickles


class _Hostile:
    def __reduce__(self) -> Any:
        return print, ("code ran",)


def pickled(folder: Path, value: Any) -> Path:
    (folder / "model.safetensors").unlink()
    torch.save(value, folder / "pytorch_model.bin")
    return folder


def test_pickles_are_refused_unless_allowed(folder: Path) -> None:
    model = t.LlamaForCausalLM.from_pretrained(folder)
    model.to(torch.bfloat16)
    pickled(folder, model.state_dict())
    assert "--allow-pickle" in str(refused(UnsafeInputError, folder, "only as pickles").hint)
    refused(UnsafeInputError, folder / "pytorch_model.bin", "is a pickle")
    tensors = checkpoint(folder, allow_pickle=True).tensors
    value = tensors["lm_head.weight"].numpy().astype(np.float32)
    np.testing.assert_array_equal(value, model.lm_head.weight.detach().float().numpy())


def test_hostile_pickle_runs_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pickled(folder, {"a": _Hostile()})
    refused(UnsafeInputError, folder, "holds more than tensors", allow_pickle=True)
    assert "code ran" not in capsys.readouterr().out


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut"])
def test_damaged_pickle(folder: Path, content: bytes) -> None:
    pickled(folder, {}).joinpath("pytorch_model.bin").write_bytes(content)
    refused(CorruptFileError, folder, "is damaged, or older", allow_pickle=True)


# Sentence encoders


def sentence_encoder(folder: Path, modes: dict[str, Any], *modules: str) -> Path:
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(modes))
    paths = {"Transformer": "", "Pooling": "1_Pooling"}
    listed = [{"type": f"sentence_transformers.models.{name}", "path": paths.get(name, name)} for name in modules]
    (folder / "modules.json").write_text(json.dumps(listed))
    return folder


@pytest.mark.parametrize(
    ("modes", "modules", "pooling"),
    [
        ({"pooling_mode_mean_tokens": True}, ("Transformer", "Pooling"), Pooling(mode="mean")),
        (
            {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False},
            ("Transformer", "Pooling", "Normalize"),
            Pooling(mode="cls", normalize=True),
        ),
        ({"pooling_mode_weightedmean_tokens": True}, ("Transformer", "Pooling"), None),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}, ("Transformer", "Pooling"), None),
        ({"pooling_mode_cls_token": True}, ("Transformer", "Pooling", "Dense"), None),
    ],
)
def test_pooling(folder: Path, modes: dict[str, Any], modules: tuple[str, ...], pooling: Pooling | None) -> None:
    found = checkpoint(sentence_encoder(folder, modes, *modules))
    assert found.pooling == pooling
    assert "1_Pooling/config.json" in found.files


def test_pooling_outside_the_folder(folder: Path) -> None:
    (folder / "modules.json").write_text('[{"type": "x.Pooling", "path": "../../etc"}]')
    refused(UnsafeInputError, folder, "points outside")


# ONNX made by others


def test_onnx_file_with_companions_above(tmp_path: Path) -> None:
    path = write_onnx(tmp_path / "m" / "onnx" / "model_quantized.onnx")
    (tmp_path / "m" / "config.json").write_text('{"model_type": "bert"}')
    (tmp_path / "m" / "tokenizer.json").write_text("{}")
    found = onnx_source(path)
    assert (found.layout, dict(found.graphs), found.config["model_type"]) == ("file", {"model": path}, "bert")
    assert set(found.files) == {"tokenizer.json"}
    assert found.source.kind == "onnx"


def test_onnx_file_alone(tmp_path: Path) -> None:
    found = onnx_source(write_onnx(tmp_path / "any.onnx"))
    assert found.config == {}
    assert found.files == {}


@pytest.mark.parametrize("place", ["", "onnx"])
def test_hugging_face_triple(tmp_path: Path, place: str) -> None:
    names = ["encoder_model", "decoder_model", "decoder_with_past_model"]
    paths = {name: write_onnx(tmp_path / place / f"{name}.onnx") for name in names}
    found = onnx_source(tmp_path)
    assert (found.layout, dict(found.graphs)) == ("huggingface", paths)


def test_onnx_folder_prefers_the_plain_model(tmp_path: Path) -> None:
    write_onnx(tmp_path / "onnx" / "model_fp16.onnx")
    path = write_onnx(tmp_path / "onnx" / "model.onnx")
    assert dict(onnx_source(tmp_path).graphs) == {"model": path}


def test_onnx_folder_that_is_ambiguous(tmp_path: Path) -> None:
    write_onnx(tmp_path / "a.onnx")
    write_onnx(tmp_path / "b.onnx")
    refused(BadInputError, tmp_path, "several graphs and no model.onnx: a, b")


def test_safetensors_win_over_onnx(folder: Path) -> None:
    write_onnx(folder / "onnx" / "model.onnx")
    checkpoint(folder)


def test_genai_folder(tmp_path: Path) -> None:
    path = write_onnx(tmp_path / "decoder.onnx")
    write_onnx(tmp_path / "other.onnx")
    (tmp_path / "genai_config.json").write_text('{"model": {"type": "llama", "decoder": {"filename": "decoder.onnx"}}}')
    found = onnx_source(tmp_path)
    assert (found.layout, dict(found.graphs)) == ("genai", {"model": path})
    assert found.genai_config is not None


@pytest.mark.parametrize(
    ("name", "error", "match"),
    [
        ("../../etc/passwd", UnsafeInputError, "outside its folder"),
        ("/etc/passwd", UnsafeInputError, "outside its folder"),
        ("lost.onnx", CorruptFileError, "lacks lost.onnx"),
    ],
)
def test_hostile_genai_folder(tmp_path: Path, name: str, error: type[OnnxpressError], match: str) -> None:
    write_onnx(tmp_path / "decoder.onnx")
    (tmp_path / "genai_config.json").write_text(json.dumps({"model": {"decoder": {"filename": name}}}))
    refused(error, tmp_path, match)


def test_empty_onnx_file(tmp_path: Path) -> None:
    (tmp_path / "x.onnx").touch()
    refused(CorruptFileError, tmp_path / "x.onnx", "is empty")


# Names


def test_unknown_name_suggests_the_nearest() -> None:
    assert refused(SourceNotFoundError, "smolm2-135m-instruct", "no file, folder or known model").hint == (
        "did you mean smollm2-135m-instruct?"
    )
    assert "list models" in str(refused(SourceNotFoundError, "zzz", "no file, folder or known model").hint)


@pytest.mark.parametrize("name", ["hf:", "hf:name", "hf:a/b/c", "hf:a/b@", "hf:../x", "hf:a/..", "hf:a b/c"])
def test_malformed_repository(name: str) -> None:
    refused(UsageError, name, "is not a repository")

"""Tiny models to build from, a profile and recipes of the tests' own, and the command line as a function."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxpress.cli import main

PROFILE = """
name = "test-cpu"
description = "for the tests"
opset = 23
ir_version = 12
[host]
architecture = ["x86_64", "amd64", "aarch64", "arm64"]
flags = [["vnni-for-all-we-know"]]
[recipes]
default = "{recipe}"
"""
RECIPE = """
name = "test"
[[pass]]
name = "clean-up"
optional = true
[[pass]]
name = "pack-projections"
optional = true
[[pass]]
name = "quantize-blocks"
bits = 8
block_size = 32
"""
VOCABULARY = 260


@dataclass
class Outcome:
    """What a command did."""

    code: int
    stdout: str
    stderr: str

    @property
    def json(self) -> Any:
        return json.loads(self.stdout)


Run = Callable[..., Outcome]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """`run("build", …)` in this process."""

    def call(*arguments: object) -> Outcome:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        found = capsys.readouterr()
        return Outcome(code, found.out, found.err)

    return call


@pytest.fixture(scope="session")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "test.toml"
    path.write_text(RECIPE)
    return path


@pytest.fixture(scope="session")
def profile(tmp_path_factory: pytest.TempPathFactory, recipe: Path) -> Path:
    path = tmp_path_factory.mktemp("profile") / "test-cpu.toml"
    path.write_text(PROFILE.format(recipe=recipe))
    return path


@pytest.fixture(scope="session")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A profile whose recipes need no search."""
    path = tmp_path_factory.mktemp("profile") / "plain.toml"
    path.write_text(PROFILE.format(recipe="fp32"))
    return path


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of three layers with a byte-level tokenizer and a chat template."""
    import torch
    import transformers

    folder = tmp_path_factory.mktemp("checkpoint") / "tiny-llama"
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_hidden_layers=3,
        max_position_embeddings=128,
        bos_token_id=257,
        eos_token_id=258,
        pad_token_id=259,
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def write_tokenizer(folder: Path) -> None:
    """Every byte is a token; 257 begins, 258 ends, 259 pads."""
    import tokenizers

    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    words = {char: index for index, char in enumerate(alphabet)}
    model = tokenizers.models.BPE(vocab=words, merges=[])
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>", "<pad>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "model_max_length": 128}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "chat_template.jinja").write_text("{% for m in messages %}<s>{{ m.content }}</s>{% endfor %}<s>")


@pytest.fixture(scope="session")
def mlp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A graph that someone else made: two products of 64 by 64 and a Gelu spelled as Sigmoid times x."""
    path = tmp_path_factory.mktemp("mlp") / "mlp.onnx"
    onnx.save(mlp_graph(), path)
    return path


def mlp_graph(seed: int = 0, external: str | None = None) -> onnx.ModelProto:
    generator = np.random.default_rng(seed)
    weights = [(generator.standard_normal((64, 64)) / 8).astype(np.float32) for _ in range(2)]
    names = ("first.weight", "second.weight")
    tensors = [numpy_helper.from_array(array, name) for array, name in zip(weights, names, strict=True)]
    if external is not None:
        for index, tensor in enumerate(tensors):
            tensor.ClearField("raw_data")
            tensor.data_location = TensorProto.EXTERNAL
            for key, value in (("location", external), ("offset", index * 16384), ("length", 16384)):
                tensor.external_data.add(key=key, value=str(value))
    nodes = [
        helper.make_node("MatMul", ["x", names[0]], ["a"], "first"),
        helper.make_node("Sigmoid", ["a"], ["b"], "gate"),
        helper.make_node("Mul", ["a", "b"], ["c"], "mul"),
        helper.make_node("MatMul", ["c", names[1]], ["y"], "second"),
    ]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch_size", 64])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch_size", 64])]
    graph = helper.make_graph(nodes, "mlp", inputs, outputs, tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file below a folder with its content."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

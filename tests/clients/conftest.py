"""Artifacts, made by the pipeline as a user makes them, and the clients that load them unmodified.

Node's packages are installed once per lock file into the user's cache folder, install scripts off: onnxruntime-node's
only downloads CUDA libraries. Where Node is missing its tests are skipped; with CI set in the environment they fail.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from onnxpress import pipeline
from onnxpress.requests import Judging

from .decoding import STEPS, Clients, genai, plain_onnxruntime

HERE = Path(__file__).parent
TINY_WORDS = "the sea is wide and deep and blue, and no ship has ever seen all of it".split()


def cache_folder(name: str) -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "onnxpress" / name


@pytest.fixture(scope="session")
def node() -> Callable[..., str]:
    """Runs a script (a file to copy beside the packages, or one in `cwd`) under Node; returns what it prints."""
    missing = [tool for tool in ("node", "npm") if shutil.which(tool) is None]
    if missing:
        reason = f"{' and '.join(missing)} not found: install Node 20 or newer"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    lock = (HERE / "package-lock.json").read_bytes()
    folder = cache_folder(f"clients-{hashlib.sha256(lock).hexdigest()[:12]}")
    environment = {**os.environ, "ONNXRUNTIME_NODE_INSTALL": "skip", "ONNXRUNTIME_NODE_INSTALL_CUDA": "skip"}
    if not (folder / "node_modules" / ".complete").exists():
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("package.json", "package-lock.json"):
            shutil.copyfile(HERE / name, folder / name)
        command = ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund"]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        (folder / "node_modules" / ".complete").touch()

    def run(script: Path, *arguments: str, cwd: Path | None = None) -> str:
        # Node looks for packages beside the script, not in the working directory.
        copy = folder / f"{os.getpid()}-{script.name}"
        shutil.copyfile(script, copy)
        try:
            done = subprocess.run(
                ["node", str(copy), *arguments], cwd=cwd or folder, env=environment, capture_output=True, text=True
            )
        finally:
            copy.unlink()
        # The runtime reports a failed operator with every tensor that it was fed: the first lines tell.
        assert done.returncode == 0, done.stderr[:2000]
        return done.stdout

    return run


@pytest.fixture(scope="session")
def clients(node: Callable[..., str]) -> Clients:
    def javascript(client: str) -> Callable[[Path, list[list[int]]], list[list[int]]]:
        def run(folder: Path, prompts: list[list[int]]) -> list[list[int]]:
            arguments = (client, str(folder.parent), folder.name, json.dumps({"prompts": prompts, "steps": STEPS}))
            rows: list[list[int]] = json.loads(node(HERE / "clients.mjs", *arguments).splitlines()[-1])
            return rows

        return run

    return {
        "onnxruntime": plain_onnxruntime,
        "onnxruntime-genai": genai,
        "onnxruntime-node": javascript("onnxruntime"),
        "transformers.js": javascript("transformers"),
    }


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random llama of two layers with a tokenizer, as transformers writes it."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny") / "tiny-llama"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator([" ".join(TINY_WORDS)] * 3, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    fast.chat_template = "{% for message in messages %}<s>{{ message.content }}</s>{% endfor %}"
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.3,  # far from uniform: ties between tokens are unlikely
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The tiny llama's artifact by format: `fp32`, `8-bit` or `4-bit`, or `default` for what `build` makes."""
    folder = tmp_path_factory.mktemp("artifacts")
    return _formats(str(tiny_checkpoint), folder)


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """SmolLM2-135M-Instruct by format, as `tiny`."""
    return _formats("smollm2-135m-instruct", tmp_path_factory.mktemp("smollm2"))


@pytest.fixture(scope="session")
def minilm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """all-MiniLM-L6-v2, the default artifact."""
    output = tmp_path_factory.mktemp("minilm") / "all-minilm-l6-v2-onnx"
    return pipeline.build("all-minilm-l6-v2", output=output, judging=Judging(benchmark=False)).path


def _formats(model: str, folder: Path) -> Callable[[str], Path]:
    """Builds each format on first use."""

    def build(name: str) -> Path:
        output = folder / name
        if output.exists():
            return output
        if name == "fp32":
            return pipeline.export(model, output=output).path
        if name == "default":
            return pipeline.build(model, output=output, judging=Judging(benchmark=False)).path
        bits = {"8-bit": 8, "4-bit": 4}[name]
        chosen = [f"quantize-blocks:bits={bits},block_size=32"]
        return pipeline.optimize(
            str(build("fp32")), output=output, recipe=chosen, judging=Judging(benchmark=False)
        ).path

    return build

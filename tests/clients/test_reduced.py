"""Models whose structure was cut run wherever others do: onnxruntime, -genai, -node, transformers.js, transformers."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from onnxpress import pipeline
from onnxpress.requests import Judging
from onnxpress.runtime.sessions import EncoderSession

from .decoding import CLIENTS, HERE, PROMPTS, STEPS, Clients, check, golden_tokens, until_end

NARROW = "prune-ffn:ratio=0.5,method=l2,refit=false,multiple_of=16"
PASSES = {
    "narrower": [NARROW],
    "shorter": ["reduce-depth:layers=[1]"],
    "fewer-tokens": ["trim-vocabulary:tokens=290"],
    "all-of-it": ["trim-vocabulary:tokens=290", NARROW.replace("0.5", "0.75"), "reduce-depth:layers=[1]"],
    "layers-that-differ": [f'{NARROW},include=["*.layers.1.*"]'],
}
TEXTS = ["the sea is wide and deep", "no ship has ever seen all of it, and blue is the sea"]


@pytest.fixture(scope="session")
def reduced(
    tiny: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[Path, Path | None]]:
    """The tiny llama after each of PASSES, and its checkpoint, where there can be one."""

    @cache
    def make(kind: str) -> tuple[Path, Path | None]:
        folder = tmp_path_factory.mktemp(kind)
        checkpoint = None if kind == "layers-that-differ" else folder / "checkpoint"
        output = folder / kind
        pipeline.optimize(
            str(tiny("fp32")),
            output=output,
            recipe=PASSES[kind],
            checkpoint=checkpoint,
            judging=Judging(benchmark=False),
        )
        return output, checkpoint

    return make


@pytest.mark.client
@pytest.mark.parametrize("name", CLIENTS)
@pytest.mark.parametrize("kind", PASSES)
def test_decoders(clients: Clients, reduced: Callable[[str], tuple[Path, Path | None]], kind: str, name: str) -> None:
    check(clients[name], reduced(kind)[0], PROMPTS[:1])


@pytest.mark.client
@pytest.mark.parametrize("name", CLIENTS)
def test_a_padded_batch(clients: Clients, reduced: Callable[[str], tuple[Path, Path | None]], name: str) -> None:
    check(clients[name], reduced("all-of-it")[0], PROMPTS)


@pytest.mark.client
@pytest.mark.parametrize("kind", [kind for kind in PASSES if kind != "layers-that-differ"])
def test_the_checkpoint_in_transformers(reduced: Callable[[str], tuple[Path, Path | None]], kind: str) -> None:
    """`AutoModelForCausalLM.from_pretrained(…).generate` writes the tokens that the artifact does."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, checkpoint = reduced(kind)
    assert checkpoint is not None
    model, report = AutoModelForCausalLM.from_pretrained(checkpoint, output_loading_info=True)
    assert not any(report.values()), report
    for prompt, expected in zip(PROMPTS, golden_tokens(folder, PROMPTS), strict=True):
        ids = torch.tensor([prompt])
        written = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=STEPS, do_sample=False)
        assert until_end(written[0, len(prompt) :].tolist()) == until_end(expected)
    if any(one.startswith("trim-vocabulary") for one in PASSES[kind]):
        assert len(AutoTokenizer.from_pretrained(checkpoint)) == model.config.vocab_size == 290


@pytest.fixture(scope="session")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A random BERT with words of its own, narrower, shorter and of fewer tokens: its artifact and its checkpoint."""
    from tokenizers import BertWordPieceTokenizer
    from transformers import BertTokenizerFast

    from onnxpress.exporter import architectures

    folder = tmp_path_factory.mktemp("encoder")
    words = BertWordPieceTokenizer()
    words.train_from_iterator([*TEXTS, "abcdefghijklmnopqrstuvwxyz zebras queue for jazz"] * 3, vocab_size=110)
    words.save(str(folder / "tokenizer.json"))
    architectures.tiny_model("bert", folder / "model", vocab_size=words.get_vocab_size())
    BertTokenizerFast(tokenizer_file=str(folder / "tokenizer.json")).save_pretrained(folder / "model")
    (folder / "text.txt").write_text("\n".join(TEXTS))
    pipeline.export(str(folder / "model"), output=folder / "fp32")
    passes = [
        f'trim-vocabulary:corpus="{folder / "text.txt"}"',
        NARROW,
        "reduce-depth:layers=[1,2]",
    ]
    pipeline.optimize(
        str(folder / "fp32"),
        output=folder / "smaller",
        recipe=passes,
        checkpoint=folder / "checkpoint",
        judging=Judging(benchmark=False),
    )
    return folder / "smaller", folder / "checkpoint"


def embeddings(folder: Path) -> np.ndarray:
    """Ours, one text at a time."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    session = EncoderSession(next((folder / "onnx").glob("*.onnx")))
    vectors = np.array([session.embed(np.array([tokenizer.encode(text).ids]))[0] for text in TEXTS])
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


@pytest.mark.client
def test_an_encoder_is_smaller(encoder: tuple[Path, Path]) -> None:
    config = json.loads((encoder[0] / "config.json").read_text())
    assert (config["num_hidden_layers"], config["intermediate_size"]) == (2, 48)
    original = json.loads((encoder[0].parent / "model" / "config.json").read_text())
    assert config["vocab_size"] < original["vocab_size"]


@pytest.mark.client
def test_an_encoder_in_transformers_js(node: Callable[..., str], encoder: tuple[Path, Path]) -> None:
    folder, _ = encoder
    answer = node(HERE / "clients.mjs", "embed", str(folder.parent), folder.name, json.dumps({"texts": TEXTS}))
    # Float32 through 2 layers, in another order of sums and padded: 1e-6 or so of vectors of length 1.
    np.testing.assert_allclose(json.loads(answer.splitlines()[-1]), embeddings(folder), rtol=0, atol=1e-5)


@pytest.mark.client
def test_an_encoder_in_transformers(encoder: tuple[Path, Path]) -> None:
    import torch
    from transformers import AutoModel, AutoTokenizer

    folder, checkpoint = encoder
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = AutoModel.from_pretrained(checkpoint).eval()
    feeds = tokenizer(TEXTS, return_tensors="pt", padding=True)
    with torch.no_grad():
        states = model(**feeds).last_hidden_state
    mask = feeds["attention_mask"][..., None]
    vectors = ((states * mask).sum(1) / mask.sum(1)).numpy()
    vectors /= np.linalg.norm(vectors, axis=-1, keepdims=True)
    np.testing.assert_allclose(vectors, embeddings(folder), rtol=0, atol=1e-5)


@pytest.mark.client
def test_an_encoder_in_plain_onnxruntime(encoder: tuple[Path, Path]) -> None:
    """Without onnxpress: tokenizers, numpy and onnxruntime, in a process of their own."""
    folder, _ = encoder
    script = """
import json, sys
from pathlib import Path
import numpy as np, onnxruntime
from tokenizers import Tokenizer
folder, texts = Path(sys.argv[1]), json.loads(sys.argv[2])
tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
tokenizer.enable_padding()
rows = tokenizer.encode_batch(texts)
feeds = {"input_ids": [row.ids for row in rows], "attention_mask": [row.attention_mask for row in rows],
         "token_type_ids": [row.type_ids for row in rows]}
session = onnxruntime.InferenceSession(next(folder.glob("onnx/*.onnx")))
feeds = {value.name: np.array(feeds[value.name], np.int64) for value in session.get_inputs()}
states = session.run(["last_hidden_state"], feeds)[0]
mask = feeds["attention_mask"][..., None]
vectors = (states * mask).sum(1) / mask.sum(1)
print(json.dumps((vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).tolist()))
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(folder), json.dumps(TEXTS)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    np.testing.assert_allclose(json.loads(done.stdout), embeddings(folder), rtol=0, atol=1e-5)

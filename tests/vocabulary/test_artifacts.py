"""From a checkpoint to an artifact with fewer tokens, through the command line: a tiny Llama and a tiny BERT."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from onnxpress.cli import main

from .conftest import SENTENCES

Trained = Callable[[str], dict[str, Any]]


def save(folder: Path, model: Any, content: dict[str, Any], settings: dict[str, Any]) -> Path:
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory, trained: Trained) -> Path:
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=608,  # a few rows more than tokens
        hidden_size=64,
        intermediate_size=96,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_hidden_layers=2,
        max_position_embeddings=128,
        bos_token_id=1,
        eos_token_id=[2, 599],
        pad_token_id=3,
        tie_word_embeddings=True,
    )
    settings = {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    folder = tmp_path_factory.mktemp("llama") / "tiny"
    return save(folder, transformers.LlamaForCausalLM(config), trained("byte-level"), settings)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory, trained: Trained) -> Path:
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=500,
        hidden_size=64,
        intermediate_size=96,
        num_attention_heads=4,
        num_hidden_layers=2,
        max_position_embeddings=128,
        pad_token_id=0,
    )
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "[PAD]", "unk_token": "[UNK]"}
    folder = tmp_path_factory.mktemp("bert") / "tiny"
    return save(folder, transformers.BertModel(config), trained("wordpiece"), settings)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "english.txt"
    path.write_text("\n".join(SENTENCES[:3] * 6), encoding="utf-8")
    return path


def build(model: Path, folder: Path, *options: object) -> Path:
    arguments = ["build", model, "-o", folder, "--no-benchmark", *options]
    assert main([str(one) for one in arguments]) == 0
    return folder


def recipe(folder: Path, corpus: Path, *more: str) -> Path:
    passes = [f'name = "trim-vocabulary"\ncorpus = "{corpus}"', *more]
    path = folder / "trim.toml"
    path.write_text('name = "trim"\n' + "".join(f"[[pass]]\n{one}\n" for one in passes), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def small_llama(tmp_path_factory: pytest.TempPathFactory, llama: Path, corpus: Path) -> Path:
    folder = tmp_path_factory.mktemp("small")
    smooth = 'name = "quantize-blocks"\nbits = 8\nblock_size = 32\nmethod = "least-squares"'
    return build(llama, folder / "llama", "--recipe", recipe(folder, corpus, smooth), "--text", corpus)


def test_the_graph_computes_what_the_original_does_for_the_kept_tokens(
    tmp_path: Path, llama: Path, corpus: Path
) -> None:
    import torch
    import transformers

    folder = build(llama, tmp_path / "out", "--recipe", recipe(tmp_path, corpus), "--text", corpus, "--logits", "all")
    kept = np.array(json.loads((folder / "vocabulary.json").read_text())["kept"])
    tokenizer, original = (transformers.AutoTokenizer.from_pretrained(path) for path in (folder, llama))
    ids = tokenizer(SENTENCES[0])["input_ids"]
    assert kept[ids].tolist() == original(SENTENCES[0])["input_ids"]
    session = onnxruntime.InferenceSession(next(folder.glob("onnx/*.onnx")))
    shapes = {value.name: value.shape for value in session.get_inputs()}
    feeds = {name: np.zeros((1, shape[1], 0, shape[3]), np.float32) for name, shape in shapes.items() if "past" in name}
    feeds |= {"input_ids": np.array([ids]), "attention_mask": np.ones((1, len(ids)), np.int64)}
    found = session.run(["logits"], {name: value for name, value in feeds.items() if name in shapes})[0]
    model = transformers.AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32).eval()
    with torch.inference_mode():
        expected = model(torch.tensor([kept[ids].tolist()])).logits.numpy()[..., kept]
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_configs_follow(small_llama: Path) -> None:
    record = json.loads((small_llama / "vocabulary.json").read_text())
    kept, config = record["kept"], json.loads((small_llama / "config.json").read_text())
    assert record["original_size"] == 608
    assert config["vocab_size"] == len(kept) < 500
    assert [kept[config[name]] for name in ("bos_token_id", "pad_token_id")] == [1, 3]
    assert [kept[number] for number in config["eos_token_id"]] == [2, 599]
    generation = json.loads((small_llama / "generation_config.json").read_text())
    assert [kept[number] for number in generation["eos_token_id"]] == [2, 599]
    genai = json.loads((small_llama / "genai_config.json").read_text())["model"]
    assert genai["vocab_size"] == len(kept)
    assert genai["eos_token_id"] == config["eos_token_id"]


def test_a_calibrated_pass_follows_and_quality_is_measured(small_llama: Path) -> None:
    record = json.loads((small_llama / "artifact.json").read_text())
    trim, blocks = (step for step in record["steps"] if step["name"] in ("trim-vocabulary", "quantize-blocks"))
    assert trim["metrics"]["max_difference"] < 1e-3
    assert trim["matched"] == {"embedding": 1, "head": 1}
    assert 0 < blocks["metrics"]["kl"] < 0.1
    assert record["metrics"]["more_tokens"] == 0, "the corpus is what it is measured on"
    assert abs(record["metrics"]["loss"]) < 0.5


def test_evaluate_compares_with_the_original(
    small_llama: Path, llama: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    arguments = ["evaluate", small_llama, "--reference", llama, "--text", corpus, "--json"]
    assert main([str(one) for one in arguments]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["kl"] < 0.1
    assert found["more_tokens"] == 0


def test_it_verifies_and_is_trimmed_again(small_llama: Path, tmp_path: Path, llama: Path, corpus: Path) -> None:
    assert main(["verify", str(small_llama)]) == 0
    first = build(llama, tmp_path / "first", "--recipe", recipe(tmp_path, corpus), "--text", corpus)
    second = tmp_path / "second"
    trim = f"trim-vocabulary:tokens={290}"
    assert main(["optimize", str(first), "-o", str(second), "--pass", trim, "--no-benchmark"]) == 0
    kept, more = (json.loads((path / "vocabulary.json").read_text()) for path in (second, first))
    assert len(kept["kept"]) == 290
    assert set(kept["kept"]) < set(more["kept"])
    assert kept["original_size"] == more["original_size"] == 608


def test_an_encoder_and_its_tokenizer(tmp_path: Path, bert: Path, corpus: Path) -> None:
    import transformers

    folder = build(bert, tmp_path / "out", "--recipe", recipe(tmp_path, corpus), "--text", corpus)
    record = json.loads((folder / "artifact.json").read_text())
    assert record["metrics"]["cosine_min"] > 0.9999
    assert record["metrics"]["more_tokens"] == 0
    kept = np.array(json.loads((folder / "vocabulary.json").read_text())["kept"])
    tokenizer, original = (transformers.AutoTokenizer.from_pretrained(path) for path in (folder, bert))
    for text in SENTENCES[:3]:
        assert kept[tokenizer(text)["input_ids"]].tolist() == original(text)["input_ids"]


@pytest.mark.parametrize(
    ("change", "options", "code", "message"),
    [
        ("no tokenizer", "tokens=300", 3, "no tokenizer.json"),
        ("WordLevel", "tokens=300", 3, "kind WordLevel cannot be trimmed"),
        ("", "tokens=100", 2, "100 tokens are too few"),
        ("", "tokens=0", 2, "tokens must be 1 or more"),
        ("", "multiple_of=64", 2, "give a corpus, scripts or a number of tokens"),
        ("empty", 'corpus="{corpus}"', 3, "is empty"),
    ],
)
def test_refusals(
    llama: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: str,
    options: str,
    code: int,
    message: str,
) -> None:
    import shutil

    empty = tmp_path / "empty.txt"
    empty.write_text("\n")
    copy = tmp_path / "copy"
    shutil.copytree(llama, copy)
    if change == "no tokenizer":
        (copy / "tokenizer.json").unlink()
    elif change == "WordLevel":
        content = {"version": "1.0", "model": {"type": "WordLevel", "vocab": {"a": 0, "b": 1}, "unk_token": "a"}}
        (copy / "tokenizer.json").write_text(json.dumps(content))
    text = options.format(corpus=empty)
    key, _, value = text.partition("=")
    path = tmp_path / "trim.toml"
    path.write_text(f'name = "trim"\n[[pass]]\nname = "trim-vocabulary"\n{key} = {value}\n')
    capsys.readouterr()
    assert main(["build", str(copy), "-o", str(tmp_path / "out"), "--recipe", str(path), "--no-benchmark"]) == code
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()

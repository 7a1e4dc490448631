from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import tokenizers
from onnx import numpy_helper

from onnxpress.errors import BadInputError, SourceNotFoundError, VerificationError
from onnxpress.evaluation.evaluate import evaluate
from onnxpress.evaluation.opening import open_model
from onnxpress.graph.io import load_graph, save_graph
from onnxpress.optimizers.fusion.last_logits import LastLogits

Make = Callable[..., Path]
SMALL = {"windows": 3, "window": 40, "decode_steps": 8}


def test_a_graph_equals_its_other_spelling(make_decoder: Make) -> None:
    found = evaluate(make_decoder(gqa=True), make_decoder(gqa=False), **SMALL)
    assert found.kl is not None
    assert found.kl < 1e-8
    assert found.top1_agreement == 1
    assert found.perplexity == pytest.approx(found.reference_perplexity, rel=1e-4)
    assert found.modes.keys() == {"prefill", "decode", "padded"}
    assert found.tokens == 3 * 39
    assert abs(found.loss) < 1e-4


def test_what_the_reference_writes_is_unsurprising_to_it(make_decoder: Make) -> None:
    found = evaluate(make_decoder(noise=0.1), make_decoder(), **SMALL)
    assert found.reference_perplexity is not None
    assert found.reference_perplexity < 64  # the vocabulary: what chance would give
    assert found.perplexity is not None
    assert found.perplexity > found.reference_perplexity


def test_noise_costs_more_the_louder_it_is_in_every_mode(make_decoder: Make) -> None:
    reference = make_decoder()
    little, much = (evaluate(make_decoder(noise=noise), reference, **SMALL) for noise in (0.01, 0.1))
    for mode in ("prefill", "decode", "padded"):
        assert 0 < little.modes[mode]["kl"] < much.modes[mode]["kl"]
    assert much.kl == pytest.approx(much.modes["prefill"]["kl"], rel=1e-3)  # neither cache nor padding adds to it


def test_a_graph_with_the_last_logits_only_is_measured_on_a_sample(make_decoder: Make) -> None:
    whole, last = make_decoder(noise=0.05), make_decoder(noise=0.05, last=True)
    reference = make_decoder()
    a, b = evaluate(whole, reference, **SMALL), evaluate(last, reference, **SMALL)
    assert (a.tokens, b.tokens) == (3 * 39, 3 * 8)
    assert a.modes["decode"]["kl"] == pytest.approx(b.modes["decode"]["kl"], rel=1e-3)
    assert evaluate(last, whole, **SMALL).kl < 1e-8  # type: ignore[operator]


def test_logits_that_our_pass_cut_are_measured_at_every_position(make_decoder: Make, tmp_path: Path) -> None:
    whole, reference = make_decoder(noise=0.05), make_decoder()
    model = load_graph(whole)
    assert LastLogits().call(model).modified
    for data in (None, "cut.onnx_data"):
        save_graph(model, tmp_path / "cut.onnx", external_data=data)
        assert open_model(tmp_path / "cut.onnx").model.last_only
        found = evaluate(tmp_path / "cut.onnx", reference, **SMALL)
        assert found.modes == evaluate(whole, reference, **SMALL).modes
        assert found.tokens == 3 * 39


def test_a_graph_that_is_wrong_only_when_padded_is_found(make_decoder: Make, tmp_path: Path) -> None:
    path = make_decoder()
    model = onnx.load(path)
    for node in model.graph.node:  # positions counted over padding too
        if node.op_type == "CumSum":
            ones = onnx.helper.make_node("Mul", [node.input[0], "zero"], ["zeros"])
            alike = onnx.helper.make_node("Add", ["zeros", "one"], ["alike"])
            node.input[0] = "alike"
            place = list(model.graph.node).index(node)
            model.graph.node.insert(place, alike)
            model.graph.node.insert(place, ones)
            break
    onnx.save(model, tmp_path / "wrong.onnx")
    found = evaluate(tmp_path / "wrong.onnx", path, **SMALL)
    assert found.modes["prefill"]["kl"] < 1e-8
    assert found.modes["decode"]["kl"] < 1e-8
    assert found.modes["padded"]["kl"] > 1e-3
    assert found.kl == pytest.approx(found.modes["padded"]["kl"], rel=1e-4)
    assert found.loss == pytest.approx(np.exp(found.kl) - 1, abs=1e-4)


def test_not_a_number_is_an_error_that_says_where(make_decoder: Make) -> None:
    path = make_decoder(noise=0.0)
    reference = make_decoder()
    model = onnx.load(path)
    for tensor in model.graph.initializer:
        if tensor.name == "head":
            array = numpy_helper.to_array(tensor).copy()
            array[0, 7] = np.nan
            tensor.CopyFrom(numpy_helper.from_array(array, "head"))
    onnx.save(model, path)
    with pytest.raises(VerificationError, match=r"prefill: .* first at \[0, 7\]"):
        evaluate(path, reference, **SMALL)


def test_token_windows_and_bad_input(make_decoder: Make, make_encoder: Make, tmp_path: Path) -> None:
    decoder, encoder = make_decoder(), make_encoder()
    ids = [np.arange(20)[None] % 64]
    assert evaluate(decoder, decoder, text=ids).tokens == 19
    with pytest.raises(BadInputError, match="is a decoder"):
        evaluate(decoder, encoder)
    with pytest.raises(BadInputError, match="neither model has a tokenizer"):
        evaluate(decoder, decoder, text=tmp_path / "some.txt")
    with pytest.raises(SourceNotFoundError):
        evaluate(tmp_path / "nothing", decoder)
    letters = tokenizers.Tokenizer(tokenizers.models.WordLevel({"?": 0, "a": 1, "b": 2}, unk_token="?"))
    letters.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    letters.save(str(decoder.parent / "tokenizer.json"))
    (tmp_path / "short.txt").write_text("a b a b")
    with pytest.raises(BadInputError, match=r"short\.txt has \d+ tokens, too few"):
        evaluate(decoder, decoder, text=tmp_path / "short.txt")


def test_encoders(make_encoder: Make) -> None:
    reference = make_encoder()
    same, noisy, blind = (evaluate(make_encoder(**o), reference) for o in ({}, {"noise": 0.1}, {"blind": True}))
    assert same.cosine_min == pytest.approx(1)
    assert noisy.cosine_min is not None
    assert 0.5 < noisy.cosine_min < 0.9999
    assert noisy.cosine_mean is not None
    assert noisy.loss == 1 - noisy.cosine_mean
    assert blind.modes["prefill"]["cosine_min"] == pytest.approx(1)
    assert blind.modes["padded"]["cosine_min"] < 0.999
    json.dumps(blind.to_dict())


def test_pairs_are_ranked(make_encoder: Make, tmp_path: Path) -> None:
    import tokenizers

    path = make_encoder()
    words = tokenizers.models.WordLevel({w: i for i, w in enumerate("a b c d e f ?".split())}, unk_token="?")
    tokenizer = tokenizers.Tokenizer(words)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(path.parent / "tokenizer.json"))
    (tmp_path / "pairs.tsv").write_text("a b c\ta b c\t5\na b c\ta b d\t4\na b c\td e f\t1\n")
    found = evaluate(path, path, pairs=tmp_path / "pairs.tsv")
    assert found.spearman == found.reference_spearman == pytest.approx(1)
    assert found.text == "built-in sentences"


def test_opening_a_folder(make_decoder: Make, tmp_path: Path) -> None:
    path = make_decoder()
    folder = path.parent
    (folder / "config.json").write_text('{"bos_token_id": 5}')
    opened = open_model(folder)
    assert (opened.kind, opened.starts, opened.folder) == ("decoder", [5], folder)
    assert open_model(path).folder == folder
    (folder / "artifact.json").write_text('{"session_options": {"session.intra_op.allow_spinning": "0"}}')
    options = open_model(folder).model.session.get_session_options()
    assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"
    (folder / "other.onnx").write_bytes(path.read_bytes())
    with pytest.raises(BadInputError, match="several graphs"):
        open_model(folder)

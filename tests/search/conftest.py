"""A small language model without attention: embedding tied to the head, layers with two products on one input; and tiny
graphs of our exporter."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from numpy.typing import NDArray

from onnxpress.evaluation.metrics import Divergence, cosine
from onnxpress.graph.io import copy_graph, load_graph, save_graph
from onnxpress.optimizers.recipe import PassSpec
from onnxpress.runtime.sessions import pool
from onnxpress.search.formats import Format
from onnxpress.search.sensitivity import TrialInputs

Exported = Callable[..., ir.Model]
WIDTH, INNER, WORDS, LAYERS = 64, 96, 200, 2


def language_model(seed: int = 0) -> ir.Model:
    rng = np.random.default_rng(seed)
    weights: dict[str, NDArray[Any]] = {"embed": rng.standard_normal((WORDS, WIDTH)).astype(np.float32) / 4}
    lines, state = ["h = Gather (embed, input_ids)"], "h"
    for i in range(LAYERS):
        for name, shape in (("gate", (WIDTH, INNER)), ("up", (WIDTH, INNER)), ("down", (INNER, WIDTH))):
            weights[f"layers__{i}__{name}"] = (rng.standard_normal(shape) / 8).astype(np.float32)
        lines += [
            f"n{i} = LayerNormalization ({state}, gain)",
            f"g{i} = MatMul (n{i}, layers__{i}__gate)",
            f"u{i} = MatMul (n{i}, layers__{i}__up)",
            f"t{i} = Tanh (g{i})",
            f"m{i} = Mul (t{i}, u{i})",
            f"d{i} = MatMul (m{i}, layers__{i}__down)",
            f"s{i} = Add ({state}, d{i})",
        ]
        state = f"s{i}"
    weights["gain"] = np.ones(WIDTH, np.float32)
    lines += ["w = Transpose <perm = [1, 0]> (embed)", f"logits = MatMul ({state}, w)"]
    given = ", ".join(f"float[{', '.join(map(str, w.shape))}] {name}" for name, w in weights.items())
    text = f"""<ir_version: 10, opset_import: ["": 21, "com.microsoft": 1]>
        agraph (int64[batch_size, n] input_ids, int64[batch_size, n] attention_mask, {given})
            => (float[batch_size, n, {WORDS}] logits) {{ {chr(10).join(lines)} }}"""
    model = ir.from_onnx_text(text)
    for value in list(model.graph.inputs)[2:]:
        model.graph.inputs.remove(value)
        array = weights[str(value.name)]
        value.name = str(value.name).replace("__", ".")
        value.const_value = ir.tensor(array, name=value.name)
        model.graph.register_initializer(value)
    return model


@pytest.fixture
def model(tmp_path: Any) -> ir.Model:
    """As a file with shapes: what a search starts from."""
    path = tmp_path / "model.onnx"
    found = language_model()
    import onnx_ir.passes.common as common_passes

    common_passes.ShapeInferencePass()(found)
    save_graph(found, path, external_data="model.onnx_data")
    return load_graph(path)


@pytest.fixture
def samples() -> TrialInputs:
    rng = np.random.default_rng(1)

    def batch(rows: int) -> dict[str, NDArray[np.int64]]:
        ids = rng.integers(0, WORDS, (rows, 24))
        return {"input_ids": ids, "attention_mask": np.ones_like(ids)}

    return TrialInputs([batch(8), batch(8)], [batch(3), batch(2)])


@pytest.fixture
def formats() -> list[Format]:
    return [
        Format("table", (PassSpec("quantize-embedding", {"bits": 4, "block_size": 32, "min_rows": 8}),)),
        Format("int8", (PassSpec("quantize-dynamic", {"weight_type": "uint8"}),)),
        Format("8 bits", (PassSpec("quantize-blocks", {"bits": 8, "block_size": 32}),)),
        Format("4 bits", (PassSpec("quantize-blocks", {"bits": 4, "block_size": 32, "zero_points": "integer"}),)),
    ]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """`exported("llama")`, `exported("t5", "decoder_model")`: tiny graphs of our exporter."""
    from onnxpress.artifact.artifact import Source
    from onnxpress.exporter import architectures
    from onnxpress.exporter.export import export
    from onnxpress.exporter.sources.checkpoint import load_folder

    @cache
    def graphs(name: str) -> dict[str, ir.Model]:
        folder = tmp_path_factory.mktemp(name)
        architectures.tiny_model(name, folder)
        task = architectures.catalog()[name]["task"]
        return dict(export(load_folder(folder, Source(name, "huggingface-folder")), task=task, remember=False).graphs)

    return lambda name, stem="model": copy_graph(graphs(name)[stem])


def samples_of(model: ir.Model) -> TrialInputs:
    rng = np.random.default_rng(3)
    names = {value.name for value in model.graph.inputs}

    def batch(rows: int, length: int) -> dict[str, NDArray[Any]]:
        ids = rng.integers(3, 60, (rows, length))
        found = {
            "input_ids": ids,
            "attention_mask": np.ones_like(ids),
            "decoder_attention_mask": np.ones_like(ids),
            "position_ids": np.broadcast_to(np.arange(length), ids.shape).copy(),
            "token_type_ids": np.zeros_like(ids),
            "encoder_hidden_states": rng.standard_normal((rows, 7, 64)).astype(np.float32),
            "encoder_attention_mask": np.ones((rows, 7), np.int64),
        }
        return {name: array for name, array in found.items() if name in names}

    return TrialInputs([batch(6, 20), batch(6, 16)], [batch(3, 18), batch(2, 12)])


def outputs(model: ir.Model, samples: TrialInputs) -> list[dict[str, NDArray[Any]]]:
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    names = [node.name for node in session.get_outputs()]
    found = []
    for sample in samples.judge:
        feeds = {}
        for node in session.get_inputs():
            empty = [len(sample["input_ids"]), *(size if isinstance(size, int) else 0 for size in node.shape[1:])]
            feeds[node.name] = sample.get(node.name, np.zeros(empty, np.float32))
        found.append(dict(zip(names, session.run(names, feeds), strict=True)))
    return found


def lost(model: ir.Model, changed: ir.Model, samples: TrialInputs) -> float:
    """KL, or 1 − cosine, of the samples that judge."""
    losses = []
    for before, after in zip(outputs(model, samples), outputs(changed, samples), strict=True):
        if "logits" in before:
            divergence, words = Divergence(), before["logits"].shape[-1]
            divergence.add(before["logits"].reshape(-1, words), after["logits"].reshape(-1, words))
            losses.append(divergence.kl)
        else:
            losses.append(float(1 - cosine(pool(before), pool(after)).mean()))
    return float(np.mean(losses))

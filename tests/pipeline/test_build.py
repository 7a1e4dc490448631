"""From a checkpoint to an artifact and onwards, through the command line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from onnxpress.artifact import manifest
from onnxpress.artifact.folder import read_artifact
from onnxpress.cli import main

from .conftest import Run, snapshot


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path, profile: Path) -> Path:
    folder = tmp_path_factory.mktemp("artifact") / "tiny"
    assert main(["build", str(checkpoint), "-o", str(folder), "-p", str(profile)]) == 0
    return folder


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory, mlp: Path, profile: Path) -> Path:
    """An artifact of the graph that needs no torch."""
    folder = tmp_path_factory.mktemp("small") / "mlp"
    assert main(["build", str(mlp), "-o", str(folder), "-p", str(profile), "--no-benchmark"]) == 0
    return folder


def test_the_folder_holds_what_clients_look_for(artifact: Path) -> None:
    names = set(snapshot(artifact))
    assert {
        "artifact.json",
        "onnx/model_quantized.onnx",
        "config.json",
        "generation_config.json",
        "genai_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "golden/golden.json",
        "README.md",
    } <= names
    assert list(artifact.parent.iterdir()) == [artifact]
    config = json.loads((artifact / "config.json").read_text())
    assert config["model_type"] == "llama"
    assert config["transformers.js_config"] == {"dtype": "q8"}


def test_the_manifest_says_how_it_was_made(artifact: Path) -> None:
    record = manifest.read(artifact)
    assert [step.name for step in record.steps] == [
        "export",
        "clean-up",
        "pack-projections",
        "quantize-blocks",
        "last-logits",
    ]
    export, _, packed, blocks, last = record.steps
    assert export.metrics["max_difference"] < 1e-4, "against torch"
    assert packed.metrics["max_difference"] < 1e-4, "exact"
    assert sum(blocks.matched.values()) >= 3 * 4 + 1
    assert 0 < blocks.metrics["kl"] < 1e-2
    assert last.metrics["max_difference"] < 0.1
    assert blocks.options == {"bits": 8, "block_size": 32}
    assert record.recipe is not None
    assert record.recipe["pass"][2] == {"name": "quantize-blocks", "bits": 8, "block_size": 32}
    assert record.metrics["size_bytes"] < 0.6 * record.before["size_bytes"]
    for key in ("kl", "top1_agreement", "perplexity", "loss", "decode_ms_per_token", "peak_rss_bytes"):
        assert key in record.metrics
    assert {"kl_prefill", "kl_decode", "kl_padded"} <= record.metrics.keys()
    assert record.source.kind == "huggingface-folder"
    assert record.versions["onnxruntime"] == onnxruntime.__version__
    assert set(record.files) == set(snapshot(artifact)) - {"artifact.json"}


def test_onnxruntime_runs_it_as_it_is(artifact: Path) -> None:
    session = onnxruntime.InferenceSession(artifact / "onnx" / "model_quantized.onnx")
    feeds = {
        value.name: np.zeros((2, 2, 0, 16), np.float32)
        for value in session.get_inputs()
        if value.name.startswith("past")
    }
    ids = np.array([[5, 6, 7], [8, 9, 10]], np.int64)
    logits = session.run(["logits"], {**feeds, "input_ids": ids, "attention_mask": np.ones_like(ids)})[0]
    assert logits.shape == (2, 1, 260)
    assert np.isfinite(logits).all()


def test_verify_passes_and_says_so(artifact: Path, run: Run) -> None:
    found = run("verify", artifact, "--json")
    assert found.code == 0
    assert found.json["max_difference"] == 0


@pytest.mark.parametrize("name", ["onnx/model_quantized.onnx", "tokenizer.json", "golden/golden.json"])
@pytest.mark.parametrize("damage", ["changed", "missing"])
def test_verify_notices_damage(artifact: Path, run: Run, tmp_path: Path, name: str, damage: str) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(artifact, copy)
    if damage == "missing":
        (copy / name).unlink()
    else:
        content = bytearray((copy / name).read_bytes())
        content[len(content) // 2] ^= 1
        (copy / name).write_bytes(content)
    found = run("verify", copy)
    assert found.code == 5
    assert name in found.stderr
    assert found.stderr.count("\n") == 1


def test_verify_notices_a_file_that_does_not_belong(small: Path, run: Run, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(small, tmp_path / "copy")
    (tmp_path / "copy" / "onnx" / "model_q4.onnx").write_bytes(b"")
    assert run("verify", tmp_path / "copy").code == 5


def test_evaluate_against_the_checkpoint_it_names(artifact: Path, run: Run) -> None:
    found = run("evaluate", artifact, "--json")
    assert found.code == 0, found.stderr
    assert found.json["kl"] < 1e-2
    assert found.json["top1_agreement"] > 0.8
    assert {"perplexity", "reference_perplexity", "modes", "loss"} <= found.json.keys()


def test_a_checkpoint_is_not_benchmarked(checkpoint: Path, run: Run) -> None:
    outcome = run("benchmark", checkpoint)
    assert outcome.code == 2
    assert "onnxpress build" in outcome.stderr


def test_benchmark(artifact: Path, run: Run) -> None:
    found = run("benchmark", artifact, "--json")
    assert found.code == 0, found.stderr
    assert {
        "prefill_tokens_per_s",
        "decode_ms_per_token",
        "peak_rss_bytes",
        "load_s",
        "size_bytes",
    } <= found.json.keys()


def test_run_writes_text(artifact: Path, run: Run) -> None:
    found = run("run", artifact, "hello", "--max-tokens", 5, "--json")
    assert found.code == 0, found.stderr
    assert found.json["prompt"] == "hello"
    assert found.json["pieces"] <= 5
    assert run("run", artifact, "hello", "--max-tokens", 5).code == 0


def test_inspect(artifact: Path, profile: Path, run: Run) -> None:
    found = run("inspect", artifact, "-p", profile, "--json").json
    (graph,) = found["graphs"].values()
    assert [layer["name"] for layer in graph["layers"]][:4] != []
    assert found["warnings"] == []
    assert "layer 2" in run("inspect", artifact, "-p", profile).stdout


def test_building_again_gives_the_same_graph(artifact: Path, checkpoint: Path, profile: Path, tmp_path: Path) -> None:
    main(["build", str(checkpoint), "-o", str(tmp_path / "again"), "-p", str(profile), "--no-benchmark"])
    name = "onnx/model_quantized.onnx"
    assert manifest.read(tmp_path / "again").files[name] == manifest.read(artifact).files[name]


def test_an_artifact_is_loaded_as_it_was_written(artifact: Path) -> None:
    found = read_artifact(artifact)
    assert found.task == "text-generation"
    assert set(found.graphs) == {"model"}
    assert "transformers.js_config" not in found.config
    assert {"tokenizer.json", "chat_template.jinja", "generation_config.json"} <= set(found.files)
    assert not {"artifact.json", "config.json", "README.md", "genai_config.json"} & set(found.files)
    assert found.history[0].name == "export"


def test_export_then_optimize(checkpoint: Path, profile: Path, tmp_path: Path, run: Run) -> None:
    found = run("export", checkpoint, "-o", tmp_path / "fp32", "--json")
    assert found.code == 0, found.stderr
    assert found.json["recipe"] is None
    assert (tmp_path / "fp32" / "onnx" / "model.onnx").is_file()
    found = run(
        "optimize",
        tmp_path / "fp32",
        "-o",
        tmp_path / "small",
        "--pass",
        "quantize-blocks:bits=4,block_size=32",
        "-p",
        profile,
        "--no-benchmark",
        "--json",
    )
    assert found.code == 0, found.stderr
    assert [step["name"] for step in found.json["steps"]] == ["export", "quantize-blocks"]
    assert (tmp_path / "small" / "onnx" / "model_q4.onnx").is_file()
    assert found.json["steps"][1]["metrics"]["kl"] > 0


def test_a_foreign_graph(small: Path, mlp: Path) -> None:
    record = manifest.read(small)
    assert record.export["method"] == "foreign"
    assert [step.name for step in record.steps] == ["clean-up", "pack-projections", "quantize-blocks"]
    assert 0.99 < record.metrics["cosine_min"] <= 1
    assert record.source.name == str(mlp)


def test_with_json_there_is_nothing_else_on_stdout(mlp: Path, profile: Path, tmp_path: Path, run: Run) -> None:
    found = run("build", mlp, "-o", tmp_path / "out", "-p", profile, "--no-benchmark", "--json")
    assert found.json["path"] == str(tmp_path / "out")
    assert found.json["schema_version"] == 1
    assert found.stderr == ""


def test_a_failed_gate_leaves_the_artifact_that_was_there(
    small: Path, mlp: Path, profile: Path, recipe: Path, tmp_path: Path, run: Run
) -> None:
    import shutil

    shutil.copytree(small, tmp_path / "out")
    before = snapshot(tmp_path / "out")
    options = ["-p", profile, "-r", recipe, "--no-benchmark", "--max-size", "1kB", "--max-loss", "50%"]
    found = run("build", mlp, "-o", tmp_path / "out", *options)
    assert found.code == 4
    assert "size 0.0 MB > 0.0 MB" in found.stderr or "size" in found.stderr
    assert "quantize-blocks" in found.stderr
    assert found.stderr.count("\n") == 1
    assert snapshot(tmp_path / "out") == before
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


@pytest.mark.parametrize(
    ("gate", "value"), [("--max-loss", "0.000001%"), ("--max-latency", "1us"), ("--max-memory", "1MB")]
)
def test_each_gate_can_fail(
    mlp: Path, profile: Path, recipe: Path, tmp_path: Path, run: Run, gate: str, value: str
) -> None:
    options = ["-p", profile, "-r", recipe, "--no-benchmark", gate, value]
    found = run("build", mlp, "-o", tmp_path / "out", *options)
    assert found.code == 4
    assert found.stderr.startswith("error: gate failed: ")
    assert list(tmp_path.iterdir()) == []


def test_gates_that_hold_are_recorded(mlp: Path, profile: Path, recipe: Path, tmp_path: Path, run: Run) -> None:
    gates = ["-r", recipe, "--max-loss", "5%", "--max-size", "1MB", "--max-latency", "1s", "--max-memory", "2GB"]
    found = run("build", mlp, "-o", tmp_path / "out", "-p", profile, *gates, "--json")
    assert found.code == 0, found.stderr
    assert {gate["name"]: gate["passed"] for gate in found.json["gates"]} == {
        "max_loss": True,
        "max_size_bytes": True,
        "max_latency_ms": True,
        "max_memory_bytes": True,
    }


def test_a_pass_that_finds_nothing_is_an_error_unless_optional(
    mlp: Path, profile: Path, tmp_path: Path, run: Run
) -> None:
    options = ["-p", profile, "--no-benchmark", "-o", tmp_path / "out"]
    found = run("optimize", mlp, *options, "--pass", "quantize-embedding")
    assert found.code == 5
    assert found.stderr.startswith("error: quantize-embedding found nothing to do")
    assert list(tmp_path.iterdir()) == []
    assert run("optimize", mlp, *options, "--pass", "quantize-embedding:optional=true").code == 0


def test_weights_as_the_checkpoint_stores_them_give_the_same_artifact(
    run: Run, checkpoint: Path, profile: Path, recipe: Path, tmp_path: Path
) -> None:
    """With a recipe that quantizes every matrix; others would keep two bytes for those that they leave alone."""
    import torch
    from transformers import AutoModelForCausalLM

    brain = tmp_path / "brain"
    shutil.copytree(checkpoint, brain)
    AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16).save_pretrained(brain)
    built, exported, again = (tmp_path / name for name in ("built", "exported", "again"))
    every = tmp_path / "every.toml"
    embedding = '[[pass]]\nname = "quantize-embedding"\nbits = 8\nblock_size = 32\nmin_rows = 1\n'
    every.write_text(recipe.read_text() + embedding)
    options = ["-p", profile, "-r", every, "--no-benchmark"]
    assert run("build", brain, "-o", built, "--logits", "all", *options).code == 0
    assert run("export", brain, "-o", exported, "--dtype", "auto").code == 0
    assert run("optimize", exported, "-o", again, *options).code == 0
    assert (again / "onnx/model_quantized.onnx").read_bytes() == (built / "onnx/model_quantized.onnx").read_bytes()

    (step,) = manifest.read(exported).steps
    assert step.options == {"dtype": "auto"}
    assert step.metrics["max_difference"] < 1e-4, "the bytes are the checkpoint's: exact"
    half = (brain / "model.safetensors").stat().st_size
    assert (exported / "onnx/model.onnx").stat().st_size < 1.2 * half + 60_000, "weights take two bytes each"
    found = run("inspect", exported, "--json").json["graphs"]["model.onnx"]
    assert found["formats"]["bf16"]["parameters"] > 20 * found["formats"]["fp32"]["parameters"]
    failed = run("export", exported, "-o", tmp_path / "no", "--dtype", "auto")
    assert failed.code == 2
    assert "ONNX already" in failed.stderr


def test_calibration_with_a_text(run: Run, checkpoint: Path, profile: Path, tmp_path: Path) -> None:
    """GPTQ on a text of the user's: what each weight lost is recorded, and nothing stays in the cache."""
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 20)
    (tmp_path / "gptq.toml").write_text(
        'name = "gptq"\n[[pass]]\nname = "quantize-blocks"\nbits = 4\nblock_size = 32\nmethod = "gptq"\n'
    )
    options = ["-p", profile, "-r", tmp_path / "gptq.toml", "--no-benchmark", "-o", tmp_path / "artifact", "--json"]
    calibration = ["--calibration", tmp_path / "text.txt", "--calibration-length", "64"]
    outcome = run("build", checkpoint, *options, *calibration)
    assert outcome.code == 0, outcome.stderr
    (step,) = [step for step in outcome.json["steps"] if step["name"] == "quantize-blocks"]
    assert len(step["errors"]) == sum(count for name, count in step["matched"].items() if name.startswith("MatMul"))
    assert all(0 < error < 0.2 for error in step["errors"].values())
    short = run("build", checkpoint, *options, *calibration, "--calibration-samples", "2")
    assert short.code == 3
    assert "needs at least 256" in short.stderr

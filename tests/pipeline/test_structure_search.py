"""Parameters and sizes in, cuts and formats out: the search over structure from the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onnxpress.building.measuring import Meter
from onnxpress.errors import DestroyedError

from .conftest import Run
from .test_search import to_toml

CUTS = """
name = "cuts"
[[pass]]
name = "clean-up"
optional = true
[[cut]]
name = "three quarters"
pass = "prune-ffn"
ratio = 0.75
[[cut]]
name = "half"
pass = "prune-ffn"
ratio = 0.5
[[cut]]
name = "removed"
pass = "reduce-depth"
drop = 1
"""
FORMATS = """
[[format]]
name = "table"
pass = "quantize-embedding"
block_size = 32
min_rows = 64
[[format]]
name = "8 bits"
pass = "quantize-blocks"
bits = 8
block_size = 32
[[format]]
name = "4 bits"
pass = "quantize-blocks"
bits = 4
block_size = 32
zero_points = "integer"
"""
DATA = ["--calibration-samples", 6, "--calibration-length", 32, "--threads", "1", "--no-benchmark", "--json"]
FFN = 3 * 64 * 128
"""Parameters of a feed-forward network."""
BLOCK = FFN + 2 * 64 * 64 + 2 * 64 * 32
"""Of a block."""


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONNXPRESS_CACHE", str(tmp_path_factory.getbasetemp() / "structure-cache"))


@pytest.fixture(scope="module")
def cuts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "cuts.toml"
    path.write_text(CUTS + FORMATS)
    return path


@pytest.fixture
def build(run: Run, plain: Path, checkpoint: Path, tmp_path: Path) -> Any:
    """`build("name", recipe, "--max-parameters", "80%")`: the manifest, or what the command said."""

    def call(name: str, recipe: Path, *limits: object, model: Path = checkpoint) -> Any:
        found = run("build", model, "-p", plain, "-r", recipe, "-o", tmp_path / name, *DATA, *limits)
        if found.code:
            print(found.stderr)
        return found.json if found.code == 0 else found

    return call


def step(record: Any, name: str) -> Any:
    return next(step for step in record["steps"] if step["name"] == name)


def parameters(record: Any) -> int:
    return int(record["export"]["structure"]["after"]["parameters"])


def test_a_share_of_the_parameters_is_kept_in_float(build: Any, cuts: Path) -> None:
    record = build("out", cuts, "--max-parameters", "80%")
    before = record["export"]["structure"]["before"]["parameters"]
    assert before * 0.6 < parameters(record) == record["metrics"]["parameters"] <= 0.8 * before
    assert [gate["name"] for gate in record["gates"] if gate["passed"]] == ["max_parameters"]
    assert {one["name"] for one in record["steps"]} <= {
        "export",
        "clean-up",
        "prune-ffn",
        "reduce-depth",
        "search",
        "last-logits",
    }
    layers = record["export"]["structure"]["after"]["stacks"]["model.layers"]
    assert sum(step(record, "search")["matched"].values()) >= 1
    config = json.loads((Path(record["path"]) / "config.json").read_text())
    assert config["num_hidden_layers"] == len(layers)


def test_less_is_lost_than_by_cutting_every_layer_alike(build: Any, cuts: Path, tmp_path: Path) -> None:
    """The same number of parameters taken from all layers alike."""
    uniform = tmp_path / "uniform.toml"
    uniform.write_text('[[pass]]\nname = "prune-ffn"\nratio = 0.75')
    alike = build("alike", uniform)
    searched = build("searched", cuts, "--max-parameters", str(parameters(alike)))
    assert parameters(searched) <= parameters(alike)
    assert searched["metrics"]["kl"] <= 1.02 * alike["metrics"]["kl"], "uniform is one of the choices"


def test_what_was_found_is_a_recipe_that_builds_the_same(build: Any, cuts: Path, tmp_path: Path) -> None:
    first = build("first", cuts, "--max-parameters", "60%", "--max-size", "20%")
    assert first["metrics"]["size_bytes"] <= 0.2 * first["before"]["size_bytes"]
    names = [one["name"] for one in first["steps"]]
    assert names.index("quantize-blocks") > max(
        names.index(one) for one in names if one in ("prune-ffn", "reduce-depth")
    )
    recipe = first["recipe"]
    assert not recipe.keys() & {"cut", "format"}
    path = tmp_path / "found.toml"
    path.write_text(to_toml(recipe))
    second = build("second", path)
    for name, entry in first["files"].items():
        if name.startswith("onnx/"):
            assert second["files"][name] == entry, name


def test_a_size_can_be_met_by_bits_and_cuts_where_bits_do_not_do(build: Any, cuts: Path) -> None:
    """A tenth of the size: 4 bits everywhere leave an eighth and more."""
    record = build("out", cuts, "--max-size", "16%")
    assert record["metrics"]["size_bytes"] <= 0.16 * record["before"]["size_bytes"]
    assert parameters(record) < record["export"]["structure"]["before"]["parameters"]
    assert step(record, "search")["matched"]["4 bits"] >= 1


def test_heads_are_cut_where_channels_do_not_do(build: Any, tmp_path: Path) -> None:
    """Half of the query heads of two layers and half of all channels: fewer cuts leave too many parameters."""
    path = tmp_path / "heads.toml"
    heads = '[[cut]]\nname = "heads"\npass = "reduce-heads"\nratio = 0.5\n'
    path.write_text(CUTS.split('[[cut]]\nname = "removed"')[0] + heads)
    record = build("out", path, "--max-parameters", "70%")
    assert step(record, "search")["matched"] == {"half": 3, "heads": 2}
    layers = record["export"]["structure"]["after"]["stacks"]["model.layers"]
    assert sorted(layer["attentions"][0]["heads"] for layer in layers) == [2, 2, 4]
    assert {layer["width"] for layer in layers} == {64}
    assert record["export"]["structure"]["onnx_only"] == ["layers differ in attention heads: 2, 4"]


def test_importance_keeps_what_it_names_whole(build: Any, cuts: Path, tmp_path: Path) -> None:
    weighed = {}
    for layer in range(3):
        path = tmp_path / f"weighed{layer}.toml"
        path.write_text(cuts.read_text() + f'\n[importance]\n"model.layers.{layer}.*" = 1e4\n')
        record = build(f"out{layer}", path, "--max-parameters", "85%")
        before, after = (record["export"]["structure"][key]["stacks"]["model.layers"] for key in ("before", "after"))
        weighed[layer] = [one["origin"] for one in after if one == before[one["origin"]]]
    assert all(layer in whole for layer, whole in weighed.items())


def test_what_cannot_be_met_is_refused_and_says_what_can(build: Any, cuts: Path, tmp_path: Path) -> None:
    (tmp_path / "ffn.toml").write_text(CUTS.split('[[cut]]\nname = "removed"')[0])
    found = build("out", tmp_path / "ffn.toml", "--max-parameters", "10%")
    assert found.code == 4
    assert "no mix of formats and cuts meets the limits" in found.stderr
    total = 260 * 64 * 2 + 3 * BLOCK + 7 * 64
    assert f"possible would be: {total - 3 * FFN // 2:,} parameters" in found.stderr
    assert not (tmp_path / "out").exists()


def test_a_mix_that_destroys_the_model_is_no_answer(
    build: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def destroyed(*_: Any, **__: Any) -> Any:
        raise DestroyedError("reduce-depth destroyed the model: KL 9")

    monkeypatch.setattr(Meter, "check_step", destroyed)
    path = tmp_path / "bare.toml"
    path.write_text("[[cut]]" + CUTS.partition("[[cut]]")[2])
    found = build("out", path, "--max-parameters", "80%")
    assert found.code == 4
    assert "nothing works any more" in found.stderr
    assert "KL 9" in found.stderr


def test_an_encoder_decoder_is_cut_in_all_its_graphs(build: Any, cuts: Path, tmp_path: Path) -> None:
    import torch
    import transformers

    sizes = {"vocab_size": 128, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_heads": 4, "decoder_start_token_id": 0}
    config = transformers.T5Config(**sizes, num_layers=2, num_decoder_layers=2)
    torch.manual_seed(0)
    transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path / "t5")
    recipe = tmp_path / "ffn.toml"
    recipe.write_text(CUTS.split('[[cut]]\nname = "removed"')[0])
    record = build("out", recipe, "--max-parameters", "90%", model=tmp_path / "t5")
    names = {name for one in record["steps"] for name in one["options"].get("include", [])}
    assert names
    stacks = record["export"]["structure"]["after"]["stacks"]
    widths = [layer["width"] for layers in stacks.values() for layer in layers]
    assert min(widths) < 128
    assert parameters(record) <= 0.9 * record["export"]["structure"]["before"]["parameters"]


def test_sensitivity_of_structure_is_printed_and_drawn(
    run: Run, plain: Path, cuts: Path, checkpoint: Path, tmp_path: Path
) -> None:
    recipe = tmp_path / "cuts.toml"
    recipe.write_text(CUTS)
    options = ["-p", plain, "-r", recipe, *DATA[:4], "--threads", "1"]
    found = run("sensitivity", checkpoint, *options, "--plot", tmp_path / "map.svg", "--json")
    assert found.code == 0, found.stderr
    rows = {(row["unit"], row["format"]): row for row in found.json["blocks"]}
    assert len(rows) == 9
    for layer in range(3):
        some, half, whole = (rows[f"model.layers.{layer}", cut] for cut in ("three quarters", "half", "removed"))
        assert 0 < some["loss"] < half["loss"] < whole["loss"]
        assert [one["parameters_removed"] for one in (some, half, whole)] == [FFN // 4, FFN // 2, BLOCK]
    picture = (tmp_path / "map.svg").read_text()
    assert picture.count("<title>") == 9
    shown = run("sensitivity", checkpoint, *options)
    assert "model.layers.2" in shown.stdout
    assert "three quarters" in shown.stdout


def test_heads_have_a_map_of_their_own(run: Run, plain: Path, checkpoint: Path, tmp_path: Path) -> None:
    options = ["-p", plain, *DATA[:4], "--threads", "1", "--heads"]
    found = run("sensitivity", checkpoint, *options, "--plot", tmp_path / "map.svg", "--json")
    assert found.code == 0, found.stderr
    assert [row["unit"] for row in found.json["heads"]] == [
        f"model.layers.{layer}.self_attn.o_proj" for layer in range(3)
    ]
    assert all(len(row["losses"]) == 4 and min(row["losses"]) > 0 for row in found.json["heads"])
    assert "blocks" not in found.json
    assert (tmp_path / "map.svg").read_text().count("<title>") == 12
    least = np.argsort(found.json["heads"][1]["losses"])
    shown = run("sensitivity", checkpoint, *options).stdout
    assert " ".join(map(str, least)) in next(line for line in shown.splitlines() if "layers.1." in line)
    found = run("sensitivity", checkpoint, *options, "-r", "budget")
    assert found.code == 2
    assert "--heads are without a recipe" in found.stderr


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ('[[cut]]\nname = "x"', "cut x names no pass"),
        ('[[cut]]\npass = "prune-ffn"', "every cut is a [[cut]] table"),
        ('[[cut]]\nname = "x"\npass = "prune-ffn"\nratioo = 1', "ratio"),
        ('[[cut]]\nname = "x"\npass = "reduce-depth"\ndrop = 2', "removes single blocks"),
        ('[[pass]]\nname = "pack-projections"\n' + CUTS[15:], "before anything is cut"),
        ('[[cut]]\nname = "x"\npass = "prune-ffn"\nratio = 1.0', "none of the cuts x fits any block"),
    ],
)
def test_cuts_that_make_no_sense_are_refused(build: Any, tmp_path: Path, text: str, word: str) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    found = build("out", path, "--max-parameters", "90%")
    assert found.code in (2, 3)
    assert word in found.stderr
    assert found.stderr.count("\n") == 1


def test_a_target_needs_a_search_and_one_limit_of_size(run: Run, checkpoint: Path, plain: Path, tmp_path: Path) -> None:
    common = ["build", checkpoint, "-p", plain, "-o", tmp_path / "out"]
    for word, options in (
        ("exclude each other", ["--target-size", "50%", "--max-size", "1MB"]),
        ("nothing is searched", ["--target-size", "50%", "-r", "fp32"]),
        ("is not a number such as 100M or 80%", ["--max-parameters", "many"]),
    ):
        found = run(*common, *options)
        assert found.code == 2, found.stderr
        assert word in found.stderr


def test_parameters_are_a_gate_of_any_build(build: Any, tmp_path: Path) -> None:
    recipe = tmp_path / "ffn.toml"
    recipe.write_text('[[pass]]\nname = "prune-ffn"\nratio = 0.5\nmethod = "l2"\nrefit = false')
    assert build("kept", recipe, "--max-parameters", "80%")["gates"][0]["passed"]
    found = build("missed", recipe, "--max-parameters", "50%")
    assert found.code == 4
    assert "gate failed: parameters" in found.stderr
    assert np.char.count(found.stderr, "MB") == 0

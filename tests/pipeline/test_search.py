"""Limits in, formats out: the budgeted search from the command line, on models of several families."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onnxpress.search.kernels import KernelTable

from .conftest import Run

FORMATS = """
name = "quick"
[[pass]]
name = "clean-up"
optional = true
[[pass]]
name = "pack-projections"
optional = true
[[format]]
name = "table"
pass = "quantize-embedding"
block_size = 32
min_rows = 64
[[format]]
name = "int8"
pass = "quantize-dynamic"
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


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONNXPRESS_CACHE", str(tmp_path_factory.getbasetemp() / "search-cache"))


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "quick.toml"
    path.write_text(FORMATS)
    return path


def chosen(record: dict[str, Any]) -> dict[str, int]:
    (step,) = [step for step in record["steps"] if step["name"] == "search"]
    return dict(step["matched"])


@pytest.mark.slow
def test_a_limit_without_a_recipe_is_searched_for(checkpoint: Path, plain: Path, tmp_path: Path, run: Run) -> None:
    found = run(
        "build",
        checkpoint,
        "-p",
        plain,
        "-o",
        tmp_path / "out",
        "--no-benchmark",
        "--threads",
        "1",
        "--max-loss",
        "2%",
        "--json",
    )
    assert found.code == 0, found.stderr
    record = found.json
    assert record["metrics"]["loss"] <= 0.02
    assert record["metrics"]["size_bytes"] < 0.5 * record["before"]["size_bytes"]
    assert sum(chosen(record).values()) == 3 * 4 + 2, "query-key-value, o, gate-up and down of each layer, table, head"
    assert all(gate["passed"] for gate in record["gates"])


def test_the_looser_the_limit_the_smaller(checkpoint: Path, plain: Path, quick: Path, tmp_path: Path, run: Run) -> None:
    options = ["-p", plain, "-r", quick, "--threads", "1", "--json"]
    rows = run("sensitivity", checkpoint, *options).json["units"]
    units = {row["unit"] for row in rows}
    most = sum(max(row["loss"] for row in rows if row["unit"] == unit) for unit in units)
    sizes = []
    for share in (0.02, 0.3, 30):
        loss, out = share * most, tmp_path / f"out{share}"
        found = run("build", checkpoint, *options, "--no-benchmark", "-o", out, "--max-loss", f"{loss:.12f}")
        assert found.code == 0, found.stderr
        assert found.json["metrics"]["loss"] <= loss
        sizes.append(found.json["metrics"]["size_bytes"])
    assert sizes[0] > sizes[1] > sizes[2]


def test_a_size_is_kept_with_the_least_loss(
    checkpoint: Path, plain: Path, quick: Path, tmp_path: Path, run: Run
) -> None:
    options = ["-p", plain, "-r", quick, "--no-benchmark", "--threads", "1", "--json"]
    losses = []
    for size in (140_000, 240_000):
        found = run("build", checkpoint, *options, "-o", tmp_path / f"out{size}", "--max-size", f"{size}B")
        assert found.code == 0, found.stderr
        assert found.json["metrics"]["size_bytes"] <= size
        losses.append(found.json["metrics"]["kl"])
    assert losses[0] > losses[1]


def test_what_cannot_be_met_is_refused_and_says_what_can(
    checkpoint: Path, plain: Path, quick: Path, tmp_path: Path, run: Run
) -> None:
    limits = ["--max-size", "10kB", "--max-loss", "1%"]
    found = run("build", checkpoint, "-p", plain, "-r", quick, "-o", tmp_path / "out", *limits)
    assert found.code == 4
    assert found.stderr.startswith("error: gate failed: no mix of formats meets the limits")
    assert "possible would be" in found.stderr
    assert list(tmp_path.iterdir()) == []


def test_what_was_found_is_a_recipe_that_builds_the_same(
    checkpoint: Path, plain: Path, quick: Path, tmp_path: Path, run: Run
) -> None:
    options = ["-p", plain, "--no-benchmark", "--threads", "1", "--json"]
    first = run("build", checkpoint, *options, "-r", quick, "-o", tmp_path / "first", "--max-loss", "0.5%")
    assert first.code == 0, first.stderr
    recipe = first.json["recipe"]
    assert "format" not in recipe
    path = tmp_path / "found.toml"
    path.write_text(to_toml(recipe))
    second = run("build", checkpoint, *options, "-r", path, "-o", tmp_path / "second")
    assert second.code == 0, second.stderr
    for name, entry in first.json["files"].items():
        if name.startswith("onnx/"):
            assert second.json["files"][name] == entry, name


def test_importance_keeps_what_it_names_in_better_formats(
    checkpoint: Path, plain: Path, quick: Path, tmp_path: Path, run: Run
) -> None:
    weighed = tmp_path / "weighed.toml"
    weighed.write_text(quick.read_text() + '\n[importance]\n"model.layers.0.*" = 1e4\n')
    size = ["--max-size", "170kB"]
    bits = []
    for recipe in (quick, weighed):
        out = tmp_path / recipe.stem
        found = run(
            "build",
            checkpoint,
            "-p",
            plain,
            "-r",
            recipe,
            "-o",
            out,
            "--no-benchmark",
            "--threads",
            "1",
            "--json",
            *size,
        )
        assert found.code == 0, found.stderr
        four = [s["options"]["include"] for s in found.json["steps"] if s["options"].get("bits") == 4]
        bits.append([name for names in four for name in names if name.startswith("model.layers.0.")])
    assert bits[0]
    assert bits[1] == []


def test_an_encoder_decoder_is_searched_in_all_its_graphs(plain: Path, quick: Path, tmp_path: Path, run: Run) -> None:
    import torch
    import transformers

    config = transformers.T5Config(
        vocab_size=128,
        d_model=64,
        d_kv=16,
        d_ff=128,
        num_layers=2,
        num_decoder_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
    )
    torch.manual_seed(0)
    transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path / "t5")
    found = run(
        "build",
        tmp_path / "t5",
        "-p",
        plain,
        "-r",
        quick,
        "-o",
        tmp_path / "out",
        "--no-benchmark",
        "--threads",
        "1",
        "--json",
        "--max-loss",
        "1%",
    )
    assert found.code == 0, found.stderr
    assert found.json["metrics"]["loss"] <= 0.01
    assert found.json["metrics"]["size_bytes"] < 0.7 * found.json["before"]["size_bytes"], "its nodes weigh, too"
    names = {name for step in found.json["steps"] for name in step["options"].get("include", [])}
    assert any(name.startswith("encoder.") for name in names)
    assert any(name.startswith("decoder.") for name in names)


def test_another_devices_kernels_decide(checkpoint: Path, plain: Path, quick: Path, tmp_path: Path, run: Run) -> None:
    """A device on which 4 bits are quick and 8 bits are slow gets 4 bits, and the other way round."""
    measured = run("kernels", checkpoint, "-p", plain, "-r", quick, "-o", tmp_path / "here.json", "--threads", "1")
    assert measured.code == 0, measured.stderr
    table = json.loads((tmp_path / "here.json").read_text())
    shares = {}
    for quickest in ("bits=4", "bits=8"):
        other = KernelTable(**json.loads(json.dumps(table)))
        for kernel, shapes in other.microseconds.items():
            for times in shapes.values():
                times.update(dict.fromkeys(times, 1.0 if quickest in kernel else 1000.0))
        path = tmp_path / f"{quickest}.json"
        path.write_text(other.to_json())
        options = ["-p", plain, "-r", quick, "--no-benchmark", "--threads", "1", "--json", "-o", tmp_path / quickest]
        wishes = ["--kernel-table", path, "--minimize", "latency", "--max-loss", "80%"]
        found = run("build", checkpoint, *options, *wishes)
        assert found.code == 0, found.stderr
        shares[quickest] = chosen(found.json)
    assert shares["bits=4"]["4 bits"] > 12
    assert shares["bits=8"]["8 bits"] >= 12


def test_exact_passes_of_formats_come_before_anything_is_rounded(
    checkpoint: Path, plain: Path, tmp_path: Path, run: Run
) -> None:
    """Rotating after int8 would tip codes everywhere, and verification could not tell this from a mistake."""
    recipe = tmp_path / "rotated.toml"
    recipe.write_text(
        """
name = "rotated"
[[format]]
name = "int8"
pass = "quantize-dynamic"
exclude = ["*down_proj*"]
[[format]]
name = "rotated"
passes = [{ name = "rotate", exclude = ["*[!n]_proj*"] }, { name = "quantize-dynamic", activations = "per_token" }]
"""
    )
    options = ["-p", plain, "-r", recipe, "--no-benchmark", "--threads", "1", "--json", "-o", tmp_path / "out"]
    found = run("build", checkpoint, *options, "--max-loss", "80%", "--minimize", "size")
    assert found.code == 0, found.stderr
    assert chosen(found.json)["rotated"] == 3
    assert chosen(found.json)["int8"] >= 9
    assert [step["name"] for step in found.json["steps"]][1:4] == ["rotate", "quantize-dynamic", "quantize-dynamic"]


def test_sensitivity_prints_and_draws_the_map(
    checkpoint: Path, plain: Path, quick: Path, tmp_path: Path, run: Run
) -> None:
    options = ["-p", plain, "-r", quick, "--threads", "1"]
    found = run("sensitivity", checkpoint, *options, "--plot", tmp_path / "map.svg", "--json")
    assert found.code == 0, found.stderr
    rows = found.json["units"]
    units = {row["unit"] for row in rows}
    assert len(units) == 14
    finer = {(row["unit"], row["format"]): row["loss"] for row in rows}
    pairs = [(finer[u, "4 bits"], finer[u, "8 bits"]) for u in units if (u, "4 bits") in finer]
    assert pairs
    assert np.mean([four > eight for four, eight in pairs]) > 0.9
    picture = (tmp_path / "map.svg").read_text()
    assert picture.count("<title>") == sum(row["format"] != "float32" for row in rows)
    again = run("sensitivity", checkpoint, *options)
    assert again.code == 0
    assert "model.layers.0.self_attn.o_proj" in again.stdout.replace("\n", "") or "o_proj" in again.stdout


def test_sensitivity_of_a_recipe_without_formats_is_refused(checkpoint: Path, plain: Path, run: Run) -> None:
    found = run("sensitivity", checkpoint, "-p", plain, "-r", "fp32")
    assert found.code == 2
    assert "no formats to choose from" in found.stderr


def test_a_search_needs_a_limit_and_its_options_a_search(
    mlp: Path, plain: Path, quick: Path, tmp_path: Path, run: Run
) -> None:
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    common = ["build", mlp, "-p", plain, "-o", tmp_path / "out"]
    for code, word, options in (
        (2, "within limits", ["-r", quick]),
        (2, "nothing is searched", ["--minimize", "size"]),
        (2, "nothing is searched", ["-r", "fp32", "--minimize", "size", "--max-loss", "1%"]),
        (3, "no such kernel table", ["--max-loss", "1%", "--kernel-table", tmp_path / "none.json"]),
        (3, "no kernel table", ["--max-loss", "1%", "--kernel-table", broken]),
    ):
        found = run(*common, *options)
        assert found.code == code, found.stderr
        assert word in found.stderr
        assert found.stderr.count("\n") == 1
        assert list(tmp_path.iterdir()) == [broken]


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ('[[format]]\nname = "x"', "names no pass"),
        ('[[format]]\npass = "quantize-blocks"', r"every format is a [[format]] table"),
        ('[importance]\n"a*" = -1', "importance is a table of numbers"),
        ('[[format]]\nname = "x"\npass = "quantise-blocks"', "quantize-blocks"),
        ('[[after]]\nname = "clean-upp"', "clean-up"),
    ],
)
def test_a_recipe_that_makes_no_sense_is_refused(
    mlp: Path, plain: Path, tmp_path: Path, run: Run, text: str, word: str
) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    found = run("build", mlp, "-p", plain, "-r", path, "-o", tmp_path / "out", "--max-loss", "1%")
    assert found.code == 2
    assert word in found.stderr


def to_toml(recipe: dict[str, Any]) -> str:
    """A recipe as a manifest holds it, as a file."""
    lines = []
    for one in recipe["pass"]:
        lines.append("[[pass]]")
        lines += [f"{key} = {json.dumps(value)}" for key, value in one.items()]
    text = "\n".join(lines)
    tomllib.loads(text)
    return text

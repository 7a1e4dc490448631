"""Bad input and bad luck: one clear line, the right exit code, nothing half-written, the old artifact untouched."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from safetensors.numpy import save_file

from onnxpress.cli import main

from .conftest import Run, mlp_graph, snapshot

COMMAND = [sys.executable, "-c", "import sys; from onnxpress.cli import main; sys.exit(main())"]


@pytest.fixture(scope="module")
def existing(tmp_path_factory: pytest.TempPathFactory, mlp: Path, profile: Path) -> Path:
    """An artifact to be replaced, or rather not."""
    folder = tmp_path_factory.mktemp("existing") / "out"
    assert main(["build", str(mlp), "-o", str(folder), "-p", str(profile), "--no-benchmark"]) == 0
    return folder


@pytest.fixture
def place(existing: Path, tmp_path: Path) -> Iterator[Path]:
    """A folder holding nothing but the artifact `out`; checked to be the same in the end."""
    folder = tmp_path / "place"
    folder.mkdir()
    shutil.copytree(existing, folder / "out")
    before = snapshot(folder)
    yield folder
    assert snapshot(folder) == before, "the artifact was touched, or something was left behind"


def missing(folder: Path) -> str:
    return str(folder / "nothing")


def empty(folder: Path) -> str:
    return str(folder)


def config_only(folder: Path) -> str:
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}))
    return str(folder)


def broken_config(folder: Path) -> str:
    (folder / "config.json").write_text('{"model_type": ')
    (folder / "model.safetensors").write_bytes(b"")
    return str(folder)


def config_of_another_type(folder: Path) -> str:
    values = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": "big"}
    (folder / "config.json").write_text(json.dumps(values))
    save_file({"lm_head.weight": np.zeros((2, 2), np.float32)}, folder / "model.safetensors")
    return str(folder)


def truncated_onnx(folder: Path) -> str:
    content = mlp_graph().SerializeToString()
    (folder / "model.onnx").write_bytes(content[: len(content) // 2])
    return str(folder / "model.onnx")


def not_onnx(folder: Path) -> str:
    (folder / "model.onnx").write_bytes(b"this is not a graph" * 10)
    return str(folder / "model.onnx")


def empty_onnx(folder: Path) -> str:
    (folder / "model.onnx").write_bytes(b"")
    return str(folder / "model.onnx")


def data_outside(folder: Path) -> str:
    inside = folder / "model"
    inside.mkdir()
    (folder / "secret").write_bytes(b"\0" * 40000)
    (inside / "model.onnx").write_bytes(mlp_graph(external="../secret").SerializeToString())
    return str(inside / "model.onnx")


def data_behind_a_link(folder: Path) -> str:
    inside = folder / "model"
    inside.mkdir()
    (folder / "secret").write_bytes(b"\0" * 40000)
    (inside / "weights").symlink_to(folder / "secret")
    (inside / "model.onnx").write_bytes(mlp_graph(external="weights").SerializeToString())
    return str(inside / "model.onnx")


def data_missing(folder: Path) -> str:
    (folder / "model.onnx").write_bytes(mlp_graph(external="weights").SerializeToString())
    return str(folder / "model.onnx")


def data_truncated(folder: Path) -> str:
    (folder / "weights").write_bytes(b"\0" * 20000)
    return data_missing(folder)


def unknown_operator(folder: Path) -> str:
    model = mlp_graph()
    model.graph.node[1].op_type = "Sigmund"
    onnx.save(model, folder / "model.onnx")
    return str(folder / "model.onnx")


def a_text_file(folder: Path) -> str:
    (folder / "notes.txt").write_text("hello")
    return str(folder / "notes.txt")


def a_pickle(folder: Path) -> str:
    (folder / "model.pt").write_bytes(b"\x80\x04.")
    return str(folder / "model.pt")


SOURCES: list[Callable[[Path], str]] = [
    missing,
    empty,
    config_only,
    broken_config,
    config_of_another_type,
    truncated_onnx,
    not_onnx,
    empty_onnx,
    data_outside,
    data_behind_a_link,
    data_missing,
    data_truncated,
    unknown_operator,
    a_text_file,
    a_pickle,
]


@pytest.mark.parametrize("make", SOURCES, ids=lambda make: make.__name__)
def test_a_source_that_cannot_be_used(
    make: Callable[[Path], str], place: Path, profile: Path, tmp_path: Path, run: Run
) -> None:
    folder = tmp_path / "source"
    folder.mkdir()
    source = make(folder)
    before = sorted(folder.rglob("*"))
    found = run("build", source, "-o", place / "out", "-p", profile, "--no-benchmark")
    assert found.code == 3, found.stderr
    one_line(found.stderr)
    assert found.stdout == ""
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--recipe", "smalest"], "smalest"),
        (["--profile", "cpu-x86-vnny"], "cpu-x86-vnny"),
        (["--max-size", "big"], "big"),
        (["--max-loss", "-1%"], "-1%"),
        (["--quick"], "--quick"),
        (["--text", "/nowhere/text.txt"], "text.txt"),
        (["--logits", "some"], "some"),
    ],
)
def test_a_wrong_option(arguments: list[str], named: str, place: Path, mlp: Path, profile: Path, run: Run) -> None:
    profiled = [] if "--profile" in arguments else ["-p", str(profile)]
    found = run("build", mlp, "-o", place / "out", *profiled, *arguments)
    assert found.code == 2
    one_line(found.stderr)
    assert named in found.stderr


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("quantize-block", "did you mean quantize-blocks?"),
        ("quantize-blocks:bit=4", "did you mean bits?"),
        ("quantize-blocks:bits=9", "bits must be"),
        ("quantize-blocks:bits", "not key=value"),
    ],
)
def test_a_wrong_pass(text: str, named: str, place: Path, mlp: Path, profile: Path, run: Run) -> None:
    found = run("optimize", mlp, "-o", place / "out", "-p", profile, "--pass", text)
    assert found.code == 2
    one_line(found.stderr)
    assert named in found.stderr


def test_an_unknown_command(run: Run) -> None:
    found = run("biuld", "x")
    assert found.code == 2
    one_line(found.stderr)


@pytest.mark.parametrize("kind", ["a file", "a folder of something else"])
def test_an_output_that_is_not_an_artifact_is_not_overwritten(
    kind: str, mlp: Path, profile: Path, tmp_path: Path, run: Run
) -> None:
    target = tmp_path / "thesis"
    if kind == "a file":
        target.write_text("precious")
    else:
        target.mkdir()
        (target / "chapter").write_text("precious")
    before = snapshot(tmp_path)
    found = run("build", mlp, "-o", target, "-p", profile)
    assert found.code == 2
    one_line(found.stderr)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("command", ["verify", "inspect", "benchmark", "run"])
def test_commands_on_a_folder_that_is_not_there(command: str, tmp_path: Path, run: Run) -> None:
    found = run(command, tmp_path / "nothing", *(["hello"] if command == "run" else []), *PROFILE_OF.get(command, []))
    assert found.code in (2, 3)
    one_line(found.stderr)


PROFILE_OF: dict[str, list[str]] = {}


@pytest.mark.parametrize("change", [{"schema_version": 2}, {"surprise": 1}, {"files": 3}])
def test_a_manifest_of_another_schema(change: dict[str, object], existing: Path, tmp_path: Path, run: Run) -> None:
    shutil.copytree(existing, tmp_path / "copy")
    path = tmp_path / "copy" / "artifact.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    found = run("verify", tmp_path / "copy")
    assert found.code == 3
    one_line(found.stderr)
    assert next(iter(change)) in found.stderr


def test_a_message_is_not_a_graph(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Libraries may put all that they have into one: onnx_ir's clone, for one."""

    def fail(*arguments: object, **options: object) -> None:
        raise RuntimeError("Value(" * 10_000)

    monkeypatch.setattr("onnxpress.cli.cli.main", fail)
    assert main(["inspect", "x"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert len(line) < 1200
    assert "a bug" in line


def test_a_traceback_only_with_debug(tmp_path: Path, run: Run) -> None:
    assert "Traceback" not in run("verify", tmp_path).stderr
    assert "Traceback" in run("verify", tmp_path, "--debug").stderr
    assert "Traceback" in run("--debug", "verify", tmp_path).stderr


@pytest.mark.parametrize("free", [0, 20_000, 40_000, 60_000])
def test_a_full_disk(free: int, existing: Path, mlp: Path, profile: Path, tmp_path: Path, run: Run) -> None:
    """Full at the beginning, while the graphs are written, while the artifact is packaged."""
    disk = tmp_path / "disk"
    disk.mkdir()
    taken = sum(-(-len(content) // 4096) * 4096 for content in snapshot(existing).values())
    mount = ["mount", "-t", "tmpfs", "-o", f"size={taken + free}", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small disk needs more rights")
    try:
        shutil.copytree(existing, disk / "out")
        before = snapshot(disk)
        found = run("build", mlp, "-o", disk / "out", "-p", profile, "--no-benchmark")
        assert found.code == 6, found.stderr
        one_line(found.stderr)
        assert "No space left" in found.stderr
        assert snapshot(disk) == before
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_limit_on_file_sizes(place: Path, mlp: Path, profile: Path) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    arguments = ["build", str(mlp), "-o", str(place / "out"), "-p", str(profile), "--no-benchmark"]
    found = subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, preexec_fn=limit, check=False)
    assert found.returncode == 6, found.stderr
    one_line(found.stderr)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(mlp: Path, profile: Path, tmp_path: Path, run: Run) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    found = run("build", mlp, "-o", closed / "out", "-p", profile)
    assert found.code == 6
    one_line(found.stderr)


def test_an_output_below_a_file(mlp: Path, profile: Path, run: Run) -> None:
    found = run("build", mlp, "-o", mlp / "out", "-p", profile)
    assert found.code == 6
    one_line(found.stderr)


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_build_cleans_up(sent: signal.Signals, code: int, place: Path, mlp: Path, profile: Path) -> None:
    child = start_build(place, mlp, profile)
    wait_for_work(child, place)
    child.send_signal(sent)
    stderr = child.communicate(timeout=60)[1].decode()
    assert child.returncode == code, stderr
    assert "Traceback" not in stderr


@pytest.mark.slow
@pytest.mark.parametrize("command", ["build", "optimize"])
def test_a_killed_run_leaves_the_old_artifact(
    command: str, existing: Path, mlp: Path, profile: Path, tmp_path: Path, run: Run
) -> None:
    shutil.copytree(existing, tmp_path / "out")
    before = snapshot(tmp_path / "out")
    choose = random.Random(3)
    for _ in range(6):
        child = start_build(tmp_path, mlp, profile, command)
        wait_for_work(child, tmp_path)
        time.sleep(choose.uniform(0, 1))
        child.kill()
        child.communicate()
        after = snapshot(tmp_path / "out")
        complete = after.keys() == before.keys() and main(["verify", str(tmp_path / "out")]) == 0
        assert after == before or complete, "neither the old artifact nor the new one"
    assert run(command, mlp, "-o", tmp_path / "out", "-p", profile, "--no-benchmark").code == 0
    assert list(tmp_path.iterdir()) == [tmp_path / "out"], "leftovers of the killed runs"


def start_build(folder: Path, mlp: Path, profile: Path, command: str = "build") -> subprocess.Popen[bytes]:
    arguments = [command, str(mlp), "-o", str(folder / "out"), "-p", str(profile), "--no-benchmark"]

    def heed_interrupts() -> None:
        """Tests that are started in the background ignore SIGINT, and so would their children."""
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    return subprocess.Popen(
        [*COMMAND, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=heed_interrupts
    )


def wait_for_work(child: subprocess.Popen[bytes], folder: Path) -> None:
    """Until the build has its temporary folder."""
    while child.poll() is None and not list(folder.glob(".out.building-*")):
        time.sleep(0.005)


def one_line(stderr: str) -> None:
    assert stderr.startswith("error: "), stderr
    assert stderr.count("\n") == 1, stderr
    assert len(stderr) < 500, stderr

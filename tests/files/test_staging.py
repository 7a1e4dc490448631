"""A folder appears whole or not at all, whatever happens to the process that writes it."""

from __future__ import annotations

import errno
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pytest

from onnxpress.errors import OutputError, UsageError
from onnxpress.files import staging
from onnxpress.files.staging import replacing

_fork = multiprocessing.get_context("fork")


def write(target: Path, text: str, files: int = 1, pause: float = 0.0) -> None:
    """An artifact whose every file says `text`."""
    with replacing(target) as stage:
        (stage.result / "artifact.json").write_text(text)
        for index in range(files):
            (stage.result / f"{index}.txt").write_text(text)
            time.sleep(pause)


def contents(target: Path) -> set[str]:
    return {path.read_text() for path in target.iterdir()}


def test_the_new_folder_takes_the_place_of_the_old_one(tmp_path: Path) -> None:
    write(tmp_path / "out", "old", files=3)
    write(tmp_path / "out", "new", files=1)
    assert contents(tmp_path / "out") == {"new"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["0.txt", "artifact.json"]


def test_without_an_atomic_exchange_the_result_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "_exchange", lambda first, second: False)
    write(tmp_path / "out", "old", files=3)
    write(tmp_path / "out", "new")
    assert contents(tmp_path / "out") == {"new"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_an_error_leaves_the_old_folder_and_no_other(tmp_path: Path) -> None:
    write(tmp_path / "out", "old")
    with pytest.raises(ZeroDivisionError), replacing(tmp_path / "out") as stage:
        (stage.result / "half").write_text("new")
        (stage.work / "scratch").write_text("new")
        raise ZeroDivisionError
    assert contents(tmp_path / "out") == {"old"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_what_the_system_refuses_to_write_is_an_output_error(tmp_path: Path, number: int) -> None:
    with pytest.raises(OutputError, match="cannot write") as caught, replacing(tmp_path / "out"):
        raise OSError(number, os.strerror(number))
    assert caught.value.hint
    assert list(tmp_path.iterdir()) == []


def test_other_system_errors_are_not_disguised(tmp_path: Path) -> None:
    with pytest.raises(ConnectionError), replacing(tmp_path / "out"):
        raise ConnectionError(errno.ECONNRESET, "reset")


@pytest.mark.parametrize("kind", ["file", "foreign folder"])
def test_what_is_not_an_artifact_is_not_overwritten(tmp_path: Path, kind: str) -> None:
    target = tmp_path / "thesis"
    if kind == "file":
        target.write_text("precious")
    else:
        target.mkdir()
        (target / "chapter-1").write_text("precious")
    with pytest.raises(UsageError, match="thesis"), replacing(target):
        pytest.fail("the block must not run")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["thesis"]


def test_an_empty_folder_may_be_filled(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    write(tmp_path / "out", "new")
    assert contents(tmp_path / "out") == {"new"}


def test_parents_are_made(tmp_path: Path) -> None:
    write(tmp_path / "a" / "b" / "out", "new")
    assert contents(tmp_path / "a" / "b" / "out") == {"new"}


def test_a_process_killed_at_any_moment_leaves_the_old_or_the_new_folder(tmp_path: Path) -> None:
    target = tmp_path / "out"
    write(target, "first", files=5)
    choose = random.Random(7)
    for round_ in range(25):
        child = _fork.Process(target=write, args=(target, f"round {round_}", 5, 0.001))
        child.start()
        time.sleep(choose.uniform(0, 0.02))
        assert child.pid is not None
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        assert len(contents(target)) == 1
        assert len(list(target.iterdir())) == 6
    write(target, "last", files=5)
    assert contents(target) == {"last"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"], "leftovers of the killed runs"


def test_a_living_run_is_not_taken_for_a_leftover(tmp_path: Path) -> None:
    with replacing(tmp_path / "out") as outer:
        (outer.result / "artifact.json").write_text("outer")
        write(tmp_path / "out", "inner")
        assert (outer.result / "artifact.json").exists()
    assert contents(tmp_path / "out") == {"outer"}


def test_concurrent_runs_never_mix(tmp_path: Path) -> None:
    children = [_fork.Process(target=write, args=(tmp_path / "out", f"child {index}", 5, 0.002)) for index in range(6)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0] * 6
    assert len(contents(tmp_path / "out")) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]

"""Figures of a folder as they come, and the three parts of measuring a subject: build, quality, speed."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import common
import decoder
import encoder
from common import Row, Worker
from contenders import Contender, Subject
from subjects import judges

CONTEXTS = (256,)


class Figures:
    """All figures of a folder: subject -> contender -> figure. Written as they come."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.path = folder, folder / "figures.json"
        self.content: dict[str, Any] = {}
        if self.path.exists():
            self.content = json.loads(self.path.read_text(encoding="utf-8"))

    def add(self, subject: str, contender: Contender | str, row: Row) -> None:
        name = contender if isinstance(contender, str) else contender.name
        known = self.content.setdefault("subjects", {}).setdefault(subject, {}).setdefault(name, {})
        if isinstance(contender, Contender):
            known["family"] = contender.family
        known |= row
        self.content["machine"] = common.machine()
        self.path.write_text(json.dumps(self.content, indent=1) + "\n", encoding="utf-8")

    def attempt(self, subject: Subject, contender: Contender, work: Callable[[], Row]) -> bool:
        """Add what `work` finds, or why it failed. Contenders that fail do not stop the others."""
        try:
            row = work()
        except RuntimeError as error:
            lines = [line for line in str(error).splitlines() if line.strip()]
            print(f"{contender.name} failed: {error}", file=sys.stderr)
            self.add(subject.name, contender, {"failed": lines[-1][:200] if lines else "no message"})
            return False
        self.add(subject.name, contender, {**row, "failed": None})
        return True


def build(subject: Subject, contender: Contender, *, again: bool) -> Row:
    built = contender.built(subject, again=again)
    row: Row = {"bytes": built.size_bytes}
    if built.seconds:
        row["build s"] = built.seconds
    if built.peak_rss_bytes:
        row["build RSS MB"] = built.peak_rss_bytes / 1e6
    return row


def measure(
    subject: Subject,
    found: Sequence[Contender],
    arguments: argparse.Namespace,
    describe: Callable[[Contender], Row] = lambda one: {},
) -> None:
    """Build and judge `found` one after the other, then have them race, as `arguments.do` says.

    describe: what else is to be said of one that is built.
    """
    figures = Figures(arguments.out)
    again = "build" in arguments.do and not arguments.reuse

    def start(contender: Contender) -> Worker:
        return contender.start(contender.built(subject), arguments.threads)

    def judged(contender: Contender, judge: Callable[[Worker], Row]) -> Row:
        print(f"quality of {subject.name}: {contender.name}", file=sys.stderr)
        worker = start(contender)
        try:
            return judge(worker)
        finally:
            worker.close()

    ready = []
    with tempfile.TemporaryDirectory() as folder:
        judge = None
        if "quality" in arguments.do:
            known = figures.content.get("subjects", {}).get(subject.name, {}).get("torch", {})
            torch, judge = judges(subject, Path(folder), arguments, known)
            if torch:
                figures.add(subject.name, "torch", torch)
        for one in found:
            if not figures.attempt(subject, one, partial(build, subject, one, again=again)):
                continue
            figures.add(subject.name, one, describe(one))
            if judge is None or figures.attempt(subject, one, partial(judged, one, judge)):
                ready.append(one)
    if "speed" in arguments.do and subject.name != "gpt":
        loaded: dict[str, Worker] = {}

        def load(contender: Contender) -> Row:
            loaded[contender.name] = start(contender)
            return {}

        ready = [one for one in ready if figures.attempt(subject, one, partial(load, one))]
        workers = list(loaded.values())
        if subject.name == "encoder":
            rows = encoder.race(workers, arguments.repeats)
        else:
            rows = decoder.race(workers, arguments.repeats, CONTEXTS)
        for one, row in zip(ready, rows, strict=True):
            figures.add(subject.name, one, {key: row[key] for key in row if key not in ("contender", "MB")})
        for worker in workers:
            worker.close()

"""Progress of long work: a line per stage with a bar on stderr, and nothing where stderr is not a terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import rich.progress

Update = Callable[[int, int], None]
"""Called with what is done and what is to do, in any one unit."""


class Progress:
    """Bars for the stages of one command; use it as a context manager around them."""

    def __init__(self, enabled: bool | None = None) -> None:
        self._enabled = sys.stderr.isatty() if enabled is None else enabled
        self._bars: rich.progress.Progress | None = None

    def __enter__(self) -> Progress:
        if self._enabled:
            from rich.console import Console
            from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
            from rich.progress import Progress as Bars

            columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
            self._bars = Bars(*columns, console=Console(stderr=True))
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bars is not None:
            self._bars.stop()
            self._bars = None

    def message(self, text: str) -> None:
        """A line above the bars."""
        if self._bars is not None:
            self._bars.console.print(text, style="dim", markup=False)

    @contextmanager
    def stage(self, title: str) -> Iterator[Update]:
        """A bar that is shown, pulsing until the first update, while the block runs."""
        bars = self._bars
        if bars is None:
            yield lambda done, total: None
            return
        bar = bars.add_task(title, total=None)

        def update(done: int, total: int) -> None:
            bars.update(bar, completed=done, total=total or None)

        yield update
        bars.update(bar, completed=1, total=1)
        bars.stop_task(bar)

"""Progress of long work: a bar on a terminal, a plain line at each tenth elsewhere."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar


class Progress:
    """``update(stage, done, total, note)`` as often as one likes; writes to standard error."""

    def __init__(self) -> None:
        self._bar: Bar | None = None
        if sys.stderr.isatty():
            columns = (
                TextColumn("{task.description:<9}"),
                BarColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
            )
            self._bar = Bar(*columns, console=Console(stderr=True))
        self._tasks: dict[str, TaskID] = {}
        self._tenths: dict[str, int] = {}

    def update(self, stage: str, done: int, total: int, note: str = "") -> None:
        if self._bar is None:
            tenth = 10 * done // max(total, 1)
            if self._tenths.get(stage) != tenth:
                self._tenths[stage] = tenth
                print(f"{stage} {10 * tenth} %  {note}".rstrip(), file=sys.stderr, flush=True)
            return
        if stage not in self._tasks:
            self._tasks[stage] = self._bar.add_task(stage, total=total, note=note)
        self._bar.update(self._tasks[stage], completed=done, note=note)

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

"""How long steps tell a person how far they are: elapsed, time left and peak memory."""

from __future__ import annotations

import logging
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as Bar

#: Seconds between lines of one long step where there is no terminal to redraw.
_LINE_EVERY = 60.0

_log = logging.getLogger("latentize")


class Progress(Protocol):
    """What a long step calls after each piece of its work."""

    def __call__(self, done: int, total: int | None, note: str = "") -> None:
        """`done` of `total` pieces are finished (total 0 or None: not known); `note` says what is going on now."""


def silent(done: int, total: int | None, note: str = "") -> None:
    """A `Progress` that says nothing."""
    del done, total, note


@dataclass(frozen=True)
class StepRecord:
    """What one finished step cost."""

    name: str
    seconds: float
    peak_bytes: int


def peak_memory() -> int:
    """Largest resident memory of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)


def free_memory() -> int | None:
    """Bytes that can be taken without swapping; None where the system does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), None)


def duration(seconds: float) -> str:
    """Seconds as "3.2 s" or "4 min 05 s"."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    return f"{int(seconds) // 60} min {int(seconds) % 60:02d} s"


class Steps:
    """The steps of a job: a live bar each on a terminal, one line each otherwise. `records` keeps their cost."""

    def __init__(self, console: Console | None) -> None:
        """`console` None says nothing (and still keeps the records)."""
        self._console = console
        self.records: list[StepRecord] = []

    @contextmanager
    def step(self, name: str) -> Iterator[Progress]:
        """Run one step; yields the `Progress` for it."""
        start = time.monotonic()
        with self._display(name) as progress:
            yield progress
        record = StepRecord(name, time.monotonic() - start, peak_memory())
        self.records.append(record)
        line = f"{name:<12} {duration(record.seconds):>12}   peak {record.peak_bytes / 2**20:,.0f} MiB"
        _log.debug(line, extra={"shown": self._console is not None})
        if self._console is not None:
            self._console.print(line, style="dim", highlight=False, soft_wrap=True)

    @contextmanager
    def _display(self, name: str) -> Iterator[Progress]:
        if self._console is None:
            yield silent
        elif self._console.is_terminal:
            with _bar(self._console) as bar:
                task = bar.add_task(name, total=None, note="", peak="")

                def show(done: int, total: int | None, note: str = "") -> None:
                    peak = f"{peak_memory() / 2**20:,.0f} MiB"
                    bar.update(task, completed=done, total=total or None, note=note, peak=peak)

                yield show
        else:
            yield _Lines(name, self._console)


class _Lines:
    """Progress as a line now and then, for logs and pipes."""

    def __init__(self, name: str, console: Console) -> None:
        self._name = name
        self._console = console
        self._start = self._last = time.monotonic()

    def __call__(self, done: int, total: int | None, note: str = "") -> None:
        now = time.monotonic()
        if now - self._last < _LINE_EVERY:
            return
        self._last = now
        left = f", {duration((now - self._start) * (total - done) / done)} left" if done and total else ""
        count = f" {done}/{total}" if total else ""
        line = f"{self._name}{count}: {duration(now - self._start)}{left} {note}".rstrip()
        self._console.print(line, style="dim", highlight=False, soft_wrap=True)


def _bar(console: Console) -> Bar:
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns: list[Any] = [
        TextColumn("{task.description:<12}"), BarColumn(bar_width=24), MofNCompleteColumn(), TimeElapsedColumn(),
        TextColumn("ETA"), TimeRemainingColumn(), TextColumn("peak {task.fields[peak]}"),
        TextColumn("{task.fields[note]}", style="dim"),
    ]  # fmt: skip
    return Bar(*columns, console=console, transient=True)

"""Slow work, shown: bars on a terminal, a line now and then in a log."""

from __future__ import annotations

import time
from types import TracebackType
from typing import TYPE_CHECKING, Any

from kleinctl.cli import output

if TYPE_CHECKING:
    from kleinctl.generate import Event

#: Seconds between lines where there is no terminal.
LINE_SECONDS = 10.0


class Bars:
    """A bar for each thing under way and, where there are several, one for all of it.

    `show(key, text, done, total)` moves or makes the bar of `key`; `total` None means that nobody knows the end. A
    `note` stands behind the amount.
    On something that is no terminal, or cannot move its cursor (TERM=dumb), finished things get a line, and a long one
    every ten seconds.
    """

    def __init__(self, *, in_bytes: bool = False, rate: bool = False) -> None:
        self._in_bytes, self._rate = in_bytes, rate
        self._console = output.err_console()
        self._live = self._console.is_terminal and not self._console.is_dumb_terminal
        self._progress: Any = None
        self._tasks: dict[str, Any] = {}
        self._told: dict[str, float] = {}

    def __enter__(self) -> Bars:
        if self._live:
            from rich.progress import (
                BarColumn,
                Progress,
                ProgressColumn,
                TextColumn,
                TimeElapsedColumn,
                TimeRemainingColumn,
                TransferSpeedColumn,
            )

            columns: list[ProgressColumn] = [TextColumn("{task.description}", markup=False), BarColumn(24)]
            columns.append(TextColumn("{task.fields[count]}"))
            columns += (
                [TransferSpeedColumn(), TimeRemainingColumn(compact=True)] if self._rate else [TimeElapsedColumn()]
            )
            self._progress = Progress(*columns, console=self._console, transient=True)
            self._progress.start()
        return self

    def __exit__(self, kind: type | None, value: BaseException | None, trace: TracebackType | None) -> None:
        if self._progress is not None:
            self._progress.stop()

    def show(self, key: str, text: str, done: float, total: float | None, note: str = "") -> None:
        """Move the bar of `key`."""
        if self._progress is None:
            self._line(key, text, done, total, note)
            return
        count = self._amount(done, total) + note if total and (self._in_bytes or total > 1) else ""
        if key not in self._tasks:
            self._tasks[key] = self._progress.add_task(text, total=total, count=count)
        self._progress.update(self._tasks[key], description=text, completed=done, total=total, count=count)

    def remove(self, key: str) -> None:
        """Take the bar of something finished away."""
        if self._progress is not None and key in self._tasks:
            self._progress.remove_task(self._tasks.pop(key))

    def remark(self, text: str) -> None:
        """A line above the bars."""
        output.remark(text)

    def _line(self, key: str, text: str, done: float, total: float | None, note: str) -> None:
        if not self._in_bytes and (total is None or total <= 1):
            return  # a stage without steps: it has begun, and that is all there is to say
        now = time.monotonic()
        finished = total is not None and done >= total
        last = self._told.setdefault(key, now)
        if last < 0 or (not finished and now - last < LINE_SECONDS):
            return
        self._told[key] = -1.0 if finished else now
        amount = f" {self._amount(done, total)}{note}" if total else ""
        output.remark(f"  {text}{amount}")

    def _amount(self, done: float, total: float) -> str:
        from kleinctl.units import bytes_text

        if self._in_bytes:
            return f"{bytes_text(done)} of {bytes_text(total)}"
        return f"{done:.0f} of {total:.0f}"


class Pace:
    """How long the rest of `count` pictures will take, from how long those that are over took.

    What is done ahead for `CHUNK` of them is shared out among them; loading the model does not count.
    """

    def __init__(self, count: int) -> None:
        self._count, self._over = count, 0
        self._ahead = self._painting = 0.0
        self._last = time.monotonic()

    def hear(self, event: Event) -> None:
        """Take note of an event of `kleinctl.generate`, when it comes."""
        from kleinctl.generate import Step

        now = time.monotonic()
        passed, self._last = now - self._last, now
        if not isinstance(event, Step):
            self._over = event.number
        elif event.number == 0:
            self._ahead += passed if event.stage != "load" else 0.0
            return
        self._painting += passed

    @property
    def note(self) -> str:
        """`, about 2 min left`; empty where nobody can tell yet, or nothing is left."""
        from kleinctl.generate import CHUNK
        from kleinctl.units import seconds_text

        if not 0 < self._over < self._count:
            return ""
        prepared = min(self._count, -(-self._over // CHUNK) * CHUNK)
        seconds = self._painting / self._over * (self._count - self._over)
        seconds += self._ahead / prepared * (self._count - prepared)
        return f", about {seconds_text(seconds)} left"

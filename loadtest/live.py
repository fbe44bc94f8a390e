"""What a person sees while something runs: headings, tables, progress. Plain lines where there is no terminal."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from loadtest.records import Row
from loadtest.workload import Request, Workload

__all__ = ["Screen", "Watch", "figure"]

WIDTH = 130


def figure(value: float | None, digits: int = 2) -> str:
    """A number for a table; a dash where there are too few samples for one."""
    return "–" if value is None else f"{value:.{digits}f}"


class Screen:
    """Standard output, with or without a terminal."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False, soft_wrap=False)
        if not self.console.is_terminal:
            self.console.width = WIDTH

    @property
    def terminal(self) -> bool:
        return self.console.is_terminal

    def heading(self, text: str) -> None:
        self.console.print()
        self.console.print(Text(text, style="bold"))

    def say(self, text: str, style: str = "") -> None:
        self.console.print(Text(text, style=style))

    def lines(self, texts: Iterable[str]) -> None:
        for text in texts:
            self.say(text)

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """The first column is text, the rest are figures."""
        table = Table(box=None, pad_edge=False, header_style="bold")
        for i, column in enumerate(columns):
            table.add_column(column, justify="left" if i == 0 else "right", no_wrap=True)
        for row in rows:
            table.add_row(*row)
        self.console.print(table)

    @contextmanager
    def progress(self, what: str, total: int) -> Iterator[Callable[[], None]]:
        """Yields a function to call once per step done. Without a terminal, a line at every quarter."""
        if self.terminal:
            columns = (TextColumn("{task.description}"), BarColumn(30), TextColumn("{task.completed}/{task.total}"))
            with Progress(*columns, TimeElapsedColumn(), console=self.console, transient=True) as bar:
                task = bar.add_task(what, total=total)
                yield lambda: bar.advance(task)
            return
        done = 0

        def step() -> None:
            nonlocal done
            done += 1
            if done * 4 // total > (done - 1) * 4 // total:
                self.say(f"  {what}: {done}/{total}")

        self.say(f"  {what} ...")
        yield step


class Watch:
    """How a live run is going: redrawn in place on a terminal, a line now and then without one."""

    EVERY = 5.0
    """Seconds between two plain lines."""

    def __init__(self, screen: Screen, clock: Callable[[], float] = time.perf_counter) -> None:
        self._screen = screen
        self._clock = clock
        self._title = ""
        self._total = 0
        self._last = 0.0
        self._start = 0.0
        self._said = 0.0
        self._sent = self._done = self._failed = self._tokens = 0
        self._lag = 0.0
        self._jct = 0.0
        self._live: Live | None = None

    def begin(self, title: str, workload: Workload, start: float) -> None:
        """A run begins; ``start`` is its second 0 on the clock."""
        self.end()
        self._title = title
        self._total = len(workload.requests)
        self._last = workload.requests[-1].at
        self._start = self._said = start
        self._sent = self._done = self._failed = self._tokens = 0
        self._lag = self._jct = 0.0
        if self._screen.terminal:
            self._live = Live(console=self._screen.console, refresh_per_second=4, get_renderable=self._picture)
            self._live.start()
        else:
            self._screen.say(f"  {title}: {self._total} requests over {self._last:.0f} s")

    def sent(self, row: Row) -> None:
        self._sent += 1
        self._lag = max(self._lag, row.lag)
        self._tick()

    def ended(self, request: Request, row: Row) -> None:
        self._done += 1
        if row.error:
            self._failed += 1
        else:
            self._jct += row.jct
            self._tokens += row.tokens
        self._tick()

    def end(self) -> None:
        """The run is over; what is on a terminal stays there, in one line."""
        if self._live is not None:
            live, self._live = self._live, None
            live.update(Text("  " + self._line()))
            live.stop()

    def _tick(self) -> None:
        now = self._clock()
        if self._live is None and not self._screen.terminal and now - self._said >= self.EVERY:
            self._said = now
            self._screen.say("    " + self._line())

    def _line(self) -> str:
        passed = max(self._clock() - self._start, 1e-9)
        good = self._done - self._failed
        parts = [
            f"{passed:.0f} s",
            f"offered {self._sent}/{self._total} ({self._sent / min(passed, max(self._last, 1e-9)):.1f}/s)",
            f"done {self._done} ({self._done / passed:.1f}/s, {self._tokens / passed:.0f} tok/s)",
            f"in flight {self._sent - self._done}",
            f"JCT {self._jct / good:.2f} s" if good else "JCT –",
            f"lag {self._lag * 1e3:.1f} ms",
        ]
        if self._failed:
            parts.append(f"failed {self._failed}")
        if (left := self._left(passed)) is not None:
            parts.append(f"{left:.0f} s left")
        return "  ".join(parts)

    def _left(self, passed: float) -> float | None:
        """Until the last answer, guessed: the arrivals still to come, or the backlog at the pace so far."""
        if self._done == self._total or passed < 1:
            return None
        pace = self._done / passed
        backlog = (self._total - self._done) / pace if pace > 0 else 0.0
        return max(self._last - passed, backlog)

    def _picture(self) -> Group:
        share = self._done / max(self._total, 1)
        bar = "━" * round(40 * share) + "╌" * (40 - round(40 * share))
        return Group(Text(f"  {self._title}", style="bold"), Text(f"  {bar} {share:4.0%}"), Text("  " + self._line()))

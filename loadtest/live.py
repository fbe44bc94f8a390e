"""What a person sees while something runs: headings, tables, progress. Plain lines where there is no terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

__all__ = ["Screen", "figure"]

WIDTH = 110


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

"""Progress and the tables, on a terminal or in a log."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from lite_attention.quality.results import Run
from lite_attention.quality.table import tables

LOG_WIDTH = 160  # columns where there is no terminal to ask


class Screen:
    """Where the run is shown; `say` prints a line."""

    def __init__(self) -> None:
        console = Console()
        self.console = console if console.is_terminal else Console(width=LOG_WIDTH)

    def say(self, text: str) -> None:
        self.console.print(escape(text), highlight=False)

    @contextmanager
    def progress(self) -> Iterator[Callable[[str], None]]:
        """A function that tells what is being done. In a log every stage is a line."""
        columns = SpinnerColumn(), TimeElapsedColumn(), TextColumn("{task.description}")
        with Progress(*columns, console=self.console, transient=True) as progress:
            task = progress.add_task("", total=None)

            def tell(text: str) -> None:
                progress.update(task, description=escape(text))
                if not self.console.is_terminal:
                    self.say(text)

            yield tell

    def tables(self, run: Run) -> None:
        for caption, header, rows in tables(run):
            self.say(caption)
            table = Table()
            for n, name in enumerate(header):
                table.add_column(name, justify="left" if n == 0 else "right", overflow="fold")
            for row in rows:
                table.add_row(*map(escape, row))
            self.console.print(table)

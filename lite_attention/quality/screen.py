"""Progress and the tables, on a terminal or in a log."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.markup import escape
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from lite_attention.quality.results import Run
from lite_attention.quality.table import tables
from lite_attention.screen import BaseScreen


class Screen(BaseScreen):
    """Where the run is shown."""

    def __init__(self) -> None:
        super().__init__(log_width=160)

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

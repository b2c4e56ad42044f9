"""Progress and the table, on a terminal or in a log."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from lite_attention.bench.results import WRONG, RowResult, Run
from lite_attention.bench.table import average_line, caption, cells, header, judged
from lite_attention.bench.targets import OURS, ratio
from lite_attention.screen import BaseScreen


class Screen(BaseScreen):
    """Where the run is shown."""

    def __init__(self) -> None:
        super().__init__(log_width=180)

    @contextmanager
    def progress(self, rows: int) -> Iterator[tuple[Callable[[str], None], Callable[[RowResult], None]]]:
        """Two functions: one tells what is being done, one that a row is done, which also prints its line."""
        columns = (SpinnerColumn(), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, TextColumn("{task.description}"), console=self.console, transient=True) as progress:
            task = progress.add_task("", total=rows)

            def tell(text: str) -> None:
                progress.update(task, description=escape(text))

            def done(result: RowResult) -> None:
                self.console.print(_line(result), highlight=False)
                progress.advance(task)

            yield tell, done

    def table(self, run: Run) -> None:
        table = Table(title=f"LiteAttention {run.environment['LiteAttention']}", caption=caption(run))
        for name in header(run):
            table.add_column(name, overflow="fold", justify="left" if name in ("row", "needs", "verdict") else "right")
        for result in run.rows:
            table.add_row(*map(escape, cells(run, result)), style=_style(result))
        self.console.print(table)
        for one in run.averages():
            self.say(average_line(one))


def _style(result: RowResult) -> str | None:
    if result.status in WRONG:
        return "bold red"
    if result.status == "not built":
        return "dim"
    return "yellow" if any(one.met is False for one in result.verdicts()) else None


def _line(result: RowResult) -> str:
    """A row that is done, in one line."""
    if result.status != "measured":
        text = f"{result.status}: {result.reason}"
    else:
        ratios = [f"{name} {ratio(result.microseconds, name):.3f}" for name in result.microseconds if name != OURS]
        text = f"{result.microseconds[OURS]:,.1f} us, {result.rate_text(OURS)} {result.row.unit}; "
        text += f"{', '.join(ratios) or 'no peer'}; {judged(result)}"
    line = escape(f"{result.row.name}: {text}")
    style = _style(result)
    return f"[{style}]{line}[/]" if style else line

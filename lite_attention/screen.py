"""What the commands with tables print on: a terminal, or a log. Needs rich."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape


class BaseScreen:
    """`say` prints a line. Where there is no terminal to ask, lines have `log_width` columns."""

    def __init__(self, log_width: int) -> None:
        console = Console()
        self.console = console if console.is_terminal else Console(width=log_width)

    def say(self, text: str) -> None:
        self.console.print(escape(text), highlight=False)

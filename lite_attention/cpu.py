"""The CPU path."""

from __future__ import annotations

from lite_attention import reference
from lite_attention.checks import Problem


def run(problem: Problem) -> None:
    reference.run(problem)

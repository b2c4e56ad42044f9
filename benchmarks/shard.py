"""A pytest plugin by which several runs share the tests: `-p shard --shard 2/8`, with this folder on PYTHONPATH."""

from __future__ import annotations

import argparse

import pytest


def part_of(text: str) -> tuple[int, int]:
    """The numbers of a text like 2/8."""
    number, slash, count = text.partition("/")
    if not (slash and number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise argparse.ArgumentTypeError(f"got {text!r}; needs I/N with I from 1 to N, as 2/8")
    return int(number), int(count)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--shard", type=part_of, metavar="I/N", help="run every N-th test, from the I-th on")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if shard := config.getoption("--shard"):
        number, count = shard
        config.hook.pytest_deselected(items=[item for i, item in enumerate(items) if i % count != number - 1])
        items[:] = items[number - 1 :: count]

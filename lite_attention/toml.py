"""TOML as plain values, on every Python that this project has."""

from __future__ import annotations

from types import ModuleType
from typing import Any


def parse_toml(text: str, purpose: str) -> dict[str, Any]:
    """The document as dicts, lists, strings and numbers. `purpose` is what an error says it is for.

    Raises:
        ValueError: the text is not TOML.
        RuntimeError: on Python 3.10, tomlkit is not installed.
    """
    try:
        import tomllib
    except ModuleNotFoundError:  # Python 3.10
        return need_tomlkit(f"{purpose}, before Python 3.11,").parse(text).unwrap()
    return tomllib.loads(text)


def need_tomlkit(purpose: str) -> ModuleType:
    """The module. Raises RuntimeError where it is not installed."""
    try:
        import tomlkit
    except ModuleNotFoundError:
        raise RuntimeError(f"{purpose} needs tomlkit: pip install 'lite-attention[calibrate]'") from None
    return tomlkit

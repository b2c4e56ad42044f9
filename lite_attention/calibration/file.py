"""Thresholds as a TOML file: plain numbers that can be read, compared and edited, and nothing that runs when read."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from torch import nn

from lite_attention.calibration.thresholds import HeadGroup, Layer, Thresholds
from lite_attention.checks import wrong
from lite_attention.toml import need_tomlkit, parse_toml

HEAD = (
    "# Thresholds of LiteAttention, in log2 units: lite_attention.calibrate wrote them, load_thresholds reads them.\n"
)


def save_thresholds(thresholds: Thresholds, path: str | Path) -> None:
    """Writes thresholds to a TOML file, which `load_thresholds` reads.

    Raises:
        RuntimeError: tomlkit is not installed.
    """
    document: dict[str, Any] = {"target": thresholds.target, "error": thresholds.error}
    if thresholds.output_error is not None:
        document["output_error"] = thresholds.output_error
    document |= {
        "sparsity": thresholds.sparsity,
        "num_steps": thresholds.num_steps,
        "step_ranges": thresholds.step_ranges,
        "layers": [_layer_table(layer) for layer in thresholds.layers],
    }
    Path(path).write_text(HEAD + need_tomlkit("save_thresholds").dumps(document), encoding="utf-8")


def load_thresholds(model: nn.Module, path: str | Path) -> Thresholds:
    """Gives the `LiteAttention` modules of `model` the thresholds of a file that `save_thresholds` wrote.

    Args:
        model: with the layers, by name, and the num_steps that the file was made for.
        path: the TOML file.

    Returns:
        What the file has.

    Raises:
        ValueError: the file isn't one of thresholds, or not one for this model: see `Thresholds.apply`.
        RuntimeError: on Python 3.10, tomlkit is not installed.
    """
    thresholds = read_thresholds(path)
    thresholds.apply(model)
    return thresholds


def read_thresholds(path: str | Path) -> Thresholds:
    """The thresholds in a file. Raises ValueError for another content, which it names."""
    text = Path(path).read_text(encoding="utf-8")
    try:
        return _thresholds(parse_toml(text, "load_thresholds"))
    except KeyError as error:
        raise wrong("path", f"{path} without {error}", "a file that save_thresholds wrote") from None
    except (ValueError, TypeError) as error:  # TOML's errors are among these
        raise wrong("path", f"{path}, where {error}", "a file that save_thresholds wrote") from error


def _layer_table(layer: Layer) -> dict[str, Any]:
    return {
        "name": layer.name,
        "head_dim": layer.head_dim,
        "tile": layer.tile,
        "groups": [
            {
                "heads": (group.begin, group.end),
                "thresholds": group.thresholds,
                "error": group.error,
                "sparsity": group.sparsity,
            }
            for group in layer.groups
        ],
    }


def _thresholds(document: dict[str, Any]) -> Thresholds:
    step_ranges = tuple(_pair(x) for x in document["step_ranges"])
    _check_row("step_ranges", step_ranges, document["num_steps"])
    return Thresholds(
        float(document["target"]),
        document.get("output_error"),
        document["num_steps"],
        step_ranges,
        tuple(_layer(table, len(step_ranges)) for table in document["layers"]),
    )


def _layer(table: dict[str, Any], ranges: int) -> Layer:
    groups = tuple(
        HeadGroup(*_pair(x["heads"]), tuple(map(float, x["thresholds"])), x["error"], x["sparsity"])
        for x in table["groups"]
    )
    name = table["name"]
    _check_row(f"heads of {name}", [(group.begin, group.end) for group in groups], None)
    for group in groups:
        if len(group.thresholds) != ranges or not all(-math.inf <= x <= 0 for x in group.thresholds):
            raise ValueError(f"thresholds of {name} are {group.thresholds}, not {ranges} of at most 0")
    return Layer(name, table["head_dim"], _pair(table["tile"]), groups)


def _pair(numbers: list[int]) -> tuple[int, int]:
    if len(numbers) != 2 or not all(isinstance(x, int) for x in numbers):
        raise ValueError(f"{numbers} stands for two whole numbers")
    return numbers[0], numbers[1]


def _check_row(name: str, ranges: list[tuple[int, int]] | tuple[tuple[int, int], ...], end: int | None) -> None:
    """Ranges that follow each other from 0, to `end` where it is given."""
    at = 0
    for begin, stop in ranges:
        if begin != at or stop <= begin:
            raise ValueError(f"{name} are {list(ranges)}, which don't follow each other from 0")
        at = stop
    if at == 0 or end not in (None, at):
        raise ValueError(f"{name} are {list(ranges)}, which don't end at {end}")

"""An eps for each layer, as a TOML file: the quality command writes it, and the vLLM plugin serves with it.

Plain numbers that can be read, compared and edited.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lite_attention.pages.layout import BITS
from lite_attention.toml import parse_toml

HEAD = "# An eps for each layer, by `python -m lite_attention.quality --calibrate`: give its path as layer_eps.\n"


@dataclass(frozen=True)
class LayerEps:
    """Layers' budgets, and what they were measured on.

    Attributes:
        model: the name of its directory.
        target: the eps that was asked for, and the largest of any layer.
        texts: names of the files.
        context, positions: tokens of each text, and how many of them, the last ones, were decoded.
        eps: of each layer, by its index: 0 to below 1.
        sketch_bits: of a channel in the sketches that the lists came from, 12 or 8. A file that doesn't say has 12.
    """

    model: str
    target: float
    texts: tuple[str, ...]
    context: int
    positions: int
    eps: dict[int, float]
    sketch_bits: int = 12


def write_layer_eps(found: LayerEps, path: Path, remarks: Sequence[str], layers: Mapping[int, str]) -> None:
    """Writes the file that `read_layer_eps` reads.

    `remarks` are comments at its head, a line each, and `layers` those of each layer: what was measured.
    """
    head = {
        "model": found.model,
        "target": found.target,
        "texts": found.texts,
        "context": found.context,
        "positions": found.positions,
        "sketch_bits": found.sketch_bits,
    }
    # The strings and numbers of JSON are those of TOML.
    lines = [f"# {remark}" for remark in remarks]
    lines += [f"{name} = {json.dumps(value, ensure_ascii=False)}" for name, value in head.items()]
    lines += ["", "[layers]"]
    lines += [f"{layer} = {{ eps = {eps} }}  # {layers[layer]}" for layer, eps in found.eps.items()]
    path.write_text(HEAD + "\n".join(lines) + "\n", encoding="utf-8")


def read_layer_eps(path: str | Path, name: str = "path") -> LayerEps:
    """What a file has. `name` is the argument that an error names.

    Raises:
        ValueError: there is no such file, or it has another content, which the message names.
        RuntimeError: on Python 3.10, tomlkit is not installed.
    """
    try:
        return _found(parse_toml(Path(path).read_text(encoding="utf-8"), "a file of layer_eps"))
    except KeyError as error:
        reason = f"{error} is missing"
    except OSError as error:
        reason = error.strerror
    except (ValueError, TypeError, AttributeError) as error:  # TOML's errors are among these
        reason = str(error)
    raise ValueError(
        f"{name}: got {str(path)!r}: {reason}; needs a file that `python -m lite_attention.quality --calibrate` wrote"
    )


def check_bits(found: LayerEps, bits: int, path: str | Path, name: str) -> None:
    """Checks that layers are to have the sketches with which their eps were found. `name` and `path`: of the file.

    Raises:
        ValueError: they would have others; the message names the argument.
    """
    if found.sketch_bits != bits:
        raise ValueError(
            f"{name}: got {str(path)!r}, made with sketch_bits {found.sketch_bits}, where sketch_bits is {bits}; needs "
            f"sketch_bits {found.sketch_bits}, or a file of `python -m lite_attention.quality --calibrate` with "
            f"--sketch-bits {bits}"
        )


def check_layers(layer_eps: Collection[int], dense_layers: Collection[int], layers: int) -> None:
    """Checks that a model of so many layers has those that are named by index, and that each is named once.

    Indices count from the end where they are negative.

    Raises:
        ValueError: the message names the argument or both.
    """
    for name, given in (("dense_layers", dense_layers), ("layer_eps", layer_eps)):
        for index in given:
            if not -layers <= index < layers:
                raise ValueError(f"{name}: got {index}; needs {-layers} to {layers - 1}, the model's layers")
    dense = {index % layers: index for index in dense_layers}
    own: dict[int, int] = {}
    for index in layer_eps:
        layer = index % layers
        if layer in dense:
            raise ValueError(
                f"layer_eps and dense_layers: got {index} and {dense[layer]}, which are one layer; needs it in one of "
                "them: a dense layer has no lists for an eps"
            )
        if layer in own:
            raise ValueError(f"layer_eps: got {own[layer]} and {index}, which are one layer; needs it once")
        own[layer] = index


def _found(document: dict[str, Any]) -> LayerEps:
    layers = {int(layer): table for layer, table in document["layers"].items()}
    if not layers:
        raise ValueError("there are no layers")
    return LayerEps(
        str(document["model"]),
        _share("target", document["target"]),
        tuple(map(str, document["texts"])),
        int(document["context"]),
        int(document["positions"]),
        {layer: _share(f"eps of layer {layer}", table["eps"]) for layer, table in layers.items()},
        _bits(document.get("sketch_bits", 12)),
    )


def _share(what: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or math.isnan(value) or not 0 <= value < 1:
        raise ValueError(f"{what} is {value!r}, not a number from 0 to below 1")
    return float(value)


def _bits(value: Any) -> int:
    if value not in BITS:
        raise ValueError(f"sketch_bits is {value!r}, not {' or '.join(map(str, BITS))}")
    return int(value)

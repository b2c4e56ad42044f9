"""The command line of the quality measurements."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lite_attention.bench.environment import environment
from lite_attention.layer_eps import LayerEps, check_bits, check_layers, read_layer_eps, write_layer_eps
from lite_attention.pages.layout import BITS
from lite_attention.quality.budgets import KNOWN, default_budget
from lite_attention.quality.plan import PARTS, Plan
from lite_attention.quality.setting import Setting

if TYPE_CHECKING:
    from lite_attention.quality.calibrate import Calibration

EXTRA = {"transformers": "the model", "rich": "progress and tables", "matplotlib": "the picture"}
JSON, TABLE, PICTURE = "results.json", "README.md", "loss.png"
INTERRUPTED = 130  # the exit status that shells give it
RETRIEVAL_LENGTHS = (4096, 8192, 16384, 32768)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, metavar="MODEL", help="directory of a Hugging Face causal LM")
    parser.add_argument("texts", type=Path, nargs="+", metavar="TEXT", help="UTF-8 files such as it will serve")
    parser.add_argument(
        "--eps", type=_list(_eps), default=(0.02, 0.1), metavar="A,B", help="mass to leave out; default: 0.02,0.1"
    )
    parser.add_argument(
        "--only", type=_list(_part), default=PARTS, metavar="A,B", help=f"some of {','.join(PARTS)}; default: all"
    )
    parser.add_argument(
        "--context", type=_count, default=8192, metavar="N", help="tokens of text; default: %(default)s"
    )
    parser.add_argument(
        "--positions", type=_count, metavar="N", help="loss: the last of them, decoded; default: a quarter"
    )
    parser.add_argument(
        "--lengths",
        type=_list(_count),
        metavar="A,B",
        help="retrieval: tokens; default: those of 4096, 8192, 16384, 32768 that the model and the texts have",
    )
    parser.add_argument(
        "--cases", type=_count, default=40, metavar="N", help="retrieval: of each kind and length; default: %(default)s"
    )
    parser.add_argument(
        "--prompts",
        type=_count,
        default=64,
        metavar="N",
        help="generation, of a quarter of --context to all of it; default: %(default)s",
    )
    parser.add_argument("--tokens", type=_count, default=128, metavar="N", help="generation; default: %(default)s")
    parser.add_argument(
        "--newest", type=_count, default=64, metavar="N", help="tokens that are always read; default: %(default)s"
    )
    parser.add_argument(
        "--dense-layers", type=_list(int), default=(), metavar="A,B", help="layers without lists, from the end if < 0"
    )
    parser.add_argument(
        "--sketch-bits",
        type=int,
        choices=BITS,
        default=BITS[0],
        help="of a channel in the sketch of a page: 12, 8 of the mean and 4 of the key apart, or 8, 4 of each; "
        "default: %(default)s",
    )
    by_layer = parser.add_mutually_exclusive_group()
    by_layer.add_argument(
        "--calibrate",
        type=Path,
        metavar="FILE",
        help="find an eps for each layer, at most --eps, by what its lists do to the model's output, write them as "
        "TOML, measure them too",
    )
    by_layer.add_argument(
        "--layer-eps", type=Path, metavar="FILE", help="measure the eps of each layer in a file of --calibrate, too"
    )
    parser.add_argument(
        "--calibrate-kl",
        type=_nats,
        metavar="X",
        help="what lists in all layers may cost: KL divergence from dense attention, nats a token; default: by --eps, "
        + ", ".join(f"{nats:g} at {eps:g}" for eps, nats in KNOWN),
    )
    parser.add_argument("--dtype", choices=("auto", "bfloat16", "float16", "float32"), default="auto")
    parser.add_argument(
        "--device",
        choices=("cuda", "cpu"),
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="default: %(default)s",
    )
    parser.add_argument("--out", type=Path, default=Path("quality-results"), metavar="DIR", help="default: %(default)s")
    parser.add_argument("--commit", help="what is being measured; default: git's HEAD")


def run(arguments: argparse.Namespace) -> int:
    """Measures what decoding from listed pages costs a model: loss and bytes read, retrieval, agreement of outputs.

    The steps go through the functions that serve it: the kernels on a Hopper GPU, else the CPU path, which is for small
    models and short texts. Lists apply at any length here, as if min_context were 0. With --calibrate each layer gets
    an eps of its own first, by what its lists do to the model's output on these texts.
    """
    _check_extra()
    _check_calibrate(arguments)
    # With transformers, rich and matplotlib there, as checked.
    from lite_attention.quality.calibrate import calibrate
    from lite_attention.quality.decoder import Decoder
    from lite_attention.quality.load import described, load
    from lite_attention.quality.measure import measure
    from lite_attention.quality.picture import draw
    from lite_attention.quality.results import Run
    from lite_attention.quality.screen import Screen
    from lite_attention.quality.table import calibration_remarks, markdown
    from lite_attention.quality.texts import read_texts, windows

    for path in (arguments.model / "config.json", *arguments.texts):
        if not path.is_file():
            raise SystemExit(f"{path}: there is no such file; needs a Hugging Face directory, and text files")
    device, screen = torch.device(arguments.device), Screen()
    model, tokenizer = load(arguments.model, device, arguments.dtype)
    texts = read_texts(arguments.texts, tokenizer)
    plan = _plan(arguments, min(model.config.max_position_embeddings, *(len(text.tokens) for text in texts)))
    if arguments.layer_eps:
        by_layer = _from_file(arguments, model.config.num_hidden_layers)
        plan = replace(plan, settings=(*plan.settings, by_layer))
    versions = {"transformers": importlib.metadata.version("transformers")}
    found = Run(environment(device, arguments.commit) | versions, described(model, arguments.model), plan.sketch_bits)
    for name, value in found.facts.items():
        screen.say(f"{name}: {value}")
    arguments.out.mkdir(parents=True, exist_ok=True)

    stopped = False
    try:
        with screen.progress() as tell:
            if arguments.calibrate:
                calibration = calibrate(
                    Decoder(model, 1, plan.context, plan.sketch_bits),
                    found.model["model"],
                    list(windows(texts, tokenizer, plan.context, device)),
                    plan.positions,
                    plan.settings[0],
                    arguments.calibrate_kl or default_budget(plan.settings[0].eps),
                    tell,
                )
                write_layer_eps(calibration.found, arguments.calibrate, *calibration_remarks(calibration))
                screen.say(f"Written: {arguments.calibrate}")
                for line in _advice(calibration):
                    screen.say(line)
                found.calibration = calibration
                plan = replace(plan, settings=(*plan.settings, _by_layer(plan.settings[0], calibration.found)))
            for _ in measure(plan, model, tokenizer, texts, found, tell):
                found.write(arguments.out / JSON)  # each time: a run that is cut short has what it measured
    except KeyboardInterrupt:
        stopped = True
        screen.say("Interrupted. What was measured before:")
    (arguments.out / PICTURE).unlink(missing_ok=True)  # of a run before
    drawn = draw(found, arguments.out / PICTURE)
    (arguments.out / TABLE).write_text(markdown(found, PICTURE if drawn else None))
    screen.tables(found)
    screen.say(f"Written to {arguments.out}: {', '.join((JSON, TABLE, PICTURE) if drawn else (JSON, TABLE))}")
    return INTERRUPTED if stopped else 0


def _plan(arguments: argparse.Namespace, most: int) -> Plan:
    """What was asked for, where the model and the shortest text have `most` tokens."""
    parts = tuple(part for part in PARTS if part in arguments.only)
    lengths = arguments.lengths or tuple(length for length in RETRIEVAL_LENGTHS if length <= most)
    for option, value in (("--context", arguments.context), *(("--lengths", length) for length in lengths)):
        if value > most:
            raise SystemExit(
                f"{option}: got {value}; needs at most {most}, what the model takes and what the shortest text has "
                "after its first tenth"
            )
    positions, half = arguments.positions or arguments.context // 4, arguments.context // 2
    if positions > arguments.context - 2:
        raise SystemExit(f"--positions: got {positions}; needs at most {arguments.context - 2}, --context less two")
    if "generation" in parts and arguments.tokens >= half:
        raise SystemExit(f"--tokens: got {arguments.tokens}; needs less than {half}, half of --context")
    settings = tuple(Setting(eps, arguments.newest, arguments.dense_layers) for eps in arguments.eps)
    return Plan(
        parts,
        settings,
        arguments.context,
        positions,
        lengths,
        arguments.cases,
        arguments.prompts,
        arguments.tokens,
        arguments.sketch_bits,
    )


def _check_calibrate(arguments: argparse.Namespace) -> None:
    """Refuses, before anything is loaded, what a calibration can't do."""
    if not arguments.calibrate:
        if arguments.calibrate_kl:
            raise SystemExit("--calibrate-kl: got no --calibrate with it; needs one, whose budget it is")
        return
    if len(arguments.eps) != 1 or arguments.eps[0] == 0:
        given = ",".join(f"{eps:g}" for eps in arguments.eps)
        raise SystemExit(f"--eps: got {given}; needs one number above 0, the target of --calibrate")
    if arguments.calibrate.is_dir() or not arguments.calibrate.parent.is_dir():
        raise SystemExit(f"--calibrate: got {arguments.calibrate}; needs the path of a file, in a folder that exists")


def _from_file(arguments: argparse.Namespace, layers: int) -> Setting:
    """What --layer-eps has, for a model of so many layers."""
    try:
        found = read_layer_eps(arguments.layer_eps, "--layer-eps")
        check_layers(found.eps, arguments.dense_layers, layers)
        check_bits(found, arguments.sketch_bits, arguments.layer_eps, "--layer-eps")
    except ValueError as error:
        raise SystemExit(str(error)) from None
    return _by_layer(Setting(found.target, arguments.newest, arguments.dense_layers), found)


def _by_layer(setting: Setting, found: LayerEps) -> Setting:
    return replace(setting, layer_eps=tuple(found.eps.items()))


def _advice(calibration: Calibration) -> list[str]:
    lines = []
    if calibration.over:
        lines.append(
            f"Warning: together the layers cost more than {calibration.budget:.4g} nats a token in "
            f"{', '.join(calibration.over)}. A smaller --calibrate-kl may help."
        )
    dense = [str(layer) for layer, eps in calibration.found.eps.items() if eps == 0]
    if dense:
        lines.append(
            f"Layers {', '.join(dense)} have an eps of 0. In dense_layers they read as much and keep no sketches."
        )
    return lines


def _check_extra() -> None:
    for module, purpose in EXTRA.items():
        if importlib.util.find_spec(module) is None:
            raise SystemExit(
                f"{module}, for {purpose}, is not installed: pip install 'lite-attention[quality]' "
                f"(or pip install {' '.join(EXTRA)})"
            )


def _list(one: Callable[[str], object]) -> Callable[[str], tuple]:
    """A parser of values with commas between them."""

    def parse(text: str) -> tuple:
        return tuple(one(word.strip()) for word in text.split(","))

    parse.__name__ = f"list of {one.__name__.strip('_')}"
    return parse


def _eps(text: str) -> float:
    try:
        eps = float(text)
    except ValueError:
        eps = -1.0
    if not 0 <= eps < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}; needs numbers from 0, which lists everything, to below 1")
    return eps


def _nats(text: str) -> float:
    try:
        nats = float(text)
    except ValueError:
        nats = 0.0
    if not 0 < nats < math.inf:
        raise argparse.ArgumentTypeError(f"got {text!r}; needs a number above 0")
    return nats


def _part(text: str) -> str:
    if text not in PARTS:
        raise argparse.ArgumentTypeError(f"got {text!r}; needs some of {', '.join(PARTS)}")
    return text


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"got {text!r}; needs a whole number of 1 or more")
    return int(text)

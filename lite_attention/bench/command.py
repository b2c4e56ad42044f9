"""The command line of the benchmark."""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path

import torch

from lite_attention import ops
from lite_attention.bench.ceilings import measure_ceilings
from lite_attention.bench.environment import environment
from lite_attention.bench.measure import Measurement
from lite_attention.bench.peers import NAMES, find_peers
from lite_attention.bench.results import RowResult, Run
from lite_attention.bench.rows import Row, select
from lite_attention.bench.timing import CudaClock, cpu_clock

CPU_SCALE = 1 / 128
MOST_SCALE = {"cuda": 1.0, "cpu": 1 / 16}  # rows are as large as a GPU takes; a CPU would be at it for hours
EXTRA = {"rich": "progress and tables", "matplotlib": "the picture"}
JSON, TABLE, PICTURE = "results.json", "README.md", "rates.png"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--list", action="store_true", help="print the rows, their shapes and targets, and end")
    parser.add_argument(
        "--only", action="append", metavar="PATTERN", help="rows whose name matches this glob; may be given again"
    )
    parser.add_argument("--out", type=Path, default=Path("bench-results"), metavar="DIR", help="default: %(default)s")
    parser.add_argument(
        "--repetitions", type=_count, default=20, metavar="N", help="of each contender and row; default: %(default)s"
    )
    parser.add_argument(
        "--peers", metavar="NAMES", help=f"some of {','.join(NAMES['cuda'])}, or none; default: all that can be used"
    )
    parser.add_argument("--fa3", type=Path, metavar="PATH", help="FA3's library; default: that of an installed vLLM")
    parser.add_argument("--device", choices=tuple(NAMES), default="cuda", help="default: %(default)s")
    parser.add_argument(
        "--scale", type=float, metavar="FACTOR", help="of sequence lengths; default: 1, on the CPU 1/128"
    )
    parser.add_argument("--commit", help="what is being measured; default: git's HEAD")


def run(arguments: argparse.Namespace) -> int:
    """Checks LiteAttention against FA3, FA4, cuDNN and the reference, times it beside them, and writes a report.

    The exit status is 1 where a result was wrong or could not be had. A missed target is no error.
    """
    rows = select(arguments.only)
    if arguments.list:
        print("\n".join(map(_described, rows)))
        return 0
    return _measure(arguments, rows)


def _measure(arguments: argparse.Namespace, rows: list[Row]) -> int:
    _check_extra()
    _check_device(arguments.device)
    scale = _scale(arguments)
    peers, missing = find_peers(arguments.device, arguments.peers, arguments.fa3)
    arguments.out.mkdir(parents=True, exist_ok=True)

    from lite_attention.bench.picture import draw  # with `rich` and `matplotlib` there, as checked
    from lite_attention.bench.table import markdown
    from lite_attention.bench.terminal import Screen

    device, screen = torch.device(arguments.device), Screen()
    clock = CudaClock() if device.type == "cuda" else cpu_clock
    found = Run(
        environment(device, arguments.commit),
        device.type,
        scale,
        arguments.repetitions,
        measure_ceilings(device, arguments.repetitions, clock),
        {peer.name: peer.identity() for peer in peers},
        missing,
    )
    for name, value in (*found.environment.items(), ("ceilings", str(found.ceilings)), *found.peers.items()):
        screen.say(f"{name}: {value}")
    for name, reason in missing.items():
        screen.say(f"{name} takes no part: {reason}")

    with screen.progress(len(rows)) as (tell, done):
        measurement, lost = Measurement(device, peers, arguments.repetitions, clock, tell), None
        for row in rows:
            shape = row.shape.scaled(scale) if scale != 1 else row.shape
            if lost is None:
                result = measurement.measure(row, shape)
                lost = measurement.lost()
            else:
                result = RowResult(row, shape, "not run", f"the device was lost: {lost}")
            found.rows.append(result)
            found.write(arguments.out / JSON)  # each time: a run that is cut short has what it measured
            done(result)

    (arguments.out / PICTURE).unlink(missing_ok=True)  # of a run before
    drawn = draw(found, arguments.out / PICTURE)
    (arguments.out / TABLE).write_text(markdown(found, PICTURE if drawn else None))
    screen.table(found)
    screen.say(f"Written to {arguments.out}: {', '.join((JSON, TABLE, PICTURE) if drawn else (JSON, TABLE))}")
    if found.wrong:
        screen.say(f"WRONG: {', '.join(f'{one.row.name} ({one.status})' for one in found.wrong)}")
    return 1 if found.wrong else 0


def _described(row: Row) -> str:
    return f"{row.name:<31} {row.shape!s:<77} needs {', '.join(map(str, row.targets)) or 'nothing'}"


def _check_extra() -> None:
    for module, purpose in EXTRA.items():
        if importlib.util.find_spec(module) is None:
            raise SystemExit(
                f"{module}, for {purpose}, is not installed: pip install 'lite-attention[bench]' "
                f"(or pip install {' '.join(EXTRA)})"
            )


def _check_device(device: str) -> None:
    if device == "cpu":
        return
    if not torch.cuda.is_available():
        raise SystemExit(
            "--device: got cuda, and there is no CUDA GPU; needs a Hopper GPU, or --device cpu, "
            "which runs everything but the kernels on small shapes"
        )
    if torch.cuda.get_device_capability() != (9, 0):
        raise SystemExit(f"--device: got cuda, which is {torch.cuda.get_device_name()}; needs a Hopper GPU")
    if ops.EXTENSION_MISSING is not None:
        raise SystemExit(
            f"--device: got cuda, but LiteAttention's CUDA extension is not there: {ops.EXTENSION_MISSING}"
        )


def _scale(arguments: argparse.Namespace) -> float:
    if arguments.scale is None:
        return 1.0 if arguments.device == "cuda" else CPU_SCALE
    most = MOST_SCALE[arguments.device]
    if not 0 < arguments.scale <= most:
        raise SystemExit(f"--scale: got {arguments.scale:g}; on {arguments.device} needs more than 0, at most {most:g}")
    return arguments.scale


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"got {text!r}; needs a whole number of 1 or more")
    return int(text)

"""What Nsight Compute counts of the benchmark's rows: where the time of a kernel goes.

    python benchmarks/counters.py OUT --rows varlen-64x128-32k,decode-b1-8k [--fa3 _vllm_fa3_C.abi3.so]

For each row and each of ours, own contiguous and FA3 one call is counted, after two that are not, on a Hopper GPU whose
counters may be read. OUT gets counters.csv, with all that was counted, and counters.md. The GPU's clocks are left
alone; its caches are emptied before every pass, of which a call takes many, so that times are not the benchmark's.
"""

from __future__ import annotations

import argparse
import csv
import io
import os
import subprocess
import sys
import zlib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from lite_attention.bench.rows import Row, select  # noqa: E402
from lite_attention.bench.targets import OWN_CONTIGUOUS  # noqa: E402

SECTIONS = ("SpeedOfLight", "ComputeWorkloadAnalysis", "MemoryWorkloadAnalysis", "WarpStateStats", "LaunchStats")
READ = ("dram__bytes_read.sum", "lts__t_sectors_op_read.sum", "lts__t_sector_hit_rate.pct")
COLUMNS = {  # of the table, by metric
    "us": "gpu__time_duration.sum",
    "SM MHz": "gpc__cycles_elapsed.avg.per_second",
    "DRAM read, MB": "dram__bytes_read.sum",
    "DRAM, % of peak": "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed",
    "L2 read, MB": "lts__t_sectors_op_read.sum",
    "L2 hits, %": "lts__t_sector_hit_rate.pct",
    "tensor cores, %": "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_elapsed",
    "issue slots, %": "sm__inst_issued.avg.pct_of_peak_sustained_elapsed",
}
SCALES = {"nsecond": 1e-3, "ns": 1e-3, "usecond": 1.0, "us": 1.0, "msecond": 1e3, "ms": 1e3}
SCALES |= {"hz": 1e-6, "mhz": 1.0, "ghz": 1e3, "byte": 1e-6, "kbyte": 1e-3, "mbyte": 1.0, "gbyte": 1e3}
SCALES |= {"sector": 32e-6, "%": 1.0}
STALL = "smsp__average_warps_issue_stalled_"


BORDER = "arange"  # the kernel that is launched after each call, and that no call launches


def segments(rows: list[Row], with_fa3: bool) -> list[tuple[str, str]]:
    """Row and contender of each call that is counted, in their order."""
    found = []
    for row in rows:
        who = ["ours"] if row.skip is None else ["lists"]
        who += ["contiguous"] if row.needs(OWN_CONTIGUOUS) else []
        who += ["FA3"] if with_fa3 and row.skip is None else []
        found += [(row.name, each) for each in who]
    return found


def call_all(rows: list[Row], fa3: Path | None) -> None:
    """In the process that is counted: each call, with the profiler on for its last time and for the border's kernel."""
    import torch

    from lite_attention.bench.contenders import Ours, OwnContiguous
    from lite_attention.bench.inputs import make_inputs
    from lite_attention.bench.peer_fa3 import FA3

    peers = {"ours": Ours(), "contiguous": OwnContiguous(), "FA3": FA3(fa3)}
    if fa3 is not None and (reason := peers["FA3"].available()) is not None:
        raise SystemExit(f"--fa3: {reason}")
    for name, contender in segments(rows, fa3 is not None):
        row = next(row for row in rows if row.name == name)
        seed = zlib.crc32(name.encode())
        inputs = make_inputs(row.shape, torch.device("cuda"), seed)
        call = row.skip.prepare(inputs, seed) if contender == "lists" else peers[contender].prepare(inputs)
        for _ in range(2):
            call()
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
        call()
        torch.arange(1, device="cuda")
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()
        del inputs, call
        torch.cuda.empty_cache()


def count(rows: str, fa3: Path | None, seconds: float) -> str:
    """The CSV that Nsight Compute prints: a line for each kernel."""
    command = ["ncu", "--clock-control", "none", "--profile-from-start", "off", "--csv", "--page", "raw"]
    command += [word for section in SECTIONS for word in ("--section", section)] + ["--metrics", ",".join(READ)]
    command += [sys.executable, __file__, "--call", "--rows", rows, *(["--fa3", str(fa3)] if fa3 else [])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=seconds)
    lines = [line for line in done.stdout.splitlines() if line.startswith('"')]
    if done.returncode or len(lines) < 3:
        raise SystemExit(f"ncu: exit status {done.returncode}: {(done.stdout + done.stderr)[-1000:]}")
    return "\n".join(lines)


def kernels(text: str) -> list[tuple[dict[str, str], dict[str, str]]]:
    """Values of each kernel by metric, and their units."""
    names, units, *values = csv.reader(io.StringIO(text))
    return [(dict(zip(names, each, strict=True)), dict(zip(names, units, strict=True))) for each in values]


def cell(values: dict[str, str], units: dict[str, str], metric: str) -> str:
    found = values.get(metric, "")
    if not found:
        return "-"
    number = float(found.replace(",", "")) * SCALES.get(units[metric].lower(), 1.0)
    return f"{number:.1f}" if number < 1000 else f"{number:.0f}"


def stalls(values: dict[str, str]) -> str:
    """The three largest reasons why warps wait, in cycles of an issued instruction."""
    found = []
    for metric, value in values.items():
        if metric.startswith(STALL) and metric.endswith("_per_issue_active.ratio") and value:
            reason = metric.removeprefix(STALL).removesuffix("_per_issue_active.ratio")
            found.append((float(value.replace(",", "")), reason))
    return ", ".join(f"{reason} {cycles:.1f}" for cycles, reason in sorted(found, reverse=True)[:3])


def table(names: list[tuple[str, str]], text: str) -> str:
    head = ["row", "by", "kernel", *COLUMNS, "stalls, cycles an instruction"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    left = iter(names)
    row, contender = next(left)
    for values, units in kernels(text):
        name = (
            values["Kernel Name"]
            .removeprefix("void ")
            .replace("<unnamed>::", "")
            .split("(")[0]
            .split("<")[0]
            .split("::")[-1]
        )
        if BORDER in values["Kernel Name"]:
            row, contender = next(left, ("-", "-"))
            continue
        cells = [cell(values, units, metric) for metric in COLUMNS.values()]
        lines.append("| " + " | ".join([row, contender, name, *cells, stalls(values)]) + " |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path, nargs="?", default=Path("counters"))
    parser.add_argument("--rows", required=True, help="names of rows, with commas between")
    parser.add_argument("--fa3", type=Path, help="vLLM's _vllm_fa3_C.abi3.so; without it FA3 is not counted")
    parser.add_argument("--seconds", type=float, default=300, help="that all may take")
    parser.add_argument("--call", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    rows = select(arguments.rows.split(","))
    if arguments.call:
        call_all(rows, arguments.fa3)
        return 0
    text = count(arguments.rows, arguments.fa3, arguments.seconds)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "counters.csv").write_text(text)
    (arguments.out / "counters.md").write_text(table(segments(rows, arguments.fa3 is not None), text))
    return 0


if __name__ == "__main__":
    sys.exit(main())

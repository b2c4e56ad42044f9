"""What the benchmarks of vLLM have in common: steps of an engine timed and profiled, and a process for each engine."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from vllm_profile import kernels, read_trace

WARM_UP = 8  # steps that don't count
PROFILED = 8  # steps
MARK = "RESULT "  # before a result, among all that vLLM prints


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the benchmarks of vLLM take alike."""
    parser.add_argument("--steps", type=int, default=64, help="that are timed (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="without torch.compile, which takes a minute to start")
    parser.add_argument("--gpu-memory", type=float, help="share of the GPU's memory that the engine may take")
    parser.add_argument("--profile", action="store_true", help="then a few steps more, for the time of each kernel")
    parser.add_argument("--out", type=Path, help="a file for the results, JSON")
    parser.add_argument("--commit", default="unknown", help="what is being measured")


def handed_on(arguments: argparse.Namespace) -> list[str]:
    """Of `add_arguments` those that the process of an engine takes."""
    flags = [f"--{name}" for name in ("quick", "profile") if getattr(arguments, name)]
    memory = ["--gpu-memory", str(arguments.gpu_memory)] if arguments.gpu_memory else []
    return ["--steps", str(arguments.steps), *flags, *memory]


def time_steps(
    llm: object, prompts: list, params: object, steps: int, profile: bool = False
) -> tuple[dict, list[list[int]]]:
    """Prefills all prompts, then times steps in which every request gets a token.

    Requests come at once, as to `LLM.generate`: the first of them decode while the last are prefilled, and are to have
    tokens left. Returns the times, and the tokens of each request so far. With `profile`, an engine that was made with
    `profiler_config()` runs a few steps more.
    """
    engine = llm.llm_engine
    start = time.perf_counter()
    for i, prompt in enumerate(prompts):
        engine.add_request(str(i), {"prompt_token_ids": prompt}, params)
    tokens: dict[str, list[int]] = {}
    told = 0
    while len(tokens) < len(prompts):
        _take(engine.step(), tokens)
        if len(tokens) >= min(told + 16, len(prompts)):
            told = len(tokens)
            print(f"{told} of {len(prompts)} requests decode, {time.perf_counter() - start:.1f} s", flush=True)
    prefill = time.perf_counter() - start
    times = []
    for _ in range(WARM_UP + steps):
        start = time.perf_counter()
        got = _take(engine.step(), tokens)
        times.append(1000 * (time.perf_counter() - start))
        assert got == len(prompts), f"{got} of {len(prompts)} requests got a token"
    times = times[WARM_UP:]
    found = {
        "ms_per_token": statistics.median(times),
        "ms_quartiles": statistics.quantiles(times, n=4),
        "steps": steps,
        "prefill_s": prefill,
    }
    if profile:
        found["kernels"] = _profiled(engine, tokens)
    return found, [tokens[str(i)] for i in range(len(prompts))]


def profiler_config(profile: bool) -> dict:
    """An argument of `LLM`, for `time_steps` with `profile`."""
    if not profile:
        return {}
    config = {
        "profiler": "torch",
        "torch_profiler_dir": tempfile.mkdtemp(prefix="profile-"),  # workers of other processes write there
        "torch_profiler_with_stack": False,
        "torch_profiler_dump_cuda_time_total": False,
    }
    return {"profiler_config": config}


def _profiled(engine: object, tokens: dict) -> dict:
    """Where the GPU time of some steps goes; of several GPUs, the first one's. No reason to lose what was timed."""
    config = engine.vllm_config
    try:
        engine.start_profile()
        for _ in range(PROFILED):
            _take(engine.step(), tokens)
        engine.stop_profile()
        traces = sorted(Path(config.profiler_config.torch_profiler_dir).glob("*.json*"))
        return kernels(read_trace(traces[0]), config.model_config.get_total_num_hidden_layers())
    except Exception as error:
        print(f"no profile: {type(error).__name__} {error}", flush=True)
        return {}


def _take(outputs: list, tokens: dict[str, list[int]]) -> int:
    """Keeps the tokens of a step's outputs; returns how many requests got one."""
    got = 0
    for output in outputs:
        so_far = output.outputs[0].token_ids
        got += len(so_far) > len(tokens.get(output.request_id, ()))
        if so_far:
            tokens[output.request_id] = list(so_far)
    return got


def counted() -> dict:
    """What lists have read so far, in the processes of this engine."""
    import lite_attention

    time.sleep(2.5)  # until the counters are brought up to date
    stats = lite_attention.stats()
    return {
        "pages_read": stats.read / max(stats.visible, 1),
        "left_out_estimate": stats.left_out,
        "rows_listed": stats.rows_listed,
        "rows_dense": stats.rows_dense,
        "sketch_bytes": stats.sketch_bytes,
        "read_by_layers": stats.read_by_layers,
    }


def machine() -> dict:
    """The GPU and the versions, without touching the GPU, or the imports that take as long as an engine's start."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader", "--id=0"]
    name, driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip().split(", ")
    versions = {package: importlib.metadata.version(package) for package in ("torch", "vllm")}
    return {"gpu": name, "driver": driver} | versions


def report(result: dict) -> None:
    """Hands a result to the process that runs this one."""
    print(f"\n{MARK}{json.dumps(result)}", flush=True)


def wait_for_turn() -> None:
    """In a process of `Engines`: imports what an engine will, then waits until the one before has ended.

    What runs on the GPU is not imported: it might initialise CUDA, after which vLLM no longer forks.
    """
    import vllm.v1.engine.core  # noqa: F401
    from vllm import LLM  # noqa: F401

    if not sys.stdin.readline():
        sys.exit("the process that gives turns has ended")


class Engines:
    """A process for each engine: they import side by side and compute in turn."""

    def __init__(self, commands: dict[str, list[str]], **variables: str) -> None:
        environment = os.environ | {"PYTHONUNBUFFERED": "1"} | variables
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self._waiting = {
            name: subprocess.Popen([sys.executable, *command], env=environment, **pipes)
            for name, command in commands.items()
        }

    def __enter__(self) -> Engines:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._waiting.values():
            process.kill()

    def run(self, name: str) -> dict:
        """What an engine hands to `report`. The rest of its output goes on to this process's stderr."""
        result = None
        with self._waiting.pop(name) as process:
            process.stdin.write("your turn\n")
            process.stdin.flush()
            for line in process.stdout:
                if line.startswith(MARK):
                    result = json.loads(line.removeprefix(MARK))
                else:
                    print(f"{name}: {line}", end="", file=sys.stderr, flush=True)
        if process.returncode or result is None:
            raise RuntimeError(f"{name} ended with {process.returncode}")
        return result


def kept(out: Path | None) -> dict[str, dict]:
    """Results of a run before, by what was run; none where there is no file."""
    return json.loads(out.read_text()) if out and out.exists() else {}


def keep(out: Path | None, results: dict[str, dict]) -> None:
    """Each time: a run that is cut short has what it measured."""
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(results, indent=1))

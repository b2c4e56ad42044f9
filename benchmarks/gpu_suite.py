"""Runs the GPU test suite on a Hopper machine and writes down what passed, on which GPU, with which versions.

    python benchmarks/gpu_suite.py run kernels --commit "$(git rev-parse HEAD)" --out results/
    python benchmarks/gpu_suite.py run memcheck --out results/      # compute-sanitizer, one case of each kernel;
                                                                    # racecheck and synccheck likewise
    python benchmarks/gpu_suite.py run errors --out results/        # beside FA3's, which an installed vLLM has, or
                                                                    # which LITE_ATTENTION_FA3 names
    python benchmarks/gpu_suite.py run vllm --out results/          # needs vLLM, and LiteAttention installed beside it
    python benchmarks/gpu_suite.py run memcheck --shard 2/8 --out results/    # one of eight runs that share the tests
    python benchmarks/gpu_suite.py merge results/                   # puts these together
    python benchmarks/gpu_suite.py table results/*.json             # a table in Markdown, to be committed

benchmarks/gpu_fleet.py does all of it on all GPUs of a machine. A part's JSON holds the outcome of every test, what
tests have measured, and what a sanitizer summed up. The exit status is that of pytest.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter, defaultdict
from pathlib import Path

import torch
from shard import part_of

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
TESTED = ("hopper", "hopper_runtime", "hopper_fp8", "hopper_skip", "hopper_pages", "hopper_page_decode", "module_gpu")
KERNEL_TESTS = [f"tests/gpu/test_{name}.py" for name in TESTED]
VLLM_TESTS = [f"tests/gpu/test_vllm_{name}.py" for name in ("isolation", "models", "loads", "gpu")]
PARTS = {
    "kernels": ([], KERNEL_TESTS),
    "two_gpus": ([], ["tests/gpu/test_module_gpu.py", "-k", "nccl"]),
    "errors": ([], ["tests/gpu/test_beside_fa3.py"]),
    "vllm": ([], VLLM_TESTS),
} | {
    tool: (
        ["compute-sanitizer", "--tool", tool, "--print-limit", "0", "--error-exitcode", "1"],  # all that is found
        ["tests/gpu/test_sanitized.py"],
    )
    for tool in ("memcheck", "racecheck", "synccheck")
}
# Each tensor an allocation of its own: inside of a cached block memcheck sees no access past a tensor's end.
SANITIZER_ENVIRONMENT = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
SUMMARY = re.compile(r"((?:ERROR|RACECHECK) SUMMARY: .*)")


def environment(commit: str) -> dict[str, str]:
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader", "--id=0"]
    name, driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip().split(", ")
    found = {"gpu": name, "driver": driver, "torch": torch.__version__, "python": sys.version.split()[0]}
    try:
        import vllm

        found["vllm"] = vllm.__version__
    except ImportError:
        pass
    return found | {"commit": commit, "date": time.strftime("%Y-%m-%d", time.gmtime())}


def run(part: str, commit: str, out: Path, extra: list[str], shard: tuple[int, int] = (1, 1)) -> int:
    wrapper, tests = PARTS[part]
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch, "report.xml")
        command = [*wrapper, sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}"]
        variables = os.environ | {"PYTHONUNBUFFERED": "1"} | (SANITIZER_ENVIRONMENT if wrapper else {})
        if shard != (1, 1):
            command += ["-p", "shard", f"--shard={shard[0]}/{shard[1]}"]
            variables["PYTHONPATH"] = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
        began = time.monotonic()
        printed, status = followed([*command, *tests, *extra], variables)
        seconds = time.monotonic() - began
        outcomes, measured = {}, {}
        # No report where the process itself ended, as on an error that a sanitizer ends a kernel with.
        for case in ElementTree.parse(report).iter("testcase") if report.exists() else ():
            name = f"{case.get('classname')}::{case.get('name')}"
            kinds = {child.tag for child in case} & {"failure", "error", "skipped"}
            outcomes[name] = kinds.pop() if kinds else "passed"
            if found := {each.get("name"): float(each.get("value")) for each in case.iter("property")}:
                measured[name] = found
    result = {"part": part, "exit": status, "seconds": round(seconds, 1), "outcomes": outcomes}
    if measured:
        result["measured"] = measured
    if summed_up := SUMMARY.findall(printed):
        result["sanitizer"] = summed_up
    out.mkdir(parents=True, exist_ok=True)
    name = part if shard == (1, 1) else f"{part}-{shard[0]}-of-{shard[1]}"
    (out / f"{name}.json").write_text(json.dumps(environment(commit) | result, indent=1))
    return status


def followed(command: list[str], variables: dict[str, str]) -> tuple[str, int]:
    """Runs it; what it printed, which is printed here as well, and its exit status."""
    lines = []
    with subprocess.Popen(
        command, cwd=ROOT, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as process:
        for line in process.stdout:
            lines.append(line)
            print(line, end="", flush=True)
    return "".join(lines), process.returncode


def merge(out: Path) -> list[Path]:
    """Makes PART.json of each part's PART-I-of-N.json, which go; it says which runs are missing."""
    shards = defaultdict(dict)
    for file in sorted(out.glob("*-of-*.json")):
        if found := re.fullmatch(r"(.+)-(\d+)-of-(\d+)", file.stem):
            shards[found[1], int(found[3])][int(found[2])] = file
    merged = []
    for (part, count), files in shards.items():
        results = [json.loads(files[i].read_text()) for i in sorted(files)]
        whole = results[0] | {
            "exit": max((result["exit"] for result in results), key=abs),
            "seconds": round(sum(result["seconds"] for result in results), 1),
            "runs": len(results),
            "outcomes": {name: each for result in results for name, each in result["outcomes"].items()},
        }
        if measured := {name: each for result in results for name, each in result.get("measured", {}).items()}:
            whole["measured"] = measured
        if summed_up := [text for result in results for text in result.get("sanitizer", ())]:
            whole["sanitizer"] = summed_up
        if absent := [f"{i}/{count}" for i in range(1, count + 1) if i not in files]:
            whole["missing"] = absent
        for key in ("gpu", "driver", "commit"):
            whole[key] = " and ".join(sorted({result[key] for result in results}))
        merged.append(out / f"{part}.json")
        merged[-1].write_text(json.dumps(whole, indent=1))
        for file in files.values():
            file.unlink()
    return merged


def table(files: list[Path]) -> str:
    """Tests by function, with the environment of each part above."""
    lines = []
    for file in files:
        result = json.loads(file.read_text())
        where = ", ".join(f"{name} {result[name]}" for name in ("driver", "torch", "python", "vllm") if name in result)
        counts = Counter((re.sub(r"\[.*", "", name), outcome) for name, outcome in result["outcomes"].items())
        lines += [
            f"## {result['part']}",
            "",
            f"{result['gpu']}, {where}; commit {result['commit']}, {result['date']}; "
            f"{result['seconds']} s{_in_runs(result)}, exit status {result['exit']}.",
            "",
            "| test | passed | failed | skipped |",
            "|---|---|---|---|",
        ]
        for test in dict.fromkeys(name for name, _ in counts):
            failed = counts[test, "failure"] + counts[test, "error"]
            lines.append(f"| {test} | {counts[test, 'passed']} | {failed} | {counts[test, 'skipped']} |")
        lines.append("")
        if "sanitizer" in result:
            summed_up = Counter(result["sanitizer"])
            lines += [*(f"`{text}`" + (f" ({n} times)" if n > 1 else "") for text, n in summed_up.items()), ""]
    return "\n".join(lines)


def _in_runs(result: dict) -> str:
    missing = f", without {', '.join(result['missing'])}" if "missing" in result else ""
    return f" in {result['runs']} runs together{missing}" if "runs" in result else ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("run", help="run one part of the suite")
    one.add_argument("part", choices=PARTS)
    one.add_argument("--commit", default="unknown", help="what is being tested")
    one.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    one.add_argument("--shard", type=part_of, default=(1, 1), metavar="I/N", help="every N-th test, from the I-th on")
    several = commands.add_parser("merge", help="put together what runs with --shard wrote")
    several.add_argument("out", type=Path)
    both = commands.add_parser("table", help="a Markdown table of what `run` wrote")
    both.add_argument("files", type=Path, nargs="+")
    arguments, extra = parser.parse_known_args()
    if arguments.command == "table":
        print(table(arguments.files))
        return 0
    if arguments.command == "merge":
        print("\n".join(map(str, merge(arguments.out))))
        return 0
    return run(arguments.part, arguments.commit, arguments.out, extra, arguments.shard)


if __name__ == "__main__":
    sys.exit(main())

"""Runs the GPU test suite on a Hopper machine and writes down what passed, on which GPU, with which versions.

    python benchmarks/gpu_suite.py run kernels --commit "$(git rev-parse HEAD)" --out results/
    python benchmarks/gpu_suite.py run memcheck --out results/      # compute-sanitizer, one case of each kernel;
                                                                    # racecheck and synccheck likewise
    python benchmarks/gpu_suite.py run errors --out results/        # beside FA3's, which an installed vLLM has, or
                                                                    # which LITE_ATTENTION_FA3 names
    python benchmarks/gpu_suite.py run vllm --out results/          # needs vLLM, and LiteAttention installed beside it
    python benchmarks/gpu_suite.py table results/*.json             # a table in Markdown, to be committed

A part's JSON holds the outcome of every test, and what tests have measured. The exit status is that of pytest.
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
from collections import Counter
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
TESTED = ("hopper", "hopper_runtime", "hopper_fp8", "hopper_skip", "hopper_pages", "module_gpu")
KERNEL_TESTS = [f"tests/gpu/test_{name}.py" for name in TESTED]
PARTS = {
    "kernels": ([], KERNEL_TESTS),
    "errors": ([], ["tests/gpu/test_beside_fa3.py"]),
    "vllm": ([], ["tests/gpu/test_vllm_isolation.py", "tests/gpu/test_vllm_gpu.py"]),
} | {
    tool: (["compute-sanitizer", "--tool", tool, "--error-exitcode", "1"], ["tests/gpu/test_sanitized.py"])
    for tool in ("memcheck", "racecheck", "synccheck")
}
# Each tensor an allocation of its own: inside of a cached block memcheck sees no access past a tensor's end.
SANITIZER_ENVIRONMENT = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}


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


def run(part: str, commit: str, out: Path, extra: list[str]) -> int:
    wrapper, tests = PARTS[part]
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch, "report.xml")
        command = [*wrapper, sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}"]
        began = time.monotonic()
        variables = os.environ | {"PYTHONUNBUFFERED": "1"} | (SANITIZER_ENVIRONMENT if wrapper else {})
        done = subprocess.run([*command, *tests, *extra], cwd=ROOT, env=variables)
        seconds = time.monotonic() - began
        outcomes, measured = {}, {}
        # No report where the process itself ended, as on an error that a sanitizer ends a kernel with.
        for case in ElementTree.parse(report).iter("testcase") if report.exists() else ():
            name = f"{case.get('classname')}::{case.get('name')}"
            kinds = {child.tag for child in case} & {"failure", "error", "skipped"}
            outcomes[name] = kinds.pop() if kinds else "passed"
            if found := {each.get("name"): float(each.get("value")) for each in case.iter("property")}:
                measured[name] = found
    result = {"part": part, "exit": done.returncode, "seconds": round(seconds, 1), "outcomes": outcomes}
    if measured:
        result["measured"] = measured
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{part}.json").write_text(json.dumps(environment(commit) | result, indent=1))
    return done.returncode


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
            f"{result['seconds']} s, exit status {result['exit']}.",
            "",
            "| test | passed | failed | skipped |",
            "|---|---|---|---|",
        ]
        for test in dict.fromkeys(name for name, _ in counts):
            failed = counts[test, "failure"] + counts[test, "error"]
            lines.append(f"| {test} | {counts[test, 'passed']} | {failed} | {counts[test, 'skipped']} |")
        lines.append("")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("run", help="run one part of the suite")
    one.add_argument("part", choices=PARTS)
    one.add_argument("--commit", default="unknown", help="what is being tested")
    one.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    both = commands.add_parser("table", help="a Markdown table of what `run` wrote")
    both.add_argument("files", type=Path, nargs="+")
    arguments, extra = parser.parse_known_args()
    if arguments.command == "table":
        print(table(arguments.files))
        return 0
    return run(arguments.part, arguments.commit, arguments.out, extra)


if __name__ == "__main__":
    sys.exit(main())

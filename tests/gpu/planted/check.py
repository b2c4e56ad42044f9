"""Runs the accuracy tests with each library of build.py and prints which tests caught which bug.

    python tests/gpu/planted/check.py LIBRARIES OUT.json      # on a Hopper GPU

The exit status is 0 where every bug is caught and the kernels without one pass. A bug that leaves the kernel waiting is
caught by the clock.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
# What the libraries have is one head dim in bfloat16; the rest of these tests runs with others.
TESTS = ["tests/gpu/test_hopper.py", "tests/gpu/test_hopper_runtime.py"]
CHOSEN = "(128-bf16 or decode-128 or prefill-128 or test_graph_follows or test_two_graphs) and not fp16"
SECONDS = 60  # the sound kernels take 35 beside three others
AT_ONCE = 4


def run(library: Path) -> dict:
    """Outcome, and the tests that failed, for a copy of this tree's package with `library` in it."""
    with tempfile.TemporaryDirectory() as scratch:
        shutil.copytree(ROOT / "lite_attention", Path(scratch, "lite_attention"), ignore=shutil.ignore_patterns("*.so"))
        shutil.copytree(ROOT / "tests", Path(scratch, "tests"))
        shutil.copy(ROOT / "pyproject.toml", scratch)
        shutil.copy(library, Path(scratch, "lite_attention", "_C.abi3.so"))
        report = Path(scratch, "report.xml")
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}"]
        command += ["-k", CHOSEN, "--maxfail=3", *TESTS]
        began = time.monotonic()
        process = subprocess.Popen(
            command,
            cwd=scratch,
            env=os.environ | {"PYTHONPATH": scratch},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            process.wait(SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return {"outcome": "hangs", "seconds": SECONDS, "failed": []}
        cases = list(ElementTree.parse(report).iter("testcase")) if report.exists() else []
        failed = [case.get("name") for case in cases if {child.tag for child in case} & {"failure", "error"}]
        outcome = "passes" if process.returncode == 0 else "fails"
        seconds = round(time.monotonic() - began, 1)
        return {"outcome": outcome, "seconds": seconds, "tests": len(cases), "failed": failed}


def main(libraries: Path, out: Path) -> int:
    paths = sorted(libraries.glob("*.so"))
    with ThreadPoolExecutor(AT_ONCE) as pool:
        found = dict(zip((path.stem for path in paths), pool.map(run, paths), strict=True))
    out.write_text(json.dumps(found, indent=1))
    for name, result in found.items():
        by = f"{len(result['failed'])} tests failed, {', '.join(result['failed'][:3])}"
        print(f"{name}: {result['outcome']} in {result['seconds']} s; {by}")
    missed = [name for name, result in found.items() if (result["outcome"] == "passes") != (name == "sound")]
    print("not as it should be:", missed)
    return len(missed)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve()))

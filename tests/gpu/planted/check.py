"""Runs the accuracy tests with each library of build.py and prints which tests caught which bug.

    python tests/gpu/planted/check.py LIBRARIES OUT.json                 # on a Hopper GPU
    python tests/gpu/planted/check.py LIBRARIES OUT.json NAME TESTS      # one library, one of the sets of tests below

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

from bugs import BUGS

ROOT = Path(__file__).resolve().parents[3]
# What the libraries have is one head dim, in bfloat16 or over FP8 queries; the rest of these tests runs with others.
TESTS = {
    "dense": (
        ["tests/gpu/test_hopper.py", "tests/gpu/test_hopper_runtime.py"],
        "(128-bf16 or decode-128 or prefill-128 or (full_rounds and 128) or test_graph_follows or test_two_graphs) "
        "and not fp16",
    ),
    "skip": (
        ["tests/gpu/test_hopper_skip.py"],
        "(128-bf16 or (many_lengths and 128-) or (many_items and 128) or (infinity and 128) or not_to_change "
        "or (forced and 128)) and not fp16",
    ),
    "pages": (
        ["tests/gpu/test_hopper_pages.py"],
        "(128-bf16 and not fp8) or (sketches and bf16) or budget or border or equal_rank or list_everything or "
        "speculative or graph or several or far_the_first or knee or has_no_room or garbage or "
        "(does_not_see and not fp8)",
    ),
    "decode": (
        ["tests/gpu/test_hopper_page_decode.py"],
        "128-4-3-bf16 or 128-7-3-bf16 or 128-8-1-bf16 or (many_workers and 128-1-16bit) or (thousand and own) or "
        "(lists_nothing and 128 and 16bit-plain) or no_keys or eps_0 or marks or no_queries or padding_rows or "
        "one_after_another or (share_plan and mixed) or (dense_to_lists and 128 and 16bit) or starts_after",
    ),
    "fp8": (["tests/gpu/test_hopper_fp8.py"], "128-fp8 or (products and 128)"),
}
SOUND = "sound"
SECONDS = 100  # the sound kernels take 35 beside three others, and what full_rounds has, by a guess, 20 more
AT_ONCE = 4


def tests_of(name: str) -> list[str]:
    """The names in TESTS that a library is to go through."""
    return list(TESTS) if name == SOUND else [next(bug.tests for bug in BUGS if bug.name == name)]


def run(library: Path, tests: str) -> dict:
    """Outcome, and the tests that failed, for a copy of this tree's package with `library` in it."""
    files, chosen = TESTS[tests]
    with tempfile.TemporaryDirectory() as scratch:
        shutil.copytree(ROOT / "lite_attention", Path(scratch, "lite_attention"), ignore=shutil.ignore_patterns("*.so"))
        shutil.copytree(ROOT / "tests", Path(scratch, "tests"))
        shutil.copy(ROOT / "pyproject.toml", scratch)
        shutil.copy(library, Path(scratch, "lite_attention", "_C.abi3.so"))
        report = Path(scratch, "report.xml")
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}"]
        command += ["-k", chosen, "--maxfail=3", *files]
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


def missed(found: dict[str, dict]) -> list[str]:
    """What is not as it should be, of results by library, or by library/tests for the sound one."""
    return [name for name, result in found.items() if (result["outcome"] == "passes") != name.startswith(SOUND)]


def main(libraries: Path, out: Path, name: str | None = None, chosen: str | None = None) -> int:
    paths = [path for path in sorted(libraries.glob("*.so")) if name in (None, path.stem)]
    jobs = [(path, tests) for path in paths for tests in tests_of(path.stem) if chosen in (None, tests)]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        results = pool.map(lambda job: run(*job), jobs)
        keys = (f"{SOUND}/{tests}" if path.stem == SOUND else path.stem for path, tests in jobs)
        found = dict(zip(keys, results, strict=True))
    out.write_text(json.dumps(found, indent=1))
    for name, result in found.items():
        by = f"{len(result['failed'])} tests failed, {', '.join(result['failed'][:3])}"
        print(f"{name}: {result['outcome']} in {result['seconds']} s; {by}")
    print("not as it should be:", missed(found))
    return len(missed(found))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve(), *sys.argv[3:]))

"""Runs the parts of gpu_suite.py and the planted bugs on all GPUs of a machine, side by side.

    python benchmarks/gpu_fleet.py OUT --commit "$(git rev-parse HEAD)"       # all of it, on all GPUs
    python benchmarks/gpu_fleet.py OUT --gpus 0 --parts memcheck,racecheck    # or piece by piece on one
    python benchmarks/gpu_fleet.py OUT --parts planted --bugs mask-end-late   # some of the bugs

OUT gets PART.json, planted.json, and a log of each run in logs/. The libraries with planted bugs are compiled
meanwhile, which needs nvcc. The exit status is 0 where all that was asked for ran and is as it should be.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import gpu_suite

sys.path.append(str(gpu_suite.ROOT / "tests" / "gpu" / "planted"))

import bugs
import check

PLANTED = "planted"
# Longest first. Of the sanitizers' runs several go on a GPU: they keep it busy for a small part of their time.
RUNS_PER_GPU = {"racecheck": 3, "memcheck": 1, "synccheck": 1, "kernels": 1}
ONCE = ("errors", "two_gpus")
PARTS = (*RUNS_PER_GPU, *ONCE, PLANTED)
KERNEL_WORKERS = 8  # of pytest-xdist, on a GPU
KERNEL_PARTS = ("kernels", "errors")


@dataclass(frozen=True)
class Job:
    name: str
    command: tuple[str, ...]
    gpus: int = 1
    after: Path | None = None  # a file that must be there before


class Fleet:
    """Starts jobs in their order, `lanes` at a time on each GPU, each with a limit. `say` hears of them."""

    def __init__(self, gpus: list[str], lanes: int, logs: Path, say: Callable[[str], None]) -> None:
        self.gpus, self.lanes, self.logs, self.say = gpus, lanes, logs, say
        self.lock = threading.Lock()
        self.status: dict[str, int | str] = {}

    def run(self, jobs: list[Job], seconds: float, job_seconds: float, comes: Callable[[], bool]) -> dict:
        """The exit status of each job by its name, or why it has none. `comes`: whether what jobs wait for may come."""
        self.logs.mkdir(parents=True, exist_ok=True)
        self.waiting, self.end, self.job_seconds, self.comes = (
            list(jobs),
            time.monotonic() + seconds,
            job_seconds,
            comes,
        )
        threads = [
            threading.Thread(target=self._lane, args=(i,)) for _ in range(self.lanes) for i in range(len(self.gpus))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return self.status | {job.name: "not run" for job in self.waiting}

    def _lane(self, gpu: int) -> None:
        while time.monotonic() < self.end:
            may_come = self.comes()  # asked first: what came since is then seen
            with self.lock:
                job = next((job for job in self.waiting if job.after is None or job.after.exists()), None)
                if job is not None:
                    self.waiting.remove(job)
            if job is not None:
                self._one(job, gpu)
            elif self.waiting and may_come:
                time.sleep(0.5)
            else:
                return

    def _one(self, job: Job, gpu: int) -> None:
        visible = ",".join(self.gpus[(gpu + i) % len(self.gpus)] for i in range(job.gpus))
        began = time.monotonic()
        with open(self.logs / f"{job.name}.log", "w") as log:
            process = subprocess.Popen(
                job.command,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | {"CUDA_VISIBLE_DEVICES": visible},
                start_new_session=True,
            )
            try:
                status = process.wait(max(1.0, min(self.job_seconds, self.end - began)))
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                status = "ran out of time"
        with self.lock:
            self.status[job.name] = status
            self.say(f"{job.name} on {visible}: {status} after {time.monotonic() - began:.0f} s")


def suite_jobs(parts: list[str], gpus: int, commit: str, out: Path, extra: list[str]) -> list[Job]:
    jobs = []
    for part in (part for part in PARTS if part in parts and part != PLANTED):
        runs = RUNS_PER_GPU.get(part, 0) * gpus or 1
        command = [sys.executable, str(gpu_suite.HERE / "gpu_suite.py"), "run", part, "--commit", commit]
        command += ["--out", str(out), *extra]
        if part in KERNEL_PARTS:
            command += ["-n", str(KERNEL_WORKERS)]
        for i in range(1, runs + 1):
            shard = [] if runs == 1 else ["--shard", f"{i}/{runs}"]
            jobs.append(Job(f"{part}-{i}", (*command, *shard), 2 if part == "two_gpus" else 1))
    return jobs


def planted_jobs(libraries: Path, out: Path, names: list[str]) -> list[Job]:
    """One for each library, and for the sound one one for each set of tests."""
    script = str(gpu_suite.ROOT / "tests" / "gpu" / "planted" / "check.py")
    return [
        Job(
            f"{PLANTED}-{name}-{tests}",
            (sys.executable, script, str(libraries), str(out / f"{PLANTED}-{name}-{tests}.json"), name, tests),
            after=libraries / f"{name}.so",
        )
        for name in (check.SOUND, *names)
        for tests in check.tests_of(name)
    ]


def merge_planted(out: Path) -> dict[str, dict]:
    """Makes planted.json of what the runs of check.py wrote."""
    found = {}
    for file in sorted(out.glob(f"{PLANTED}-*.json")):
        found |= json.loads(file.read_text())
        file.unlink()
    if found:
        (out / f"{PLANTED}.json").write_text(json.dumps(found, indent=1))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--commit", default="unknown", help="what is being tested")
    parser.add_argument("--gpus", help="numbers with commas between; default: all")
    parser.add_argument("--lanes", type=int, default=3, help="runs at once on a GPU; default: %(default)s")
    parser.add_argument("--parts", default=",".join(PARTS), help="default: %(default)s")
    parser.add_argument("--bugs", help="of the planted ones, with commas between; default: all")
    parser.add_argument("--seconds", type=float, default=540, help="when all of it ends; default: %(default)s")
    parser.add_argument("--job-seconds", type=float, default=240, help="of one run; default: %(default)s")
    arguments, extra = parser.parse_known_args()
    parts = arguments.parts.split(",")
    if unknown := set(parts) - set(PARTS):
        parser.error(f"--parts: got {', '.join(sorted(unknown))}; needs some of {','.join(PARTS)}")
    names = arguments.bugs.split(",") if arguments.bugs else [bug.name for bug in bugs.BUGS]
    if unknown := set(names) - {bug.name for bug in bugs.BUGS}:
        parser.error(f"--bugs: got {', '.join(sorted(unknown))}; bugs.py has their names")
    gpus = arguments.gpus.split(",") if arguments.gpus else _all_gpus()
    out, began = arguments.out.resolve(), time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    if len(gpus) == 1 and "two_gpus" in parts:
        parts.remove("two_gpus")

    jobs, building = suite_jobs(parts, len(gpus), arguments.commit, out, extra), None
    if PLANTED in parts:
        libraries = out / "libraries"
        jobs += planted_jobs(libraries, out, names)
        with open(out / "build.log", "w") as log:
            script = str(gpu_suite.ROOT / "tests" / "gpu" / "planted" / "build.py")
            building = subprocess.Popen(
                ["nice", sys.executable, script, str(libraries), *names],
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
    fleet = Fleet(gpus, arguments.lanes, out / "logs", lambda text: print(f"{time.monotonic() - began:4.0f} s: {text}"))
    status = fleet.run(
        jobs, arguments.seconds, arguments.job_seconds, lambda: building is not None and building.poll() is None
    )
    if building is not None and building.poll() is None:
        os.killpg(building.pid, signal.SIGKILL)
    gpu_suite.merge(out)
    bad = {name: found for name, found in status.items() if found != 0}
    if PLANTED in parts:
        print("planted bugs that were not caught, or sound kernels that failed:", check.missed(merge_planted(out)))
    print(f"{len(status) - len(bad)} of {len(status)} runs as they should be, in {time.monotonic() - began:.0f} s")
    for name, found in bad.items():
        print(f"{name}: {found}")
    return 1 if bad else 0


def _all_gpus() -> list[str]:
    query = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)
    sys.exit(main())

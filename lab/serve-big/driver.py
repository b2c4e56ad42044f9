"""Runs the jobs of a plan on the GPUs of one machine, side by side, and packs what they leave whatever becomes of them.

    python driver.py PLAN --base DIR --out DIR --deadline 530 [--commit HASH] [--only a,b] [--stub]

A job has GPUs, a time limit and jobs that must have ended before. Its output goes to OUT/logs/NAME.log, its files to
OUT/NAME. Descendants of a job are noted all along, so that what has left its session is ended too.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

TELL_S = 20.0
PARTIAL_S = 90.0
MOST_LOG = 600_000


@dataclass
class Job:
    name: str
    command: str
    gpus: tuple = (0,)
    limit: float = 150.0
    after: tuple = ()
    env: dict = field(default_factory=dict)
    family: set = field(default_factory=set)
    process: subprocess.Popen | None = None
    began: float = 0.0
    ended: float | None = None
    status: str = "waits"


class Driver:
    def __init__(self, jobs, base: Path, out: Path, deadline: float, final: Path):
        self.jobs, self.base, self.out, self.final = jobs, base, out, final
        self.zero = time.monotonic()
        self.deadline = deadline
        (out / "logs").mkdir(parents=True, exist_ok=True)
        names = {job.name for job in jobs}
        for job in jobs:
            assert set(job.after) <= names, (job.name, job.after)

    @property
    def now(self) -> float:
        return time.monotonic() - self.zero

    def environment(self, job: Job) -> dict:
        cache = self.base / "cache" / job.name
        (cache / "vllm").mkdir(parents=True, exist_ok=True)
        temporary = self.base / "t" / job.name
        temporary.mkdir(parents=True, exist_ok=True)
        if (known := self.base / "cache/warm/modelinfos").is_dir():  # else each process inspects the model for 20 s
            subprocess.run(["cp", "-r", str(known), str(cache / "vllm") + "/"])
        return os.environ | {
            "CUDA_VISIBLE_DEVICES": ",".join(map(str, job.gpus)),
            "O": str(self.out / job.name),
            "TMPDIR": str(temporary),
            "VLLM_CACHE_ROOT": str(cache / "vllm"),
            "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
            "TRITON_CACHE_DIR": str(self.base / "cache/triton"),
            "XDG_CACHE_HOME": str(cache / "xdg"),
            "PYTHONUNBUFFERED": "1",
            "OMP_NUM_THREADS": "8",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_USE_FLASHINFER_SAMPLER": "0",
            "HF_HUB_OFFLINE": "1",
            # Multicast over NVLink is to stay off there, in whatever a library would do by itself.
            "NCCL_NVLS_ENABLE": "0",
            "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
            "NVSHMEM_DISABLE_NVLS": "1",
            "VLLM_ALLREDUCE_USE_SYMM_MEM": "0",
            **job.env,
        }

    def start(self, job: Job) -> None:
        (self.out / job.name).mkdir(exist_ok=True)
        log = open(self.out / "logs" / f"{job.name}.log", "wb")
        job.process = subprocess.Popen(
            ["bash", "-c", job.command],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=self.base / "repo",
            env=self.environment(job),
            start_new_session=True,
        )
        log.close()
        job.began, job.status = self.now, "runs"
        self.say(f"START {job.name} on GPU {job.gpus}")

    def say(self, text: str) -> None:
        line = f"[{self.now:5.0f}] {text}"
        print(line, flush=True)
        with open(self.out / "driver.log", "a") as file:
            print(line, file=file)

    def last_line(self, job: Job) -> str:
        path = self.out / "logs" / f"{job.name}.log"
        try:
            with open(path, "rb") as file:
                file.seek(max(0, path.stat().st_size - 3000))
                lines = [line for line in file.read().decode(errors="replace").splitlines() if line.strip()]
        except OSError:
            return ""
        return lines[-1].strip()[-150:] if lines else ""

    def note_families(self) -> None:
        """Adds to each job's family the processes that its members have started; a process is its id and its start."""
        parents, starts = {}, {}
        for entry in os.listdir("/proc"):
            if entry.isdigit():
                try:
                    fields = Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()
                except OSError:
                    continue
                parents[int(entry)], starts[int(entry)] = int(fields[1]), fields[19]
        self.starts = starts
        for job in self.jobs:
            if job.status == "runs":
                alive = {pid for pid, start in job.family if starts.get(pid) == start} | {job.process.pid}
                grew = True
                while grew:
                    more = {pid for pid, parent in parents.items() if parent in alive} - alive
                    alive |= more
                    grew = bool(more)
                job.family |= {(pid, starts[pid]) for pid in alive if pid in starts}

    def members(self, job: Job) -> list:
        self.note_families()
        return [pid for pid, start in job.family if self.starts.get(pid) == start]

    def end(self, job: Job, status: str, grace: float) -> None:
        """Asks a job that runs to end, then ends what is left of it."""
        if job.process.poll() is None:
            try:
                os.killpg(job.process.pid, signal.SIGTERM)
            except ProcessLookupError:
                pass
            wait = time.monotonic() + grace
            while job.process.poll() is None and time.monotonic() < wait:
                time.sleep(0.1)
        for pid in self.members(job):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        try:
            job.process.wait(5)
        except subprocess.TimeoutExpired:
            pass
        for trace in (self.base / "t" / job.name).glob("profile-*/*.json.gz"):
            if trace.stat().st_size < 1_000_000:
                trace.replace(self.out / job.name / trace.name)
        job.ended, job.status = self.now, status
        self.say(f"END {job.name}: {status}, {job.ended - job.began:.0f} s; {self.last_line(job)}")

    def pack(self, to: Path) -> None:
        """All small files and the ends of logs, in one archive that appears whole."""
        packed = self.base / "packed"
        subprocess.run(["rm", "-rf", str(packed)])
        packed.mkdir()
        for path in self.out.rglob("*"):
            if not path.is_file():
                continue
            target = packed / path.relative_to(self.out)
            size = path.stat().st_size
            if size > MOST_LOG and path.suffix not in (".log", ".txt"):
                if size > 6_000_000:
                    continue
            target.parent.mkdir(parents=True, exist_ok=True)
            data = path.read_bytes()
            if len(data) > MOST_LOG and path.suffix in (".log", ".txt"):
                data = data[: MOST_LOG // 3] + b"\n...\n" + data[-2 * MOST_LOG // 3 :]
            target.write_bytes(data)
        temporary = to.with_name(".tmp-" + to.name)
        subprocess.run(f"tar -C {packed} -cf - . | xz -T0 -2 > {temporary} && mv {temporary} {to}", shell=True)

    def run(self) -> None:
        told = partial = noted = self.now
        while True:
            for job in self.jobs:
                if job.status == "runs":
                    code = job.process.poll()
                    if code is not None:
                        self.end(job, f"rc {code}", 0)
                    elif self.now - job.began > job.limit:
                        self.end(job, "TOO LONG", 6)
            by_name = {job.name: job for job in self.jobs}
            for job in self.jobs:
                if job.status == "waits" and all(by_name[name].ended is not None for name in job.after):
                    self.start(job)
            if all(job.ended is not None for job in self.jobs):
                break
            if self.now > self.deadline:
                self.say("DEADLINE")
                # Together: each may take some seconds to end.
                for job in self.jobs:
                    if job.status == "runs":
                        try:
                            os.killpg(job.process.pid, signal.SIGTERM)
                        except ProcessLookupError:
                            pass
                time.sleep(3)
                for job in self.jobs:
                    if job.status == "runs":
                        self.end(job, "CUT OFF BY DEADLINE", 0)
                break
            if self.now - noted > 1:
                noted = self.now
                self.note_families()
            if self.now - told > TELL_S:
                told = self.now
                for job in self.jobs:
                    if job.status == "runs":
                        self.say(f"  {job.name} {self.now - job.began:.0f} s: {self.last_line(job)}")
            if self.now - partial > PARTIAL_S:
                partial = self.now
                self.pack(self.final / "serve-partial.tar.xz")
            time.sleep(0.2)
        for job in self.jobs:
            self.say(f"{job.name:18} {job.status:22} {job.began:5.0f} to {job.ended or 0:5.0f}")
        self.pack(self.final / "serve.tar.xz")
        (self.final / "serve-partial.tar.xz").unlink(missing_ok=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("plan")
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="where the archive goes")
    parser.add_argument("--deadline", type=float, default=530)
    parser.add_argument("--commit", default="unknown")
    parser.add_argument("--only")
    parser.add_argument("--stub", action="store_true", help="sleep in place of the commands, a tenth as long")
    arguments = parser.parse_args()
    import plans

    jobs = [Job(**each) for each in getattr(plans, arguments.plan)(arguments.base, arguments.commit, sys.executable)]
    if arguments.only:
        wanted = arguments.only.split(",")
        jobs = [job for job in jobs if job.name in wanted]
        for job in jobs:
            job.after = tuple(name for name in job.after if name in wanted)
    if arguments.stub:
        for job in jobs:
            hang = "hang" in job.name
            job.limit /= 10
            job.command = f"echo stub $CUDA_VISIBLE_DEVICES; echo '{{}}' > $O/x.json; sleep {9999 if hang else job.limit * 0.7}"
    results = arguments.base / "results"
    results.mkdir(parents=True, exist_ok=True)
    Driver(jobs, arguments.base, results, arguments.deadline, arguments.out).run()


if __name__ == "__main__":
    main()

"""Runs the jobs of a plan on the GPUs of one machine and packs what they leave, whatever becomes of them.

    python driver.py PLAN --base DIR [--only a,b] [--stub] [--scale 10]

DIR has t0 (when all began), deadline (when all ends; read again and again, so that it may be moved), commit, skip. A job
starts, in the order of the plan, when the files that it needs are there, the jobs that it comes after have ended, and
its GPUs are free: `alone` says that nothing else may run on them. A job that is `alone` and could start but for what
runs on its GPUs keeps later jobs off them. state.json lets another driver go on where one has died.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

TELL_S = 20.0
PARTIAL_S = 40.0
MOST_LOG = 600_000
PIECE = 15_000_000  # bytes of an archive that one file may have


@dataclass
class Job:
    name: str
    command: str
    gpus: tuple = ()
    alone: bool = False
    expect: float = 60.0  # seconds it is thought to take
    limit: float = 150.0
    least: float = 0.0  # seconds before the deadline that it takes to be of use; dropped where there are fewer
    needs: tuple = ()  # files
    after: tuple = ()
    give_up: float = 420.0  # seconds after which what it needs does not come any more
    cores: str = ""
    env: dict = field(default_factory=dict)
    family: set = field(default_factory=set)
    process: subprocess.Popen | None = None
    began: float | None = None
    ended: float | None = None
    status: str = "waits"
    tries: int = 0


class Driver:
    def __init__(self, jobs, base: Path, scale: float):
        self.jobs, self.base, self.out, self.scale = jobs, base, base / "results", scale
        self.zero = float((base / "t0").read_text())
        (self.out / "logs").mkdir(parents=True, exist_ok=True)
        names = {job.name for job in jobs}
        for job in jobs:
            assert set(job.after) <= names, (job.name, job.after)
        self.by_name = {job.name: job for job in jobs}
        self.load_state()

    @property
    def now(self) -> float:
        return time.time() - self.zero

    @property
    def left(self) -> float:
        try:
            return float((self.base / "deadline").read_text()) - time.time()
        except (OSError, ValueError):  # it is being written
            return 1.0

    # What a driver leaves to the next one.

    def save_state(self) -> None:
        state = {
            job.name: dict(
                status=job.status, began=job.began, ended=job.ended, tries=job.tries, family=sorted(job.family)
            )
            for job in self.jobs
        }
        part = self.base / "state.tmp"
        part.write_text(json.dumps(state))
        part.rename(self.base / "state.json")

    def load_state(self) -> None:
        try:
            state = json.loads((self.base / "state.json").read_text())
        except (OSError, ValueError):
            return
        self.say("a driver before this one has left its state")
        starts = processes()[1]
        for name, was in state.items():
            job = self.by_name.get(name)
            if job is None:
                continue
            job.tries = was["tries"]
            if was["ended"] is not None:
                job.status, job.began, job.ended = was["status"], was["began"], was["ended"]
            elif was["status"] == "runs":
                for pid, start in was["family"]:
                    if starts.get(pid) == start:
                        kill(pid, signal.SIGKILL)
                if job.tries >= 2:
                    job.status, job.began, job.ended = "LOST WITH ITS DRIVER", was["began"], self.now
                self.say(f"{name} had run: {'again' if job.tries < 2 else 'not again'}")

    # Starting and ending a job.

    def environment(self, job: Job) -> dict:
        cache = self.base / "cache" / job.name
        (cache / "vllm").mkdir(parents=True, exist_ok=True)
        temporary = self.base / "t" / job.name
        temporary.mkdir(parents=True, exist_ok=True)
        if (known := self.base / "cache/warm/modelinfos").is_dir():  # else each process inspects the model for 20 s
            subprocess.run(["cp", "-r", str(known), str(cache / "vllm") + "/"])
        left = max(1, int(self.left * self.scale))
        return os.environ | {
            "CUDA_VISIBLE_DEVICES": ",".join(map(str, job.gpus)),
            "O": str(self.out / job.name),
            "BASE": str(self.base),
            "LEFT": str(left),
            "LIMIT": str(int(min(left, job.limit * self.scale))),
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
        log = open(self.out / "logs" / f"{job.name}.log", "ab")
        pinned = ["taskset", "-c", job.cores] if job.cores and shutil.which("taskset") else []
        job.process = subprocess.Popen(
            [*pinned, "bash", "-c", job.command],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=self.base / "repo",
            env=self.environment(job),
            start_new_session=True,
        )
        log.close()
        job.began, job.status, job.tries = self.now, "runs", job.tries + 1
        self.say(f"START {job.name} on GPU {job.gpus}" + (f", cores {job.cores}" if job.cores else ""))
        self.note_families()
        self.save_state()

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
        parents, self.starts = processes()
        for job in self.jobs:
            if job.status == "runs":
                alive = {pid for pid, start in job.family if self.starts.get(pid) == start} | {job.process.pid}
                grew = True
                while grew:
                    more = {pid for pid, parent in parents.items() if parent in alive} - alive
                    alive |= more
                    grew = bool(more)
                job.family |= {(pid, self.starts[pid]) for pid in alive if pid in self.starts}

    def end(self, job: Job, status: str, grace: float) -> None:
        """Asks a job that runs to end, then ends what is left of it."""
        if job.process.poll() is None:
            terminate(job)
            wait = time.monotonic() + grace
            while job.process.poll() is None and time.monotonic() < wait:
                time.sleep(0.1)
        self.note_families()
        for pid, start in job.family:
            if self.starts.get(pid) == start:
                kill(pid, signal.SIGKILL)
        try:
            job.process.wait(5)
        except subprocess.TimeoutExpired:
            pass
        for trace in (self.base / "t" / job.name).glob("profile-*/*.json.gz"):
            if trace.stat().st_size < 1_000_000:
                subprocess.run(["mv", str(trace), str(self.out / job.name)])
        job.ended, job.status = self.now, status
        self.say(f"END {job.name}: {status}, {job.ended - job.began:.0f} s; {self.last_line(job)}")
        self.save_state()

    # Which may start.

    def startable(self) -> list:
        """Jobs to start now, in the plan's order."""
        chosen = []
        running = [job for job in self.jobs if job.status == "runs"]
        kept = set()  # GPUs that a job is to have for itself
        for job in self.jobs:
            if job.status != "waits" or not all(self.by_name[name].ended is not None for name in job.after):
                continue
            missing = [path for path in job.needs if not Path(path).exists()]
            if missing:
                if self.now * self.scale > job.give_up:
                    job.ended, job.status = self.now, f"NEVER CAME: {Path(missing[0]).name}"
                    job.began = self.now
                    self.say(f"{job.name} {job.status}")
                continue
            if self.left * self.scale < job.least:
                job.began = job.ended = self.now
                job.status = f"DROPPED: {self.left:.0f} s are left"
                self.say(f"{job.name} {job.status}")
                continue
            gpus = set(job.gpus)
            beside = [other for other in running + chosen if gpus & set(other.gpus)]
            if gpus & kept or any(other.alone for other in beside) or (job.alone and beside):
                if job.alone:
                    kept |= gpus
                continue
            chosen.append(job)
        return chosen

    def pack(self, folder: Path, name: str) -> None:
        """All small files and the ends of logs, in an archive that appears whole; in pieces where it is large."""
        packed = self.base / "packed"
        subprocess.run(["rm", "-rf", str(packed)])
        packed.mkdir()
        for path in self.out.rglob("*"):
            if not path.is_file() or path.suffix == ".so":
                continue
            target = packed / path.relative_to(self.out)
            if path.stat().st_size > MOST_LOG and path.suffix not in (".log", ".txt"):
                if path.stat().st_size > 6_000_000:
                    continue
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                data = path.read_bytes()
            except OSError:
                continue
            if len(data) > MOST_LOG and path.suffix in (".log", ".txt"):
                data = data[: MOST_LOG // 3] + b"\n...\n" + data[-2 * MOST_LOG // 3 :]
            target.write_bytes(data)
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f".tmp-{name}"
        subprocess.run(f"tar -C {packed} -cf - . | xz -T4 -1 > {temporary}", shell=True)
        for old in folder.glob(f"{name}*"):
            old.unlink()
        if temporary.stat().st_size > PIECE:  # cat NAME.* puts it together
            subprocess.run(f"split -b {PIECE} {temporary} {folder}/{name}. && rm {temporary}", shell=True)
        else:
            temporary.rename(folder / name)

    def run(self) -> None:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        told = partial = noted = time.monotonic()
        while True:
            for job in self.jobs:
                if job.status == "runs":
                    code = job.process.poll()
                    if code is not None:
                        self.end(job, f"rc {code}", 0)
                    elif self.now - job.began > job.limit:
                        self.end(job, "TOO LONG", 6)
            for job in self.startable():
                self.start(job)
            if all(job.ended is not None for job in self.jobs):
                break
            if self.left < 0:
                self.say("DEADLINE")
                running = [job for job in self.jobs if job.status == "runs"]
                for job in running:  # together: each may take some seconds to end
                    terminate(job)
                time.sleep(3)
                for job in running:
                    self.end(job, "CUT OFF BY DEADLINE", 0)
                break
            clock = time.monotonic()
            if clock - noted > 1:
                noted = clock
                self.note_families()
            if clock - told > TELL_S:
                told = clock
                self.save_state()
                for job in self.jobs:
                    if job.status == "runs":
                        self.say(f"  {job.name} {self.now - job.began:.0f} s: {self.last_line(job)}")
            if clock - partial > PARTIAL_S / self.scale:
                partial = clock
                self.pack(self.base / "partial", "serve-partial.tar.xz")
            time.sleep(0.2)
        for job in self.jobs:
            self.say(f"{job.name:18} {job.status:22} {job.began or 0:5.0f} to {job.ended or 0:5.0f}")
        self.pack(self.base / "final", "serve.tar.xz")
        (self.base / "done").touch()


def processes() -> tuple[dict, dict]:
    """Parent, and when it started, of each process by its id."""
    parents, starts = {}, {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                fields = Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            parents[int(entry)], starts[int(entry)] = int(fields[1]), fields[19]
    return parents, starts


def kill(pid: int, how: int) -> None:
    try:
        os.kill(pid, how)
    except ProcessLookupError:
        pass


def terminate(job: Job) -> None:
    try:
        os.killpg(job.process.pid, signal.SIGTERM)
    except ProcessLookupError:
        pass


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("plan", nargs="?", default="quad")
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--only")
    parser.add_argument("--stub", action="store_true", help="sleep in place of the commands")
    parser.add_argument("--scale", type=float, default=1, help="with --stub: times as fast")
    arguments = parser.parse_args()
    import plans

    base = arguments.base
    jobs = [Job(**each) for each in getattr(plans, arguments.plan)(base, (base / "commit").read_text().strip(), sys.executable)]
    skipped = set(filter(None, (base / "skip").read_text().strip().split(",")))
    wanted = set(arguments.only.split(",")) if arguments.only else {job.name for job in jobs}
    jobs = [job for job in jobs if job.name in wanted - skipped]
    for job in jobs:
        job.after = tuple(name for name in job.after if name in wanted - skipped)
        if arguments.stub:
            job.limit /= arguments.scale
            seconds = 9999 if job.name in os.environ.get("QUAD_HANG", "").split(",") else job.expect / arguments.scale
            extra = f"touch {base}/planted/libraries/sound.so;" if job.name == "planted-build" else ""
            job.command = f"echo stub $CUDA_VISIBLE_DEVICES $LIMIT; {extra} sleep {seconds}; echo '{{}}' > $O/x.json"
    if arguments.stub:
        (base / "planted/libraries").mkdir(parents=True, exist_ok=True)
    Driver(jobs, base, arguments.scale if arguments.stub else 1).run()


if __name__ == "__main__":
    main()

"""soak.py END_S ARGUMENTS OF vllm_soak.py: at most --minutes of load, which ends END_S seconds before the deadline of all.

The minutes are set when the server is healthy. Memory on the GPU is that of the server's processes alone, by --shared-gpu
or, where vllm_soak.py has no such option, by the same here. Where nvidia-smi lists none of them, the whole GPU is noted
and no growth is a fault.
"""

import inspect
import os
import subprocess
import sys
import time
from pathlib import Path

base = Path(os.environ["BASE"])
sys.path[0] = str(base / "repo/benchmarks")  # not this folder

import soak_memory
import vllm_soak

end_s, argv = float(sys.argv[1]), sys.argv[2:]
has_option = "--shared-gpu" in inspect.getsource(vllm_soak)
plan = vllm_soak.plan
whole = soak_memory.gpu_mib


def of_server(pid):
    import psutil

    query = ["nvidia-smi", "--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits"]
    lines = [line.split(",") for line in subprocess.run(query, capture_output=True, text=True).stdout.splitlines()]
    try:
        root = psutil.Process(pid)
        family = {each.pid for each in (root, *root.children(recursive=True))}
    except psutil.NoSuchProcess:
        return None
    found = [float(b) for a, b in (line for line in lines if len(line) == 2) if b.strip().isdecimal() and int(a) in family]
    return sum(found) if found else None


def planned(arguments, pid):
    try:
        left = float((base / "deadline").read_text()) - time.time() - end_s
    except (OSError, ValueError):
        left = 60 * arguments.minutes
    arguments.minutes = max(0.5, min(arguments.minutes, left / 60))
    seen = of_server(pid)
    print(f"minutes {arguments.minutes:.2f}; of the server nvidia-smi lists {seen} MiB, of all {whole()}; "
          f"{'option' if has_option else 'no option'}", flush=True)  # fmt: skip
    if seen is None:
        print("NOT LISTED: the whole GPU, and no bound", flush=True)
        arguments.gpu_drift = 1e9
        if has_option:
            arguments.shared_gpu = False
    elif not has_option:
        soak_memory.gpu_mib = lambda: of_server(pid)
    return plan(arguments, pid)


vllm_soak.plan = planned
sys.exit(vllm_soak.main(["--shared-gpu", *argv] if has_option else argv))

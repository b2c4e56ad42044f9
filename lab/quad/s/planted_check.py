"""planted_check.py LIBRARIES OUT ENDED SECONDS GPU [LANES]: gpu_fleet.py's checks of libraries that another process builds.

ENDED is a file that is there once no more libraries come. Where it is there at the start, only bugs with a library are checked.
"""

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path.cwd() / "benchmarks"))

import gpu_fleet
from gpu_fleet import bugs, check

libraries, out, ended = (Path(each) for each in sys.argv[1:4])
seconds, gpu = float(sys.argv[4]), sys.argv[5]
lanes = int(sys.argv[6]) if len(sys.argv) > 6 else 4
out.mkdir(parents=True, exist_ok=True)
began = time.monotonic()
jobs = gpu_fleet.planted_jobs(libraries, out, [bug.name for bug in bugs.BUGS if not ended.exists() or (libraries / f"{bug.name}.so").exists()])
fleet = gpu_fleet.Fleet(
    gpu.split(","), lanes, out / "logs", lambda text: print(f"{time.monotonic() - began:4.0f} s: {text}", flush=True)
)
status = fleet.run(jobs, seconds, 200, lambda: not ended.exists())
found = gpu_fleet.merge_planted(out)
print("not caught, or sound kernels that failed:", check.missed(found))
print({name: each for name, each in status.items() if each != 0})

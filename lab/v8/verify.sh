#!/bin/bash
# verify.sh COMMIT : in the background on the 4-GPU machine while models travel: the suite of kernels. Log: /dev/shm/verify/log
V=/dev/shm/verify; cd $V/repo; export PYTHONUNBUFFERED=1 SECONDS=0
exec > $V/log 2>&1
mkdir -p $V/out; export PYTHONPATH=$PWD
python benchmarks/gpu_fleet.py $V/out --commit $1 --gpus 0,1,2,3 --parts kernels --lanes 1 --seconds 100 --job-seconds 95
python - <<'P'
import json, collections, pathlib
for p in sorted(pathlib.Path("/dev/shm/verify/out").glob("*.json")):
    d = json.load(open(p)); c = collections.Counter(d.get("outcomes", {}).values()); print(p.name, dict(c), d.get("exit"))
    for k, v in d.get("outcomes", {}).items():
        if v not in ("passed", "skipped"): print("  ", v, k)
P
echo "kernels done after $SECONDS s"; touch $V/done

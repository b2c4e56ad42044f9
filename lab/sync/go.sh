#!/bin/bash
# seconds: 75
# build: 240
# One barrier for an item's parts: registers, tests, synccheck at head dims 64 and 128, times beside main.
SECONDS=0; nvidia-smi --query-gpu=name --format=csv,noheader
for n in base one; do [ -e /tmp/sync/$n/lite_attention/_C.abi3.so ] || { tail -30 $O/$n.log; exit 1; }; done
for n in base one; do cuobjdump -sass /tmp/sync/sync-$n.so | awk -v n=$n '/R2UR/ {r++} /STL|LDL/ {s++} /BAR.SYNC/ {b++} END {print n, "SASS lines", NR, "R2UR", r, "STL/LDL", s, "BAR.SYNC", b}' & 
  grep -hE "bytes stack frame|Used|C7510|warning" /tmp/kitbuild/sync-$n.so/*.log | grep -v " 0 bytes stack frame" | sort | uniq -c | sort -rn > $O/ptxas-$n.txt; done; wait; diff $O/ptxas-base.txt $O/ptxas-one.txt | head -20
cd /tmp/sync/one; export PYTHONPATH=$PWD PYTHONUNBUFFERED=1
for i in 0 1 2 3; do PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout 45 compute-sanitizer --tool synccheck --error-exitcode 1 python -m pytest -q -x -p no:cacheprovider tests/gpu/test_sanitized.py \
  -k "bf16 and test_one_case and ($(echo 'plain and decode|plain and masked|plain and full|plain and prefill_paged' | cut -d'|' -f$((i+1)))) and (64 or 40 or 128 or 104)" > $O/sync$i.log 2>&1 & done
timeout 45 python -m pytest -q -x -n 6 -p no:cacheprovider tests/gpu/test_hopper.py tests/gpu/test_hopper_runtime.py -k "128-bf16 or 64-bf16 or decode-128" > $O/tests.log 2>&1 &
wait; tail -n 3 $O/tests.log; for i in 0 1 2 3; do echo "synccheck $i:"; grep -E "SUMMARY|passed|failed|Divergent" $O/sync$i.log | sort | uniq -c | head -4; done; echo "checked after $SECONDS s"
cp $OLDPWD/times.py /tmp/sync/
for n in base one base one; do (cd /tmp/sync/$n; PYTHONPATH=$PWD timeout 12 python /tmp/sync/times.py $n); done

#!/bin/bash
# seconds: 300
# FA4 beside our kernels and FA3: dense rows, then rows with lists. Needs .bundle/fa4.tar.xz carried, lib/full.so.xz, and
# /tmp/fa3.so of a call before on this machine (the two bundles do not fit into one call); without it FA3 takes no part.
SECONDS=0; END=${END:-290}
[ -e $ROOT/.bundle/fa4.tar.xz ] || { echo "no .bundle/fa4.tar.xz: carry it"; exit 1; }
d=/tmp/fa4run; mkdir -p $d /tmp/fa4; cp -r $ROOT/lite_attention $d/; cp warm.py $d/
tar -C /tmp/fa4 -xJf $ROOT/.bundle/fa4.tar.xz & 
if [ ! -e $d/lite_attention/_C.abi3.so ] && [ -e $ROOT/.dev/q/lib/full.so.xz ]; then xz -dc $ROOT/.dev/q/lib/full.so.xz > $d/lite_attention/_C.abi3.so; fi
peers=fa4; fa3=; [ -e /tmp/fa3.so ] && { peers=fa3,fa4,cudnn; fa3="--fa3 /tmp/fa3.so"; }
wait; python -m compileall -q -j 8 /tmp/fa4 > /dev/null 2>&1; echo "FA4 unpacked after $SECONDS s; peers $peers"
export PYTHONPATH=$d:/tmp/fa4:/tmp/fa4/nvidia_cutlass_dsl/dsl_packages PYTHONUNBUFFERED=1
export FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED=1 FLASH_ATTENTION_CUTE_DSL_CACHE_DIR=/tmp/fa4cache
cd $d; nvidia-smi --query-gpu=name,driver_version --format=csv,noheader | head -1
# Each kernel is compiled by a process of its own; the bench loads them from FA4's cache.
for i in 0 1 2 3 4 5 6 7; do timeout 120 python warm.py $i > $O/warm$i.log 2>&1 & done; wait
grep -h "^row" $O/warm*.log; echo "compiled after $SECONDS s, $(ls /tmp/fa4cache/*/* 2>/dev/null | grep -c '\.o$') in the cache"
if ! timeout 60 python warm.py all > $O/check.log 2>&1; then
  echo "kernels from the cache fail, so it is not used:"; tail -5 $O/check.log
  unset FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED
fi
grep -h "^row" $O/check.log; echo "checked after $SECONDS s"
[ -z "$WAIT_FOR" ] || while [ ! -e $WAIT_FOR ] && [ $SECONDS -lt $((END - 150)) ]; do sleep 0.5; done; echo "bench begins after $SECONDS s"
timeout $((END - SECONDS)) python -m lite_attention.bench --peers $peers $fa3 --repetitions 20 --out $O/bench \
  --commit "${COMMIT:-unknown}" --only 'dense-*' --only 'chunk-*' --only 'skip-*'
echo "bench: rc $? after $SECONDS s"
python - $O/bench/results.json <<'P'
import json, sys
found = json.load(open(sys.argv[1]))
for row in found["rows"]:
    times = {name: round(time["median"], 1) for name, time in row["microseconds"].items()}
    print(row["name"], row["status"], row["reason"] or "", times, row["absent"])
P

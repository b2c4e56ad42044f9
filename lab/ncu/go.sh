#!/bin/bash
# seconds: 260
# Counters of short rows (ncu), clocks and power of long ones. Needs lib/full.so.xz; FA3 from .bundle/fa3.so.xz.
SECONDS=0; d=/tmp/ncu; mkdir -p $d; cp -r $ROOT/lite_attention $ROOT/benchmarks $ROOT/pyproject.toml power.py $d/
xz -dc $ROOT/.dev/q/lib/full.so.xz > $d/lite_attention/_C.abi3.so; cp $d/lite_attention/_C.abi3.so /tmp/full.so
[ -e /tmp/fa3.so ] || xz -dc $ROOT/.bundle/fa3.so.xz > /tmp/fa3.so
cd $d; export PYTHONPATH=$PWD PYTHONUNBUFFERED=1
timeout 30 python power.py /tmp/fa3.so varlen-64x128-32k dense-hd128-causal-32k-b1 prefill-page128-4k-over-32k 2>&1 | tee $O/power.txt; echo "power: $SECONDS s"
timeout 70 python -m lite_attention.bench --peers fa3 --fa3 /tmp/fa3.so --repetitions 20 --commit $COMMIT --out $O/causal --only "skip-causal-75600*" > $O/causal.log 2>&1; echo "causal: rc $? after $SECONDS s"
grep -aE "^[a-z0-9-]*: ([0-9]|failed)|wrong|rror" $O/causal.log | cut -c1-150
rows=${ROWS:-decode-b1-8k,decode-b4-4k,prefill-page16-4k-over-32k,prefill-page128-4k-over-32k,varlen-64x128-32k,dense-hd64-causal-2k-b8,dense-hd256-causal-32k-b1,skip-full-32k-h40-0,dense-hd128-full-32k-h40,skip-full-75600-h12-0,skip-full-75600-h12-random-40,dense-hd128-full-75600-h12}
timeout ${END:-160} python benchmarks/counters.py $O/counters --seconds ${END:-150} --rows $rows --fa3 /tmp/fa3.so; echo "counters: rc $? after $SECONDS s"
cat $O/counters/counters.md | cut -c1-260

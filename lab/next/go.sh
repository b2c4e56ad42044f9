#!/bin/bash
# build: 400
# seconds: 180
cp /tmp/out/new.so.xz $OUT/; unset LITE_ATTENTION_FA3; cd /tmp/next/new; export PYTHONPATH=$PWD PYTHONUNBUFFERED=1; SECONDS=0
timeout 175 python benchmarks/gpu_suite.py run kernels -n 14 --commit $(cat $ROOT/.dev/q/next/commit) --out $O > $O/kernels.log 2>&1; echo "suite: rc $? after $SECONDS s"; grep -E "^(FAILED|ERROR)|passed|failed" $O/kernels.log | cut -c1-180 | tail -25

#!/bin/bash
# build: 200
# seconds: 240
here=$PWD; fa3=${LITE_ATTENTION_FA3:-/tmp/fa3.so}; unset LITE_ATTENTION_FA3; export PYTHONUNBUFFERED=1; SECONDS=0
row() { for r in "$@"; do printf -- "--only %s " $r; done; }
for n in ${VARIANTS:-base s0 s8 s4 s3 w4}; do echo "#### $n"
  (cd /tmp/softmax/$n; PYTHONPATH=$PWD timeout 60 python -m lite_attention.bench --peers fa3 --fa3 $fa3 --repetitions ${REPS:-8} --commit $n --out $O/$n $(row dense-hd64-{full,causal}-8k-b2 dense-hd128-full-{2k-b8,8k-b2,32k-b1} dense-hd128-causal-{2k-b8,8k-b2} dense-hd256-{full,causal}-8k-b2 skip-full-32k-h40-random-80) 2>&1 | grep -aE "^(dense|skip)[a-z0-9-]*: |wrong|rror" | cut -c1-150); echo "after $SECONDS s"
done

#!/bin/bash
# build: 300
# seconds: 345
cp /tmp/out/new.so.xz $OUT/; fa3=/tmp/fa3.so; unset LITE_ATTENTION_FA3; export PYTHONUNBUFFERED=1; SECONDS=0; commit=$(cat commit)
row() { for r in "$@"; do printf -- "--only %s " $r; done; }
run() { local v=$1 n=$2 s=$3; shift 3; echo "## $n"; (cd /tmp/next/$v; PYTHONPATH=$PWD timeout $s python -m lite_attention.bench --peers fa3 --fa3 $fa3 --repetitions ${REPS:-12} --commit $commit --out $O/$n $(row "$@") 2>&1 | grep -aE "^[a-z0-9-]*: ([0-9]|failed)|wrong|rror" | cut -c1-110); echo "after $SECONDS s"; }
(cd /tmp/next/new; PYTHONPATH=$PWD timeout 170 python benchmarks/gpu_suite.py run kernels -n 14 --commit $commit --out $O > $O/kernels.log 2>&1; echo "suite: rc $? after $SECONDS s"; grep -E "^(FAILED|ERROR)|passed|failed" $O/kernels.log | cut -c1-180 | tail -25)
timed=$(echo dense-hd{64,128,256}-{full,causal}-{2k-b8,8k-b2} skip-full-32k-h40-{0,random-80,random-90} varlen-64x128-32k)
run base base-1 40 $timed; run new new-1 40 $timed; run base base-2 40 $timed; run new new-2 40 $timed
run new decode-new 25 decode-hd64-b64-8k decode-b1-8k decode-b64-4k pages-step-b64-32k pages-step-b1-128k; run h3 decode-h3 25 decode-hd64-b64-8k
paged=$(echo prefill-page{16,64,128}-4k-over-32k decode-b1-8k decode-b4-4k decode-b64-4k decode-b128-2k decode-b32-8k decode-b8-32k pages-step-b64-32k pages-step-b8-128k)
run new paged-new 40 $paged; run p160 paged-160 40 $paged

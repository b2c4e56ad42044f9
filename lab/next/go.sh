#!/bin/bash
# build: 300
# seconds: 300
here=$PWD; fa3=${LITE_ATTENTION_FA3:-/tmp/fa3.so}; unset LITE_ATTENTION_FA3; export PYTHONUNBUFFERED=1; SECONDS=0
py() { (cd /tmp/next/$1; shift; PYTHONPATH=$PWD "$@"); }
row() { for r in "$@"; do printf -- "--only %s " $r; done; }
bench() { local v=$1 s=$2; shift 2; echo "#### $v"; py $v timeout $s python -m lite_attention.bench --peers fa3 --fa3 $fa3 --repetitions 12 --commit $v --out $O/$v $(row "$@") 2>&1 | grep -aE "^(dense|decode|pages|fp8)[a-z0-9-]*: |wrong|rror" | cut -c1-150; echo "after $SECONDS s"; }
py new timeout 130 python benchmarks/gpu_suite.py run kernels -n 14 --commit $(cat commit) --out $O > $O/kernels.log 2>&1; echo "suite: rc $? after $SECONDS s"; grep -E "^(FAILED|ERROR)|passed|failed" $O/kernels.log | cut -c1-180 | tail -25
bench new 90 'dense-hd64-*' 'dense-hd256-*' 'dense-hd128-full-?k*' 'dense-hd128-full-32k-b1' 'pages-*' 'decode-b1-*' 'decode-hd64*' 'fp8-*'
bench base 60 'dense-hd64-*-8k-b2' 'dense-hd64-*-32k-b1' 'dense-hd256-*-8k-b2' 'dense-hd256-*-32k-b1' 'dense-hd128-full-8k-b2' 'pages-step-*' 'pages-short-*' 'decode-b1-*'

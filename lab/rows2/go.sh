#!/bin/bash
# seconds: 330
here=$PWD; fa3=/tmp/fa3.so; unset LITE_ATTENTION_FA3; export PYTHONUNBUFFERED=1; SECONDS=0; commit=$(cat commit)
row() { for r in "$@"; do printf -- "--only %s " $r; done; }
for n in p128 pnone p64 s2; do mkdir -p /tmp/b/$n; tar -C /tmp/b/$n -xJf py.tar.xz; xz -dc $n.so.xz > /tmp/b/$n/lite_attention/_C.abi3.so & done; wait
run() { local v=$1 n=$2 s=$3; shift 3; cd /tmp/b/$v; PYTHONPATH=$PWD timeout $s python -m lite_attention.bench --peers fa3 --fa3 $fa3 --repetitions ${REPS:-20} --commit $commit --out $O/$n $(row "$@") 2>&1 | grep -aE "^[a-z0-9-]*: [0-9]|wrong|rror" | cut -c1-110; echo "after $SECONDS s"; }
for v in p128 pnone p64 s2; do echo "## $v"; REPS=15 run $v try-$v 40 decode-b8-32k decode-b64-32k decode-b1-8k decode-b4-4k decode-b128-2k pages-step-b64-32k prefill-page16-4k-over-32k; done
echo "## rows of $commit"
run p128 decode 60 'decode-*' 'fp8-*' 'prefill-*' 'mixed*' 'varlen*'
run p128 pages 50 'pages-*'
cd /tmp/b/p128; export PYTHONPATH=$PWD
timeout 150 python benchmarks/gpu_suite.py run kernels -n 14 --commit $commit --out $O > $O/kernels.log 2>&1; echo "suite: rc $? after $SECONDS s"; grep -E "^(FAILED|ERROR)|passed|failed" $O/kernels.log | cut -c1-180 | tail -25

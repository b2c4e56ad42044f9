#!/bin/bash
# build: 260
# seconds: 400
# The suite of all kernels, then two tables beside FA3, then the errors beside FA3.
cp /tmp/out/new.so.xz $OUT/; fa3=/tmp/fa3.so; unset LITE_ATTENTION_FA3; cd /tmp/next/new; export PYTHONPATH=$PWD PYTHONUNBUFFERED=1; SECONDS=0; commit=$(cat $ROOT/.dev/q/fin/commit)
timeout 150 python benchmarks/gpu_suite.py run kernels -n 14 --commit $commit --out $O > $O/kernels.log 2>&1; echo "suite: rc $? after $SECONDS s"; grep -E "^(FAILED|ERROR)|passed|failed" $O/kernels.log | cut -c1-180 | tail -25
LITE_ATTENTION_FA3=$fa3 timeout 60 python benchmarks/gpu_suite.py run errors --commit $commit --out $O > $O/errors.log 2>&1; echo "errors: rc $? after $SECONDS s"; grep -E "^(FAILED|ERROR)|passed|failed" $O/errors.log | cut -c1-180 | tail
table() { local n=$1 s=$2 o=; shift 2; set -f; for r in "$@"; do o="$o --only $r"; done; timeout $s python -m lite_attention.bench --peers fa3 --fa3 $fa3 --repetitions 20 --commit $commit --out $O/$n $o > $O/$n.log 2>&1; set +f
 echo "## $n after $SECONDS s"; grep -aE "^[a-z0-9-]*: ([0-9]|failed)|wrong|rror" $O/$n.log | cut -c1-140; }
table decode 125 'decode-*' 'pages-*' 'fp8-*' 'mixed-*' 'varlen-*' 'prefill-*'
table dense $((390 - SECONDS)) 'dense-*' 'chunk-*'

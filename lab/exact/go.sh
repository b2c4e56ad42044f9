#!/bin/bash
# seconds: 200
fa3=/tmp/fa3.so; unset LITE_ATTENTION_FA3; export PYTHONUNBUFFERED=1; SECONDS=0
for v in new base; do mkdir -p /tmp/x/$v; tar -C /tmp/x/$v -xJf tree.tar.xz; xz -dc $v.so.xz > /tmp/x/$v/lite_attention/_C.abi3.so; done
cd /tmp/x/new; export PYTHONPATH=$PWD
LITE_ATTENTION_FA3=$fa3 timeout 60 python benchmarks/gpu_suite.py run errors --commit exact --out $O -k "bf16 and not 96 and not 192" > $O/errors.log 2>&1; echo "errors: rc $? after $SECONDS s"; grep -E "^(FAILED|ERROR)|passed|failed" $O/errors.log | cut -c1-180 | tail
python - <<'P'
import json,os
d=json.load(open(os.environ['O']+'/errors.json'))
for k,m in d['measured'].items(): print(k.split('[')[1], m)
P
timeout 60 python -m pytest -q -n 14 tests/gpu/test_hopper.py tests/gpu/test_hopper_skip.py -k "bf16 and (64 or 128 or 256)" > $O/t.log 2>&1; tail -15 $O/t.log | cut -c1-150; echo "after $SECONDS s"
run() { local v=$1 n=$2; shift 2; o=; for r in "$@"; do o="$o --only $r"; done; (cd /tmp/x/$v; PYTHONPATH=$PWD timeout 40 python -m lite_attention.bench --peers fa3 --fa3 $fa3 --repetitions 12 --commit exact --out $O/$n $o 2>&1 | grep -aE "^[a-z0-9-]*: ([0-9]|failed)|wrong|rror" | cut -c1-90); echo "## $n after $SECONDS s"; }
rows=$(echo dense-hd{64,128,256}-{full,causal}-{2k-b8,8k-b2} decode-b1-8k decode-b64-4k)
run base b1 $rows; run new n1 $rows; run base b2 $rows; run new n2 $rows

#!/bin/bash
# seconds: 150
SECONDS=0; mkdir -p /tmp/tab; cp -r $ROOT/lite_attention $ROOT/pyproject.toml /tmp/tab/; xz -dc $ROOT/.dev/q/lib/full.so.xz > /tmp/tab/lite_attention/_C.abi3.so; cp /tmp/tab/lite_attention/_C.abi3.so /tmp/full.so
cd /tmp/tab; export PYTHONPATH=$PWD PYTHONUNBUFFERED=1; unset LITE_ATTENTION_FA3; set -f; o=
for r in 'decode-*' 'pages-*' 'fp8-*' 'mixed-*' 'varlen-*' 'prefill-*'; do o="$o --only $r"; done
timeout 140 python -m lite_attention.bench --peers fa3 --fa3 /tmp/fa3.so --repetitions 20 --commit $COMMIT --out $O/decode $o > $O/decode.log 2>&1; echo "rc $? after $SECONDS s"
grep -aE "^[a-z0-9-]*: ([0-9]|failed)|wrong|rror" $O/decode.log | cut -c1-150

#!/bin/bash
# seconds: 150
fa3=/tmp/fa3.so; [ -e $fa3 ] || xz -dc $ROOT/.bundle/fa3.so.xz > $fa3; unset LITE_ATTENTION_FA3; export PYTHONUNBUFFERED=1; SECONDS=0
for v in base p160; do mkdir -p /tmp/x/$v; cp -r $ROOT/lite_attention $ROOT/tests $ROOT/pyproject.toml /tmp/x/$v/; xz -dc $v.so.xz > /tmp/x/$v/lite_attention/_C.abi3.so; done
run() { v=$1; cd /tmp/x/$v; export PYTHONPATH=$PWD; o=; for r in "prefill-*" mixed-2k-and-63-decodes decode-b64-4k; do o="$o --only $r"; done; timeout 60 python -m lite_attention.bench --peers fa3 --fa3 $fa3 --repetitions 20 --commit x --out $O/$v.$2 $o 2>&1 | grep -aE "^[a-z0-9-]*: ([0-9]|failed)|wrong|rror" | cut -c1-150 | sed "s/^/$v /"; echo "## after $SECONDS s"; }
run base 1; run p160 1; run p160 2; run base 2

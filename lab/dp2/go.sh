#!/bin/bash
# seconds: 150
fa3=/tmp/fa3.so; unset LITE_ATTENTION_FA3; export PYTHONUNBUFFERED=1; SECONDS=0; here=$PWD
for v in $VS; do rm -rf /tmp/x/$v; mkdir -p /tmp/x/$v; tar -C /tmp/x/$v -xJf new.tar.xz; xz -dc $v.so.xz > /tmp/x/$v/lite_attention/_C.abi3.so; done
use() { cd /tmp/x/$1; export PYTHONPATH=$PWD; }
for v in $VS; do case $v in base) continue;; esac; use $v; timeout 40 python $here/check.py 2>&1 | tail -3 | sed "s/^/$v: /" & done; wait; echo "after $SECONDS s"
run() { local n=$1; shift 1; o=; for r in "$@"; do o="$o --only $r"; done; timeout 40 python -m lite_attention.bench --peers fa3 --fa3 $fa3 --repetitions 20 --commit dp1 --out $O/$n $o 2>&1 | grep -aE "^[a-z0-9-]*: ([0-9]|failed)|wrong" | cut -c1-120; echo "## $n after $SECONDS s"; }
for v in $VS $(echo $VS | tr ' ' '\n' | tac); do use $v; run $v.$RANDOM $ROWS; done
for v in $VT; do use $v; timeout 60 python -m pytest -q -n 14 --tb=line $TESTS > $O/t.log 2>&1; grep -aE "^(/|E )|Error" $O/t.log | grep -v "no kernel for head_dim" | cut -c1-220 | sort | uniq -c | sort -rn | head -20; tail -1 $O/t.log | cut -c1-200; echo "after $SECONDS s"; done

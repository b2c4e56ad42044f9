#!/bin/bash
# seconds: 150
here=$PWD; fa3=/tmp/fa3.so; unset LITE_ATTENTION_FA3; export PYTHONUNBUFFERED=1; SECONDS=0
row() { for r in "$@"; do printf -- "--only %s " $r; done; }
for n in $(ls *.so.xz | sed 's/.so.xz//'); do mkdir -p /tmp/b/$n; tar -C /tmp/b/$n -xJf py.tar.xz; xz -dc $n.so.xz > /tmp/b/$n/lite_attention/_C.abi3.so; done
for n in $TRACES; do echo "#### clocks of $n"; (cd /tmp/b/$n; PYTHONPATH=$PWD timeout 40 python $here/trace.py 128 2>&1 | tail -8); done; echo "after $SECONDS s"
[ -n "$ROWS" ] || ROWS=$(echo dense-hd{64,128,256}-{full,causal}-{2k-b8,8k-b2} skip-full-32k-h40-{0,random-80,random-90})
for n in $TIMES; do echo "#### $n"
  (cd /tmp/b/$n; PYTHONPATH=$PWD timeout 60 python -m lite_attention.bench --peers fa3 --fa3 $fa3 --repetitions 9 --commit $n --out $O/$n $(row $ROWS) 2>&1 | grep -aE "^(dense|skip|decode|paged|varlen|mixed|chunk)[a-z0-9-]*: |wrong|rror" | cut -c1-130); echo "after $SECONDS s"
done

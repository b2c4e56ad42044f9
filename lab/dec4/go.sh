#!/bin/bash
# build: 150
# seconds: 90
here=$PWD; fa3=/tmp/fa3.so; unset LITE_ATTENTION_FA3; export PYTHONUNBUFFERED=1; SECONDS=0
row() { for r in "$@"; do printf -- "--only %s " $r; done; }
(cd /tmp/b/d5; PYTHONPATH=$PWD timeout 40 python $here/ends.py 2>&1 | tail -7)
for n in d0 d1 d2 d4 d6 d0; do echo "## $n"
  (cd /tmp/b/$n; PYTHONPATH=$PWD timeout 40 python -m lite_attention.bench --peers fa3 --fa3 $fa3 --repetitions 15 --commit $n --out $O/$n $(row decode-b8-32k decode-b64-4k decode-b64-32k decode-b1-8k decode-b128-2k) 2>&1 | grep -aE "^decode[a-z0-9-]*: |wrong|rror" | cut -c1-70); done

#!/bin/bash
# seconds: 130
# NAME.so.xz (a library, lean will do: see first/build.sh) and new.tar.xz (git archive HEAD lite_attention tests benchmarks pyproject.toml README.md) beside this.
# check.py: decode_pages against the three calls and lists against the reference; steps.py: when the kernels of a step end (FLUSH=12: warm; ONLY="rows").
fa3=/tmp/fa3.so; unset LITE_ATTENTION_FA3; export PYTHONUNBUFFERED=1; SECONDS=0; here=$PWD
for v in ${VARIANTS:-new}; do rm -rf /tmp/x/$v; mkdir -p /tmp/x/$v; tar -C /tmp/x/$v -xJf new.tar.xz; xz -dc $v.so.xz > /tmp/x/$v/lite_attention/_C.abi3.so
cd /tmp/x/$v; export PYTHONPATH=$PWD
timeout 40 python $here/check.py | tail -4; echo "after $SECONDS s"
o=; for r in pages-step-{b1-128k,b8-128k,b64-32k} pages-short-b64-4k decode-b1-{8k,32k} decode-b4-4k decode-b64-4k; do o="$o --only $r"; done
timeout 40 python -m lite_attention.bench --peers fa3 --fa3 $fa3 --repetitions 12 --commit lab --out $O/$v $o 2>&1 | grep -aE "^[a-z0-9-]*: ([0-9]|failed)|wrong" | cut -c1-120; echo "## $v after $SECONDS s"
ONLY="$ROWS" timeout 40 python $here/steps.py 2>&1 | grep -v "Warn\|warn" | tail -45; echo "after $SECONDS s"; cd $here; done

#!/bin/bash
for n in base one; do
  d=/tmp/sync/$n; mkdir -p $d; cp -r $ROOT/lite_attention $ROOT/tests $ROOT/benchmarks $ROOT/pyproject.toml $d; rm -rf $d/csrc; tar -C $d -xJf $n.tar.xz; cp test_sanitized.py $d/tests/gpu/
  NVFLAGS=-Xptxas=-v bash $ROOT/.dev/q/kit/build.sh $d /tmp/sync/sync-$n.so hd64_bf16 hd128_bf16 > $O/$n.log 2>&1 && cp /tmp/sync/sync-$n.so $d/lite_attention/_C.abi3.so &
done; wait; tail -n 3 $O/base.log $O/one.log

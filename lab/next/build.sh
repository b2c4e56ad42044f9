#!/bin/bash
# All of the new kernels, of the base those that are timed.
cd "$(dirname "$0")"; ROOT=${ROOT:-$(cd ../../..; pwd)}
for l in new base; do rm -rf /tmp/next/$l; mkdir -p /tmp/next/$l; tar -C /tmp/next/$l -xJf $l.tar.xz; done
JOBS=13 bash $ROOT/.dev/q/kit/build.sh /tmp/next/new /tmp/next/new.so > /tmp/next/new.log 2>&1 &
JOBS=3 bash $ROOT/.dev/q/kit/build.sh /tmp/next/base /tmp/next/base.so hd64_bf16 hd256_bf16 hd128_bf16 > /tmp/next/base.log 2>&1 &
wait; for l in new base; do cp /tmp/next/$l.so /tmp/next/$l/lite_attention/_C.abi3.so; tail -2 /tmp/next/$l.log; done
python inner.py /tmp/kitbuild/new.so/*instances*.o > $O/sass.txt 2>&1; head -60 $O/sass.txt | cut -c1-170

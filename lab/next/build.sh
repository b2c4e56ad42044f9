#!/bin/bash
# All kernels; the library comes back.
cd "$(dirname "$0")"; ROOT=${ROOT:-$(cd ../../..; pwd)}
rm -rf /tmp/next/new; mkdir -p /tmp/next/new; tar -C /tmp/next/new -xJf new.tar.xz
JOBS=16 bash $ROOT/.dev/q/kit/build.sh /tmp/next/new /tmp/next/new.so > /tmp/next/new.log 2>&1
cp /tmp/next/new.so /tmp/next/new/lite_attention/_C.abi3.so; tail -2 /tmp/next/new.log; xz -3 -T16 -c /tmp/next/new.so > $O/../new.so.xz

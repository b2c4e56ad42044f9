#!/bin/bash
# Two libraries: the next item asked for 3 and 6 tiles ahead.
cd "$(dirname "$0")"; here=$PWD; ROOT=${ROOT:-$(cd ../../..; pwd)}
for n in 3 6; do ( d=/tmp/trace/$n; rm -rf $d; mkdir -p $d; tar -C $d -xJf $here/trace.tar.xz; JOBS=8 NVFLAGS="-DTRACE_ASK=$n -Xptxas=-v" bash $ROOT/.dev/q/kit/build.sh $d /tmp/trace/$n.so hd128_bf16 > /tmp/trace/$n.log 2>&1; cp /tmp/trace/$n.so $d/lite_attention/_C.abi3.so; tail -4 /tmp/trace/$n.log ) & done; wait

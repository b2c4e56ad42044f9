#!/bin/bash
cd "$(dirname "$0")"; here=$PWD; ROOT=${ROOT:-$(cd ../../..; pwd)}
for v in d0 d1 d2 d4 d5 d6; do ( d=/tmp/b/$v; rm -rf $d; mkdir -p $d; tar -C $d -xJf src.tar.xz; python $here/variant.py $d $v && JOBS=2 bash $ROOT/.dev/q/kit/build.sh $d /tmp/b_$v.so hd128_bf16 > /tmp/b_$v.log 2>&1; cp /tmp/b_$v.so $d/lite_attention/_C.abi3.so; tail -1 /tmp/b_$v.log ) & done; wait

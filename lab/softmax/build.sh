#!/bin/bash
# A library of each variant, dense bf16 kernels and lists of three head dims.
cd "$(dirname "$0")"; here=$PWD; ROOT=${ROOT:-$(cd ../../..; pwd)}
for n in ${VARIANTS:-base s0 s8 s4 s3 w4}; do ( d=/tmp/softmax/$n; rm -rf $d; mkdir -p $d; [ $n = base ] && t=base || t=new; tar -C $d -xJf $here/$t.tar.xz; python $here/variant.py $d $n || exit
  JOBS=3 bash $ROOT/.dev/q/kit/build.sh $d /tmp/softmax/$n.so hd64_bf16 hd128_bf16 hd256_bf16 > /tmp/softmax/$n.log 2>&1; cp /tmp/softmax/$n.so $d/lite_attention/_C.abi3.so; tail -3 /tmp/softmax/$n.log ) & done; wait
for n in ${VARIANTS:-base s0 s8 s4 s3 w4}; do echo "== $n"; python inner.py /tmp/kitbuild/$n.so/*instances*.o; done > $O/sass.txt 2>&1; cut -c1-150 $O/sass.txt

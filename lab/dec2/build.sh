#!/bin/bash
cd "$(dirname "$0")"; ROOT=${ROOT:-$(cd ../../..; pwd)}
for l in *.tar.xz; do l=${l%.tar.xz}; ( rm -rf /tmp/dec2/$l; mkdir -p /tmp/dec2/$l && tar -C /tmp/dec2/$l -xJf $l.tar.xz && cp -r $ROOT/lite_attention $ROOT/tests $ROOT/benchmarks $ROOT/pyproject.toml /tmp/dec2/$l/
 f=-Xptxas=-v; case $l in trace*) f="$f -DLA_TRACE";; esac
 export JOBS=6 NVFLAGS="$f"; bash $ROOT/.dev/q/kit/build.sh /tmp/dec2/$l /tmp/dec2/dec2-$l.so > /tmp/dec2/$l.log 2>&1; cp /tmp/dec2/dec2-$l.so /tmp/dec2/$l/lite_attention/_C.abi3.so; echo "## $l"; tail -2 /tmp/dec2/$l.log; cat /tmp/kitbuild/dec2-$l.so/*hd128_bf16.cu*.log | grep -A1 -E "spill" ) & done; wait
for l in base c; do cuobjdump -sass /tmp/kitbuild/dec2-$l.so/*hd128_bf16.cu.o > /tmp/dec2/$l.sass; echo "$l hd128 decode: R2UR $(grep -c R2UR /tmp/dec2/$l.sass), instructions $(grep -c '^ *\/\*[0-9a-f]\{4,5\}\*\/' /tmp/dec2/$l.sass)"; done

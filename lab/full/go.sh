#!/bin/bash
# full library on the machine, whole suite of kernels; OUT gets the library and kernels.json
cd $(dirname $0)/../../..; export PYTHONPATH=$PWD; t=$(date +%s)
NVFLAGS="-Xptxas=-v" bash .dev/q/kit/build.sh $PWD $PWD/lite_attention/_C.abi3.so 2>&1 | tail -25; echo "built $(( $(date +%s)-t )) s"
xz -3 -T0 -c lite_attention/_C.abi3.so > $OUT/full.so.xz &
timeout 170 python benchmarks/gpu_suite.py run kernels -n 8 --commit $1 --out $OUT 2>&1 | tail -40; wait; echo "all $(( $(date +%s)-t )) s"

#!/bin/bash
# build.sh DIR OUT.so [INSTANCE...] : on the GPU machine, compiles DIR/csrc (all instances, or only these) with all cores.
set -e
kit=$(cd "$(dirname "$0")" && pwd); dir=$1; out=$2; shift 2; want=" $* "
( flock 8; [ -d /tmp/cutlass/cute ] || { mkdir -p /tmp/cutlass; tar -C /tmp/cutlass -xJf $kit/cutlass.tar.xz; } ) 8>/tmp/kit.lock
cd "$dir"; b=/tmp/kitbuild/$(basename "$out"); mkdir -p $b
torch=$(python -c 'import torch,os;print(os.path.dirname(torch.__file__))')
nvcc=$(command -v nvcc || echo /usr/local/cuda/bin/nvcc)
flags="-std=c++17 -O3 -DNDEBUG -gencode=arch=compute_90a,code=sm_90a --expt-relaxed-constexpr --expt-extended-lambda -DCUTE_SM90_EXTENDED_MMA_SHAPES_ENABLED -DTORCH_TARGET_VERSION=0x020a000000000000 -DUSE_CUDA -Xcompiler=-fPIC,-fvisibility=hidden --threads 1 -Icsrc -isystem $torch/include -isystem /tmp/cutlass $NVFLAGS"
{ echo '#include "sm90/launch.h"'; echo 'namespace lite_attention::sm90 {'
for f in csrc/sm90/instances/*.cu; do n=$(basename $f .cu); case "$want" in "  "|*" $n "*) ;; *)
 d=${n#hd}; d=${d%%_*}
 case $n in *_fp8qkv) echo "template <> Kernel fp8_qkv_kernel<$d>(bool) { return {}; }";;
  *_bf16_fp8kv) echo "template <> Kernel fp8_kv_kernel<ElementType::kBFloat16, $d>(TileKind, bool) { return {}; }";;
  *_fp16_fp8kv) echo "template <> Kernel fp8_kv_kernel<ElementType::kHalf, $d>(TileKind, bool) { return {}; }";;
  *_bf16) echo "template <> Kernel kernel<ElementType::kBFloat16, $d>(TileKind, bool) { return {}; }";;
  *_fp16) echo "template <> Kernel kernel<ElementType::kHalf, $d>(TileKind, bool) { return {}; }";;
 esac;; esac; done; echo '}'; } > $b/missing.cu
list=$(for f in $(find csrc -name '*.cu' | sort -r) $b/missing.cu; do case $f in csrc/sm90/instances/*) n=$(basename $f .cu); case "$want" in "  "|*" $n "*) ;; *) continue;; esac;; esac; echo $f; done)
echo "$list" | NV=$nvcc FL="$flags" B=$b xargs -P ${JOBS:-$(nproc)} -I{} sh -c 'o=$B/$(echo {} | tr / _).o; $NV $FL -c {} -o $o > $o.log 2>&1 || { echo FAILED {}; tail -20 $o.log; exit 255; }'
$nvcc -shared -Xcompiler=-fPIC -Xlinker=-soname,libtorch_cuda.so csrc/libtorch_cuda_stub.c -o $b/libtorch_cuda.so
$nvcc $b/*.o -o "$out" -L$b -L$torch/lib -shared -Xlinker=--no-as-needed,-z,defs,--exclude-libs,ALL -ltorch -ltorch_cpu -ltorch_cuda -lc10
cat $b/*.log | grep -E "bytes (stack frame|spill)" | grep -v " 0 bytes stack frame" | sort | uniq -c | sort -rn | head -20 || true
ls -la "$out"
